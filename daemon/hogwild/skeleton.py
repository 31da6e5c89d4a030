"""A Hugging Face model whose parameters are views of the arena: built on the meta device, it owns no weights."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hogwild.errors import VerificationError
from hogwild.weights import Weights, read_tensors
from hogwild_kernels import products


def build(folder: Path, weights: Weights) -> PreTrainedModel:
    """Build the model of `folder` around the live weights; nothing requires a gradient.

    Tensors that the server keeps no plain copy of (`layout.frozen`) are read from the checkpoint: they never change.

    Raises:
        VerificationError: naming every parameter that has no view, or one of another shape.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    layout = weights.arena.layout
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name for name, _ in model.named_parameters()}
    private = {name for name in wanted if name in layout.frozen}
    copies = dict(_only(folder, private)) if private else {}
    problems = []
    for name, parameter in list(model.named_parameters()):
        if name in layout.tensors:
            tensor = weights.view(name)
        elif name in copies:
            tensor = copies[name]
        else:
            if name not in tied:
                problems.append(f"{name}: needed by {type(model).__name__}, not served")
            continue
        if tensor.shape != parameter.shape:
            problems.append(f"{name}: {tuple(parameter.shape)} in the model, {tuple(tensor.shape)} served")
            continue
        _assign(model, name, tensor)
    if problems:
        raise VerificationError(f"the served weights do not make up a {type(model).__name__}", problems)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise VerificationError(
            f"parts of {type(model).__name__} are tied to nothing that is served",
            [f"{name}: no tensor" for name in left],
        )
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = FrozenLinear
    return model.eval()


class _Product(torch.autograd.Function):
    """y = x W^T + b with W and b constant. W is not saved: another thread may have moved it by the backward pass,
    which then takes it as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return products.input_gradient(d, ctx.weight), None, None


class FrozenLinear(torch.nn.Linear):
    """A linear layer that passes gradients on and has none, multiplied as `hogwild_kernels.products` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., n) -> (..., m)"""
        result: torch.Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _only(folder: Path, names: set[str]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in read_tensors(folder) if name in names]
