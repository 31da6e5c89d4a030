"""The whole APOLLO step in plain PyTorch, any float type: the truth that every kernel is tested against.

Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv:2412.05270v4, Algorithm 1,
written from its mathematics. The steps (1) to (7) are numbered here, in the order of that listing, and the
kernels call them by these numbers. The line that computes each carries its number and, after it, the paper's: "eq."
where the paper numbers an equation, "Alg. 1" where it has the line in the listing alone.

    (1) P ~ N(0, 1/r), redrawn every `gap` steps (r = min(m, n): P = I)            Alg. 1, step 1
    (2) R = P G (m < n, channels are columns)  or  R = G P^T (m >= n, rows)        Alg. 1, step 1
    (3) M <- b1 M + (1 - b1) R                                                     eq. 8
        V <- b2 V + (1 - b2) R^2                                                   Alg. 1, step 2
        N = M / (sqrt(V) + eps)                                                    eq. 5
    (4) s_j = |N_j| / |R_j| per channel                                            eq. 5 (eq. 3 without P)
        s = |N| / |R| for the tensor (rank 1)                                      Alg. 1, step 3
    (5) U = G diag(s)  or  diag(s) G                                               below eq. 3
    (6) U <- U / L with L = max(|U| / phi, gamma) / gamma;  phi <- |U|             eq. 4
    (7) W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) sqrt(alpha) U;  W <- (1 - lr wd) W    Alg. 1, step 4
        alpha = min(m, n) / r; with P, s is smaller by its root                    eq. 9

Two forms of the same step:

    published   takes G (m, n)
    factored    takes X (T, n) and D (T, m) with G = D^T X, and never holds anything of size m x n

Both take `projection=` for tests: any (rank, min(m, n)) matrix instead of the generated P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import counter
from .config import AdamConfig, ApolloConfig
from .rounding import round_to
from .state import AdamState, ApolloState, UpdateResult

NORM_EPS = 1e-8
"""What the published code adds to the two norms that it divides by."""

TILE_ELEMENTS = 1 << 18
"""Elements of the weight that the factored form computes at once."""


def published_step(
    weight: Tensor,  # (m, n), updated in place
    gradient: Tensor,  # (m, n) G
    state: ApolloState,
    config: ApolloConfig | None = None,  # instead of the state's own; rank, gap and seed stay the state's
    *,
    lr: float | None = None,
    seed: int = 0,
    projection: Tensor | None = None,  # (rank, min(m, n)) instead of the generated P
) -> UpdateResult:
    """The step from a gradient matrix, as published (with this project's departures where the config
    asks)."""
    config = config or state.config
    m, n = state.shape
    g = gradient.to(state.exp_avg.dtype)
    p = _projection(state, projection)
    r = p @ g if m < n else g @ p.T  # (2) Alg. 1, step 1
    squares = g.square().sum(0 if m < n else 1)  # |G_j|^2
    scaled = _scales(state, config, r, squares, lr)
    if scaled is None:
        return skip(state)
    s, coefficient = scaled
    update = g * s if m < n else s[:, None] * g  # (5) below eq. 3
    w = _wide(weight) - coefficient.step * update  # (6) eq. 4, (7) Alg. 1, step 4
    weight.copy_(_rounded(weight, w * coefficient.keep, state, config, coefficient.step_count, seed, row=0))
    return UpdateResult(coefficient.norm, skipped=False)


def factored_step(
    weight: Tensor,  # (m, n), updated in place
    x: Tensor,  # (T, n) layer input of the T trained tokens
    d: Tensor,  # (T, m) gradient of the layer output
    state: ApolloState,
    config: ApolloConfig | None = None,
    *,
    lr: float | None = None,
    seed: int = 0,
    projection: Tensor | None = None,
) -> UpdateResult:
    """The same step from the two factors of G = D^T X. The largest temporary is a tile of rows of the
    weight."""
    config = config or state.config
    m, n = state.shape
    dtype = state.exp_avg.dtype
    x, d = x.to(dtype), d.to(dtype)
    p = _projection(state, projection)
    r = (d @ p.T).T @ x if m < n else d.T @ (x @ p.T)  # (2) P D^T X or D^T X P^T
    inner, outer = (d, x) if m < n else (x, d)
    squares = (
        ((inner @ inner.T) @ outer).mul_(outer).sum(0)
    )  # |G_:j|^2 = x_j^T (D D^T) x_j, or with X and D swapped
    scaled = _scales(state, config, r, squares.clamp_(min=0), lr)
    if scaled is None:
        return skip(state)
    s, coefficient = scaled
    if m < n:
        x = x * s  # (5) below eq. 3: G diag(s) = D^T (X diag(s))
    else:
        d = d * s  # (5) below eq. 3: diag(s) G = (D diag(s))^T X
    rows = max(1, TILE_ELEMENTS // n)
    for top in range(0, m, rows):
        tile = weight[top : top + rows]
        w = _wide(tile) - coefficient.step * (d[:, top : top + rows].T @ x)  # (6) eq. 4, (7) Alg. 1
        tile.copy_(_rounded(tile, w * coefficient.keep, state, config, coefficient.step_count, seed, row=top))
    return UpdateResult(coefficient.norm, skipped=False)


def adam_step(
    weight: Tensor,  # any shape, updated in place
    gradient: Tensor,  # same shape
    state: AdamState,
    config: AdamConfig | None = None,
    *,
    lr: float | None = None,
    seed: int = 0,
) -> UpdateResult:
    """AdamW (eq. 1, and its bias correction) in the dtype of the moments (fp32), rounded once on the way to the
    weight."""
    config = config or state.config
    rate = config.lr if lr is None else lr
    b1, b2 = config.betas
    g = gradient.to(state.exp_avg.dtype)
    if not bool(g.square().isfinite().all()):  # what the second moment holds
        return skip(state)
    step = state.step
    state.exp_avg.mul_(b1).add_(g, alpha=1 - b1)
    state.exp_avg_sq.mul_(b2).addcmul_(g, g, value=1 - b2)
    root = (state.exp_avg_sq / (1 - b2 ** (step + 1))).sqrt_().add_(config.eps)
    update = (state.exp_avg / root).mul_(rate / (1 - b1 ** (step + 1)))
    state.counts[0] = step + 1
    w = _wide(weight) * (1 - rate * config.weight_decay) - update
    weight.copy_(_rounded(weight, w, state, config, step, seed, row=0))
    return UpdateResult(float(update.norm()), skipped=False)


class Coefficients:
    """The scalars of (6) and (7), known before anything is written."""

    __slots__ = ("keep", "norm", "step", "step_count")

    def __init__(self, step: float, keep: float, norm: float, step_count: int) -> None:
        self.step = step  # lr * bias correction * sqrt(alpha) / L, what multiplies U
        self.keep = keep  # 1 - lr * weight decay
        self.norm = norm  # |dW| of the gradient part
        self.step_count = step_count  # the step just taken, from 0: counts the rounding stream


def _scales(
    state: ApolloState, config: ApolloConfig, r: Tensor, squares: Tensor, lr: float | None
) -> tuple[Tensor, Coefficients] | None:
    """Steps (3), (4) and (6) from R and |G_j|^2. None, and no state touched, when anything is not finite."""
    m, n = state.shape
    axis = 0 if m < n else 1
    b1, b2 = config.betas
    mean = b1 * state.exp_avg + (1 - b1) * r  # (3) eq. 8
    square = b2 * state.exp_avg_sq + (1 - b2) * r * r  # (3) Alg. 1, step 2
    normal = mean / (square.sqrt() + config.eps)  # (3) eq. 5
    if config.by_tensor(state.rank):
        s = (normal.norm() / (r.norm() + NORM_EPS)).repeat(state.channels)  # (4) Alg. 1, step 3
    else:
        s = normal.norm(dim=axis) / (r.norm(dim=axis) + NORM_EPS)  # (4) eq. 5
    length = float((s.square() * squares).sum().sqrt())  # |U|, before U exists
    if not (math.isfinite(length) and bool(torch.isfinite(r.square().sum()))):
        return None
    state.exp_avg.copy_(mean)
    state.exp_avg_sq.copy_(square)
    return s, coefficients(state, config, length, config.lr if lr is None else lr)


def coefficients(state: ApolloState, config: ApolloConfig, length: float, lr: float) -> Coefficients:
    """Step (6) and the scalars of (7) from |U|; advances phi and the step count."""
    b1, b2 = config.betas
    limit, phi = limiter(length, float(state.norm), config.gamma, config.limiter_floor)  # (6) eq. 4
    state.norm.fill_(phi)
    done = state.step
    state.counts[0] = t = done + 1
    alpha = config.alpha(min(state.shape), state.rank)  # (7) eq. 9
    step = lr * math.sqrt(1 - b2**t) / (1 - b1**t) * math.sqrt(alpha) / limit  # (7) Alg. 1, step 4
    return Coefficients(step, 1 - lr * config.weight_decay, step * length, done)


def limiter(length: float, phi: float, gamma: float, floor: float) -> tuple[float, float]:
    """Step (6), eq. 4: the divisor L and the next phi, from |U| and the previous phi (0: no update seen yet).

    A departure from the paper: phi falls at most to `floor` of itself per step, and an all-zero update
    leaves it alone.
    """
    if gamma == 0.0 or length == 0.0:
        return 1.0, phi
    if phi == 0.0:
        return 1.0, length
    limit = max(length / (phi + NORM_EPS), gamma) / gamma  # (6) eq. 4
    return limit, max(length / limit, floor * phi)


def _projection(state: ApolloState, given: Tensor | None) -> Tensor:
    p = state.projection() if given is None else given  # (1) Alg. 1, step 1
    return p.to(state.exp_avg.dtype)


def skip(state: ApolloState | AdamState) -> UpdateResult:
    """Counts an update that the non-finite guard stopped."""
    state.counts[1] += 1
    return UpdateResult(0.0, skipped=True)


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight


def _rounded(
    tile: Tensor,
    values: Tensor,
    state: ApolloState | AdamState,
    config: ApolloConfig | AdamConfig,
    step: int,
    seed: int,
    row: int,
) -> Tensor:
    """`values` in the weight's type; `row`: where in the weight the tile begins. Adam's weights are one row."""
    random = None
    if config.rounding == "stochastic" and tile.dtype in (torch.bfloat16, torch.float16):
        a, b = counter.subkey(state.key, counter.ROUNDING, step, seed)
        rows, columns = tile.shape if isinstance(state, ApolloState) else (1, tile.numel())
        random = counter.rounding_bits(rows, columns, a, b, row, tile.device).view(tile.shape)
    return round_to(values, tile.dtype, random)
