"""Embeddings: frozen by default, and when they are trained, without a dense gradient.

An embedding's gradient has a row for each token of the batch and zeros elsewhere. As a linear layer it has
X = gradient of the looked-up rows (T, n) and D = one-hot rows (T, V); the step below is that step, with the
one-hot product done as a sum over equal tokens and only the touched rows read, scaled and written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import counter, reference
from .config import ApolloConfig
from .rounding import round_to
from .state import ApolloState, UpdateResult


@torch.no_grad()
def embedding_update(
    weight: Tensor,  # (V, n), any strides: the rows of `tokens` are updated in place
    tokens: Tensor,  # (T,) int64 token ids, repeats allowed
    grad: Tensor,  # (T, n) gradient of the looked-up rows
    state: ApolloState,
    config: ApolloConfig | None = None,
    *,
    lr: float | None = None,
    seed: int | None = None,
) -> UpdateResult:
    """One APOLLO step of an input embedding. Equal to the dense step, except that rows no token touched do
    not decay.

    Moments live in the projected space (V, rank) and decay everywhere, as in the dense step. Finding the
    distinct tokens waits for the device on CUDA.
    """
    config = config or state.config
    height, n = state.shape
    if weight.shape != state.shape or grad.shape != (len(tokens), n):
        raise ValueError(
            f"{state.name}: expected weight {state.shape} and gradient ({len(tokens)}, {n}); "
            f"got {tuple(weight.shape)} and {tuple(grad.shape)}"
        )
    if len(tokens) == 0:
        return UpdateResult(0.0, skipped=False)
    rate = config.lr if lr is None else lr
    if height < n:  # fewer rows than columns: channels are columns, and every one of them is touched
        d = torch.nn.functional.one_hot(tokens, height).to(grad.dtype)
        return reference.factored_step(weight, grad, d, state, config, lr=rate, seed=seed or 0)
    dtype = state.exp_avg.dtype
    rows, place = torch.unique(tokens, return_inverse=True)
    g = torch.zeros(len(rows), n, dtype=dtype, device=grad.device).index_add_(0, place, grad.to(dtype))
    r = g @ state.projection().to(dtype).T  # (rows, rank): the rest of R is zero
    b1, b2 = config.betas
    mean = b1 * state.exp_avg[rows] + (1 - b1) * r
    square = b2 * state.exp_avg_sq[rows] + (1 - b2) * r * r
    normal = mean / (square.sqrt() + config.eps)
    if config.by_tensor(state.rank):
        idle = b1 * state.exp_avg / ((b2 * state.exp_avg_sq).sqrt() + config.eps)
        total = idle.square().sum() - idle[rows].square().sum() + normal.square().sum()
        s = (total.clamp(min=0).sqrt() / (r.norm() + reference.NORM_EPS)).repeat(len(rows))
    else:
        s = normal.norm(dim=1) / (r.norm(dim=1) + reference.NORM_EPS)
    length = float((s.square() * g.square().sum(1)).sum().sqrt())
    if not bool(torch.isfinite(r.square().sum() + length)):
        return reference.skip(state)
    state.exp_avg.mul_(b1)
    state.exp_avg_sq.mul_(b2)
    state.exp_avg[rows] = mean
    state.exp_avg_sq[rows] = square
    c = reference.coefficients(state, config, length, rate)
    old = weight[rows]
    wide = old.float() if old.dtype in (torch.bfloat16, torch.float16) else old
    value = (wide - c.step * s[:, None] * g) * c.keep
    random = None
    if config.rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16):
        a, b = counter.subkey(state.key, counter.ROUNDING, c.step_count, seed or 0)
        random = counter.rounding_bits(rows, n, a, b)
    weight[rows] = round_to(value, weight.dtype, random)
    return UpdateResult(c.norm, skipped=False)


def tied_factors(
    x: Tensor,  # (T, n) input of the output head
    d: Tensor,  # (T, V) gradient of the logits
    tokens: Tensor,  # (S,) int64 ids that the same weight embedded
    grad: Tensor,  # (S, n) gradient of the looked-up rows
) -> tuple[Tensor, Tensor]:
    """X and D of a weight that is both embedding and head: G = D^T X sums both uses. For `apollo_update`.

    Each distinct token is one row (n,) more of X and one one-hot row (V,) more of D. Finding them waits for the
    device on CUDA.
    """
    if len(tokens) == 0:
        return x, d
    rows, place = torch.unique(tokens, return_inverse=True)
    wide = torch.promote_types(grad.dtype, torch.float32)  # equal tokens are added before anything is rounded
    g = torch.zeros(len(rows), grad.shape[1], dtype=wide, device=grad.device)
    g.index_add_(0, place, grad.to(wide))
    one_hot = d.new_zeros(len(rows), d.shape[1])
    one_hot[torch.arange(len(rows), device=rows.device), rows] = 1.0
    return torch.cat((x, g.to(x.dtype))), torch.cat((d, one_hot))
