"""RMS norms as one kernel each on a GPU, where transformers starts eight, and twice as many backwards.

A training step there waits for the host, which starts kernels one by one (docs/cuda.md). torch's `rms_norm` is one
kernel each way on CUDA, and rounds once; on a CPU it is the same operators as before, so there it gains nothing.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

_EPSILONS = ("variance_epsilon", "eps")
"""What modules of transformers call it."""


def fuse(model: PreTrainedModel) -> list[str]:
    """Change the RMS norms of `model` in place; their names. A norm that computes anything else is left alone."""
    found = []
    for name, module in model.named_modules():
        if (eps := _epsilon(module)) is not None:
            module.forward = _fused(module, eps, module.forward)
            found.append(name)
    return found


def _epsilon(module: torch.nn.Module) -> float | None:
    """Of a module that computes `rms_norm` with its weight; None for any other. Judged by what it computes, for there
    is a class for each family, some of which multiply by 1 + weight or by a gate."""
    eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    width, generator = len(parameters["weight"]), torch.Generator().manual_seed(0)
    tried = torch.randn(width, generator=generator)
    x = torch.randn(4, width, generator=generator) * eps**0.5  # so that eps shows
    try:
        out = torch.func.functional_call(module, {"weight": tried}, (x,))
    except Exception:  # other shapes, kernels for a GPU alone: it is something else
        return None
    same = isinstance(out, Tensor) and out.shape == x.shape
    return eps if same and torch.allclose(out, rms_norm(x, (width,), tried, eps), atol=1e-4) else None


def _fused(
    module: torch.nn.Module, eps: float, plain: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if hidden.dtype != weight.dtype:
            return plain(hidden)
        return rms_norm(hidden, weight.shape, weight, eps)

    return forward
