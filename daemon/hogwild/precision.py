"""Activations in fp32 around 16-bit weights, on a CPU that cannot multiply 16-bit numbers.

There every 16-bit product is made in fp32 anyway, so 16-bit activations only cost conversions, and rounding. The
weights stay as they are: linear layers widen a tile at a time (`hogwild_kernels.products`). What is small (norms,
convolutions, decays) is copied into fp32 before each step, because its code multiplies tensors of one type.
"""

import torch
from transformers import PreTrainedModel

from hogwild import skeleton
from hogwild_kernels import products

_SMALL = 1 << 20
"""Elements of the largest parameter that is copied."""


class Wide:
    """The fp32 copies of a model's small parameters.

    Attributes:
        dtype: of the activations.
        sources: name -> the weight of the arena that a copy was made of. Empty if the model computes in its own type.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Changes the model in place, or leaves it alone: where 16-bit products are fast, or where a large weight
        lies in code that cannot mix types (experts)."""
        self.dtype = model.dtype
        self.sources: dict[str, torch.Tensor] = {}
        self._copies: dict[str, torch.Tensor] = {}
        if model.device.type != "cpu" or products.multiplies(model.dtype):
            return
        found = []
        for name, module in model.named_modules():
            if not (skeleton.is_linear(module) or isinstance(module, torch.nn.Embedding)):
                for leaf, parameter in module.named_parameters(recurse=False):
                    found.append((f"{name}.{leaf}" if name else leaf, module, leaf, parameter))
        if any(p.ndim == 2 or p.numel() > _SMALL for *_, p in found):
            return
        for name, module, leaf, parameter in found:
            if parameter.dtype != torch.float32:
                copy = torch.nn.Parameter(parameter.detach().float(), requires_grad=False)
                module._parameters[leaf] = copy
                self.sources[name], self._copies[name] = parameter.data, copy.data
        self.dtype = torch.float32
        model.get_input_embeddings().register_forward_hook(_widen)

    def refresh(self) -> None:
        """Take over what other threads have written since."""
        for name, copy in self._copies.items():
            copy.copy_(self.sources[name])


def _widen(_module: torch.nn.Module, _arguments: object, output: torch.Tensor) -> torch.Tensor:
    return output.float()
