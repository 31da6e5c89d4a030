"""The APOLLO step on CPU: torch matrix products, and Numba for everything between and after them.

Safe to call from several threads at once, on one weight or several: nothing is locked, scratch memory
belongs to the calling thread, and the only shared data is the state (whose races state.py lists) and the
weight.

When weight, X and D are all bf16 and the CPU multiplies bf16 natively, a tile of G = D^T X passes through
bf16, exactly as a gradient that autograd computed would. From `plan.EXACT_TOKENS` tokens on every other
product of X, D and P does too, as in the published code. Moments, scales, sums of squares and the sum with the
weight are fp32 throughout.
"""

from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import torch
from torch import Tensor

from . import counter, plan
from . import numba_kernels as loops
from .config import AdamConfig, ApolloConfig, Form
from .products import multiplies, tiles
from .reference import NORM_EPS, Coefficients, coefficients, skip
from .state import AdamState, ApolloState, UpdateResult

_MARKERS = {torch.bfloat16: loops.BFLOAT16, torch.float16: loops.FLOAT16, torch.float32: loops.FLOAT32}


def step(
    weight: Tensor,  # (m, n) bf16, fp16 or fp32, any strides: updated in place
    x: Tensor,  # (T, n)
    d: Tensor,  # (T, m)
    state: ApolloState,
    config: ApolloConfig,
    *,
    lr: float,
    seed: int = 0,
) -> UpdateResult:
    """One step; see `reference.factored_step`, which this equals to fp32 rounding."""
    m, n = state.shape
    rank = state.rank
    low = weight.dtype == x.dtype == d.dtype == torch.bfloat16 and multiplies(torch.bfloat16)
    chosen = plan.choose(config.form, m, n, len(x), rank, low, plan.AMX if tiles() else plan.AVX512_BF16)
    exact = not low or len(x) < plan.EXACT_TOKENS
    xs, ds = (x.float().contiguous(), d.float().contiguous()) if exact else (x, d)
    p = state.projection(build_projection).to(xs.dtype)

    gradient = None
    if chosen.form == "plain":
        gradient = _gradient_memory(m, n, x.dtype if low else torch.float32)
        torch.mm(*((_rows(d), x) if low else (ds.t(), xs)), out=gradient)  # (m, n), bf16 or fp32
    if gradient is not None and chosen.project_gradient:
        r = _project_matrix(gradient, p, m, n)
    elif m < n:
        r = torch.mm(torch.mm(ds, p.t()).t(), xs)  # (r, n) = P D^T X
    else:
        r = torch.mm(ds.t(), torch.mm(xs, p.t()))  # (m, r) = D^T X P^T
    r = r.float()

    s = _channel_scales(state, config, r)
    length = _length(state, s, xs, ds, gradient)
    # The moments hold R^2, which overflows long before R does: then the scales are 0, and so is the length.
    if not (math.isfinite(length) and math.isfinite(float(r.square().sum()))):
        return skip(state)
    b1, b2 = config.betas
    loops.update_moments(
        r.data_ptr(), state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr(), r.numel(),
        np.float32(b1), np.float32(1 - b1), np.float32(b2), np.float32(1 - b2),
    )  # fmt: skip
    c = coefficients(state, config, length, lr)
    s.mul_(c.step)
    _write(weight, x if low else xs, d if low else ds, gradient, s, c, state, config, seed)
    return UpdateResult(c.norm, skipped=False)


def adam_step(
    weight: Tensor, gradient: Tensor, state: AdamState, config: AdamConfig, *, lr: float, seed: int = 0
) -> UpdateResult:
    """See `reference.adam_step`. Weight and gradient must be contiguous."""
    t = state.step + 1
    b1, b2 = config.betas
    a, b = counter.subkey(state.key, counter.ROUNDING, t - 1, seed)
    total = loops.adam(
        weight.data_ptr(), _MARKERS[weight.dtype], gradient.data_ptr(), _MARKERS[gradient.dtype],
        state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr(), weight.numel(),
        np.float32(b1), np.float32(1 - b1), np.float32(b2), np.float32(1 - b2), np.float32(config.eps),
        np.float32(1 / (1 - b2**t)), np.float32(lr / (1 - b1**t)), np.float32(1 - lr * config.weight_decay),
        config.rounding == "stochastic", np.uint32(a), np.uint32(b),
    )  # fmt: skip
    if math.isnan(total):
        return skip(state)
    state.counts[0] = t
    return UpdateResult(math.sqrt(total), skipped=False)


def supports(weight: Tensor, state: ApolloState | AdamState) -> bool:
    """Whether these kernels take this weight: fp32 moments and a 16- or 32-bit float weight in host
    memory."""
    return weight.device.type == "cpu" and weight.dtype in _MARKERS and state.exp_avg.dtype == torch.float32


def warm_up(dtype: torch.dtype = torch.bfloat16) -> None:
    """Compiles (or loads from Numba's cache) every loop that weights of this type need, before anything is
    timed.

    About five seconds where nothing is cached, well under one where it is.
    """
    forms: tuple[Form, ...] = ("factored", "plain")
    for factors in {dtype, torch.float32}:
        x, d = torch.ones(3, 6, dtype=factors), torch.ones(3, 4, dtype=factors)
        for form in forms:
            config = ApolloConfig(rank=2, form=form)
            step(torch.zeros(4, 6, dtype=dtype), x, d, ApolloState("warm-up", (4, 6), config), config, lr=0.0)
        small = AdamState("warm-up", (4,))
        adam_step(torch.zeros(4, dtype=dtype), d[0].contiguous(), small, small.config, lr=0.0)


def build_projection(key: tuple[int, int], epoch: int, rank: int, size: int) -> Tensor:
    """`counter.projection`, the same bits, compiled."""
    if rank == size:
        return torch.eye(rank)
    a, b = counter.subkey(key, counter.PROJECTION, epoch)
    p = torch.empty(rank, size)
    table = counter.gaussian_table()
    gain = np.float32(counter.gaussian_gain(rank))
    loops.fill_projection(p.data_ptr(), p.numel(), np.uint32(a), np.uint32(b), table.data_ptr(), gain)
    return p


def _channel_scales(state: ApolloState, config: ApolloConfig, r: Tensor) -> Tensor:
    """s (max(m, n),) of step (4). Not finite where R is not."""
    m, n = state.shape
    b1, b2 = config.betas
    normal, raw = torch.empty(state.channels), torch.empty(state.channels)
    loops.channel_norms(
        r.data_ptr(), state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr(), r.shape[0], r.shape[1], m >= n,
        np.float32(b1), np.float32(1 - b1), np.float32(b2), np.float32(1 - b2), np.float32(config.eps),
        normal.data_ptr(), raw.data_ptr(),
    )  # fmt: skip
    if config.by_tensor(state.rank):
        total = normal.sum().sqrt() / (raw.sum().sqrt() + NORM_EPS)
        return total.repeat(state.channels)
    return normal.sqrt_().div_(raw.sqrt_().add_(NORM_EPS))


def _length(state: ApolloState, s: Tensor, x: Tensor, d: Tensor, gradient: Tensor | None) -> float:
    """|U| before U exists, step (6)."""
    m, n = state.shape
    if gradient is not None:
        squares = torch.zeros(state.channels)
        loops.add_squares(gradient.data_ptr(), _MARKERS[gradient.dtype], m, n, m >= n, squares.data_ptr())
        return math.sqrt(float(torch.dot(squares, s.square())))
    # |D^T X diag(s)|^2 = <D D^T, (X diag(s)) (X diag(s))^T>, and the other way round for rows: two
    # symmetric T x T matrices, of which the blocks on and below the diagonal are enough.
    plainer, narrower = (d, x) if m < n else (x, d)
    scaled = narrower * s.to(narrower.dtype)
    total = 0.0
    for top in range(0, len(x), plan.GRAM_BLOCK):
        rows, left = slice(top, top + plan.GRAM_BLOCK), slice(0, top)
        total += _inner(plainer[rows], scaled[rows], plainer[rows], scaled[rows])
        if top:
            total += 2.0 * _inner(plainer[rows], scaled[rows], plainer[left], scaled[left])
    return math.sqrt(max(total, 0.0)) if math.isfinite(total) else math.nan


def _inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """<A C^T, B D^T>"""
    return float(torch.dot(torch.mm(a, c.t()).view(-1).float(), torch.mm(b, d.t()).view(-1).float()))


def _project_matrix(gradient: Tensor, p: Tensor, m: int, n: int) -> Tensor:
    """R from a stored G, if P is in fp32 a tile of rows in fp32 at a time."""
    if gradient.dtype == p.dtype:
        return torch.mm(p, gradient) if m < n else torch.mm(gradient, p.t())
    r = torch.zeros(len(p), n) if m < n else torch.empty(m, len(p))
    rows = _tile_rows(n, 4)
    for top in range(0, m, rows):
        tile = gradient[top : top + rows].float()
        if m < n:
            r.addmm_(p[:, top : top + rows], tile)
        else:
            torch.mm(tile, p.t(), out=r[top : top + rows])
    return r


def _write(
    weight: Tensor, x: Tensor, d: Tensor, gradient: Tensor | None,
    s: Tensor, c: Coefficients, state: ApolloState, config: ApolloConfig, seed: int,
) -> None:  # fmt: skip
    """Steps (5) to (7): tiles of D^T X (or of the stored G), scaled, subtracted and rounded straight into
    the weight."""
    m, n = state.shape
    ones = torch.ones(min(m, n))
    column_scale, row_scale = (s, ones) if m < n else (ones, s)
    transposed = False
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        # Stored transposed: update W^T = (X^T D)^T instead, so that rows are contiguous again.
        weight, x, d = weight.t(), d, x
        gradient = None if gradient is None else gradient.t()
        column_scale, row_scale = row_scale, column_scale
        transposed = True
    a, b = counter.subkey(state.key, counter.ROUNDING, c.step_count, seed)
    height, width = weight.shape
    left = _rows(d) if gradient is None else d.t()
    columns = min(width, plan.TILE_COLUMNS) if gradient is None else width
    rows, pairs = _tile_rows(columns, x.element_size()), -(-n // 2)
    for side, top in itertools.product(range(0, width, columns), range(0, height, rows)):
        part = slice(top, top + rows), slice(side, side + columns)
        target = weight[part]
        if gradient is None:
            tile = _scratch(target.numel(), x.dtype).view(target.shape)
            torch.mm(left[part[0]], x[:, part[1]], out=tile)
        else:
            tile = gradient[part].contiguous()
        direct = target.stride(1) == 1 or width == 1
        place = target if direct else target.contiguous()
        first = a + (side * pairs if transposed else side // 2)  # the random word of the tile's first column
        loops.write_tile(
            place.data_ptr(), _MARKERS[place.dtype], place.stride(0) * place.element_size(),
            tile.data_ptr(), _MARKERS[tile.dtype], *tile.shape,
            column_scale[part[1]].data_ptr(), row_scale[part[0]].data_ptr(), np.float32(c.keep),
            config.rounding == "stochastic", np.uint32(first & 0xFFFFFFFF), np.uint32(b), top, pairs, transposed,
        )  # fmt: skip
        if not direct:
            target.copy_(place)


def _rows(factor: Tensor) -> Tensor:
    """The transpose. In bf16 a copy: a product that takes it as it lies makes one of its own every time."""
    return factor.t().contiguous() if factor.dtype == torch.bfloat16 else factor.t()


def _tile_rows(width: int, element_size: int) -> int:
    size = plan.TILE_BYTES if element_size == 4 else plan.LOW_TILE_BYTES
    return max(1, size // (width * element_size))


def _gradient_memory(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """For the plain form. A small gradient takes the thread's own tile memory, so nothing is allocated for
    it."""
    if m * n * dtype.itemsize <= plan.SMALL_BYTES:
        return _scratch(m * n, dtype).view(m, n)
    return torch.empty(m, n, dtype=dtype)


_local = threading.local()


def _scratch(elements: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's tile memory: fresh pages for every tile would cost more than the tile."""
    held: Tensor | None = getattr(_local, "tile", None)
    bytes_needed = elements * dtype.itemsize
    if held is None or held.numel() < bytes_needed:
        held = torch.empty(max(bytes_needed, plan.LOW_TILE_BYTES), dtype=torch.uint8)
        _local.tile = held
    return held[:bytes_needed].view(dtype)
