"""The numerics of hogwild: APOLLO updates that store no gradient. Imports nothing from `hogwild`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, products, reference
from .config import AdamConfig, ApolloConfig
from .cpu import warm_up
from .embedding import embedding_update, tied_factors
from .state import AdamState, ApolloState, UpdateResult

__all__ = [
    "AdamConfig",
    "AdamState",
    "ApolloConfig",
    "ApolloState",
    "UpdateResult",
    "adam_update",
    "apollo_update",
    "embedding_update",
    "products",
    "tied_factors",
    "warm_up",
]


@torch.no_grad()
def apollo_update(
    weight: Tensor,  # (m, n) bf16, fp16 or fp32, any strides: updated in place
    x: Tensor,  # (T, n) layer input of the T trained tokens
    d: Tensor,  # (T, m) gradient of the layer output; G = d^T x is never stored
    state: ApolloState,
    config: ApolloConfig | None = None,  # instead of the state's own; rank, gap and seed stay the state's
    *,
    lr: float | None = None,  # instead of the config's
    seed: int | None = None,  # varies the rounding bits, e.g. per thread
) -> UpdateResult:
    """One APOLLO step of one linear weight. Callable from any number of threads, on the same weight and
    state.

    No tokens, no step: with T = 0 nothing is touched. An inf or NaN in x or d touches nothing either and is
    counted.
    """
    config = config or state.config
    _check(weight, x, d, state)
    if len(x) == 0:
        return UpdateResult(0.0, skipped=False)
    rate = config.lr if lr is None else lr
    if weight.is_cuda:
        from . import cuda  # needs Triton, which a machine without CUDA need not have

        return cuda.step(weight, x, d, state, config, lr=rate, seed=seed or 0)
    if cpu.supports(weight, state):
        return cpu.step(weight, x, d, state, config, lr=rate, seed=seed or 0)
    return reference.factored_step(weight, x, d, state, config, lr=rate, seed=seed or 0)


@torch.no_grad()
def adam_update(
    weight: Tensor,  # any shape: updated in place
    grad: Tensor,  # same shape
    state: AdamState,
    config: AdamConfig | None = None,
    *,
    lr: float | None = None,
    seed: int | None = None,
) -> UpdateResult:
    """One AdamW step in fp32 of a tensor that is not a 2-D linear weight."""
    if weight.shape != state.shape or grad.shape != state.shape:
        raise ValueError(
            f"{state.name}: weight {tuple(weight.shape)}, gradient {tuple(grad.shape)}, state {state.shape}"
        )
    config = config or state.config
    rate = config.lr if lr is None else lr
    if weight.is_cuda:
        from . import cuda

        return cuda.adam_step(weight, grad, state, config, lr=rate, seed=seed or 0)
    if cpu.supports(weight, state) and weight.is_contiguous():
        grad = grad.contiguous() if grad.dtype != torch.float64 else grad.float()
        return cpu.adam_step(weight, grad, state, config, lr=rate, seed=seed or 0)
    return reference.adam_step(weight, grad, state, config, lr=rate, seed=seed or 0)


def _check(weight: Tensor, x: Tensor, d: Tensor, state: ApolloState) -> None:
    """The shapes of a step. ValueError names the weight: the kernels below work on bare addresses."""
    m, n = state.shape
    tokens = len(x)
    if weight.shape != (m, n) or x.shape != (tokens, n) or d.shape != (tokens, m):
        raise ValueError(
            f"{state.name}: expected weight ({m}, {n}), x (T, {n}), d (T, {m}); "
            f"got {tuple(weight.shape)}, {tuple(x.shape)}, {tuple(d.shape)}"
        )
