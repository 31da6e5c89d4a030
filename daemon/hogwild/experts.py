"""The experts of a mixture as linear layers, which are trained, protected and saved like any other.

transformers keeps the experts of a layer as two stacks of matrices, and multiplies by a stack at once. Taken apart,
each expert is a layer of its own, with a view of its own of the same memory: it is updated from the tokens that were
sent to it, and one that no token was sent to is left alone. It costs a product for each expert that a token reaches, in
place of one for all.

What is taken apart is what transformers' interface for experts (transformers/integrations/moe.py) describes: matrices
(E, m, n), or (E, n, m) if they are stored transposed, without biases. Experts that multiply in another way stay
stacked, and so do those that do not lie in the arena as one view.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from hogwild.layout import Region

_DESCRIBED = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


def unstack(
    model: PreTrainedModel, regions: dict[str, Region], linear: Callable[[Tensor], torch.nn.Linear]
) -> dict[str, str]:
    """Take the experts of a skeleton apart.

    Args:
        regions: parameter -> its place in the arena; a stack's gives way to those of its matrices. Stacks that have
            none stay as they are.
        linear: makes a layer of a weight (m, n).

    Returns:
        Parameters that are new, called stack.number.weight -> the stack that they were in.
    """
    found = dict[str, str]()
    for name, module in list(model.named_modules()):
        leaves = stacks(module)
        if not leaves or not all(f"{name}.{leaf}" in regions for leaf in leaves):
            continue
        for leaf in leaves:
            stack = module._parameters.pop(leaf)
            assert stack is not None
            region = regions.pop(f"{name}.{leaf}")
            layers = torch.nn.ModuleList()
            for number, matrix in enumerate(stack.data):
                layer: Any = linear(matrix.t() if module.is_transposed else matrix)
                layer.stack = stack.shape[0]
                layers.append(layer)
                here = f"{name}.{leaf}.{number}.weight"
                regions[here], found[here] = _part(region, number, module.is_transposed), f"{name}.{leaf}"
            setattr(module, leaf, layers)
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Experts, kind), {})
    return found


def stacks(module: torch.nn.Module) -> list[str]:
    """Names of the two stacks of a layer's experts; [] if it has others, or none."""
    if not all(hasattr(module, attribute) for attribute in _DESCRIBED) or module.has_bias:
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    parameters = dict(module.named_parameters(recurse=False))
    fits = parameters.keys() == set(names) and all(
        one.ndim == 3 and len(one) == module.num_experts for one in parameters.values()
    )
    return names if fits else []


def _part(region: Region, number: int, transposed: bool) -> Region:
    """Where one matrix of a stack lies."""
    offset = region.offset + number * region.stride[0] * region.torch_dtype.itemsize
    shape, stride = region.shape[1:], region.stride[1:]
    if transposed:
        shape, stride = shape[::-1], stride[::-1]
    return replace(region, offset=offset, shape=shape, stride=stride)


class _Experts(torch.nn.Module):
    """What takes the place of the class of a layer's experts, in front of it."""

    def forward(
        self,
        hidden_states: Tensor,  # (T, n)
        top_k_index: Tensor,  # (T, K) int64
        top_k_weights: Tensor,  # (T, K)
    ) -> Tensor:
        """(T, n): the weighted sum over the experts that each token is sent to."""
        this = cast(Any, self)
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        sent = hidden_states[order // top_k_index.shape[1]]
        first, second = (this.gate_up_proj if this.has_gate else this.up_proj), this.down_proj
        made = []
        for number, rows in enumerate(torch.split(sent, _counts(chosen, len(first)))):
            if len(rows):
                inner = first[number](rows)
                made.append(second[number](this._apply_gate(inner) if this.has_gate else this.act_fn(inner)))
        weighted = torch.cat(made) * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        parts = weighted[back].view(*top_k_index.shape, hidden_states.shape[-1])
        return parts.sum(1).to(hidden_states.dtype)


def _counts(chosen: Tensor, experts: int) -> list[int]:
    """How many tokens are sent to each. The host waits for it on a GPU."""
    if isinstance(chosen, FakeTensor):  # has no numbers
        share, more = divmod(len(chosen), experts)
        return [share + (number < more) for number in range(experts)]
    return cast(list[int], torch.bincount(chosen, minlength=experts).tolist())
