"""The numerics of hogwild: APOLLO updates that store no gradient. Imports nothing from `hogwild`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .config import AdamConfig, ApolloConfig
from .state import AdamState, ApolloState, UpdateResult

__all__ = [
    "AdamConfig",
    "AdamState",
    "ApolloConfig",
    "ApolloState",
    "UpdateResult",
    "adam_update",
    "apollo_update",
]


@torch.no_grad()
def apollo_update(
    weight: Tensor,  # (m, n) bf16, fp16 or fp32, any strides: updated in place
    x: Tensor,  # (T, n) layer input of the T trained tokens
    d: Tensor,  # (T, m) gradient of the layer output; G = d^T x is never stored
    state: ApolloState,
    config: ApolloConfig
    | None = None,  # defaults to the state's own; only lr and rounding may differ in effect
    *,
    lr: float | None = None,
    seed: int | None = None,  # varies the rounding bits, e.g. per thread
) -> UpdateResult:
    """One APOLLO step of one linear weight. Callable from any number of threads, on the same weight and state."""
    del config
    return reference.factored_step(weight, x, d, state, lr=lr, seed=seed or 0)


@torch.no_grad()
def adam_update(
    weight: Tensor,
    grad: Tensor,
    state: AdamState,
    config: AdamConfig | None = None,
    *,
    lr: float | None = None,
    seed: int | None = None,
) -> UpdateResult:
    """One AdamW step in fp32 of a tensor that is not a 2-D linear weight."""
    del config
    return reference.adam_step(weight, grad, state, lr=lr, seed=seed or 0)
