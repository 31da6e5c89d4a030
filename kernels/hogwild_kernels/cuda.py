"""The APOLLO step on CUDA: Triton kernels in sequence on the caller's stream, without waiting for the host
once.

    project   Y P^T, P generated in place              channels   R, and |N_j|^2, |R_j|^2 in its epilogue
    (torch)   |G_j|^2 and |U|^2 from Gram matrices     finish     guard, limiter, bias correction: a few
    scalars commit    M and V                                  write      D^T X, scaled, into W, rounded once

Whether an update is skipped is known only on the device: `commit` and `write` read the verdict there. Only
the factored form exists here. Developed under Triton's interpreter; see docs/why-it-converges.md for what
has run on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import counter
from . import triton_kernels as kernels
from .config import AdamConfig, ApolloConfig
from .rounding import round_to
from .state import AdamState, ApolloState, UpdateResult

Blocks = tuple[int, int, int, int, int]

CANDIDATES: list[Blocks] = [
    # BLOCK_M, BLOCK_N, BLOCK_T, warps, stages; the first is used where there is nothing to time
    (64, 64, 32, 4, 2),
    (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3),
    (128, 128, 32, 8, 3),
    (64, 64, 64, 4, 3),
    (32, 128, 32, 4, 3),
]
"""What the autotuning of `write` chooses from: the whole search."""

TUNING_ROWS = 512
"""Autotuning runs on private memory of this many rows. It must never touch a served weight, not even with
its own values."""

_tuned: dict[tuple[Any, ...], Blocks] = {}
_tables: dict[torch.device, Tensor] = {}


def step(
    weight: Tensor,  # (m, n) bf16, fp16 or fp32 on the device, any strides: updated in place
    x: Tensor,  # (T, n)
    d: Tensor,  # (T, m)
    state: ApolloState,
    config: ApolloConfig,
    *,
    lr: float,
    seed: int = 0,
) -> UpdateResult:
    """One step; see `reference.factored_step`. The result's fields are 0-d tensors on the device."""
    m, n = state.shape
    tokens, rank, by_row = len(x), state.rank, m >= n
    y, z = (x, d) if by_row else (d, x)
    size, count = min(m, n), max(m, n)
    device = weight.device
    key0, key1 = (_signed(word) for word in state.key)
    b1, b2 = config.betas
    moments = {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2}

    small = torch.empty(tokens, rank, device=device)
    kernels.project[(triton.cdiv(tokens, 16), triton.cdiv(rank, 32))](
        y, y.stride(0), y.stride(1), small, state.counts, state.config.gap, key0, key1, _table(device),
        counter.gaussian_gain(rank), tokens, size, rank, BLOCK_T=16, BLOCK_R=32, BLOCK_K=64,
    )  # fmt: skip
    r = torch.empty_like(state.exp_avg)
    sums = torch.empty(2, count, device=device)
    rank_step, channel_step = (1, rank) if by_row else (n, 1)
    kernels.channels[(triton.cdiv(count, 32),)](
        small, z, z.stride(0), z.stride(1), r, state.exp_avg, state.exp_avg_sq, rank_step, channel_step,
        sums[0], sums[1], tokens, count, rank, eps=config.eps, **moments,
        BLOCK_T=16, BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))), BLOCK_C=32,
    )  # fmt: skip
    s, squared = _scales(config, rank, sums, y, z)
    scalars = torch.empty(5, device=device)
    kernels.finish[(1,)](
        squared, state.norm, state.counts, scalars, lr, math.sqrt(config.alpha(size, rank)),
        _log(b1), _log(b2), config.gamma, config.limiter_floor, config.weight_decay,
    )  # fmt: skip
    kernels.commit[(triton.cdiv(r.numel(), 1024),)](
        r, state.exp_avg, state.exp_avg_sq, scalars, r.numel(), **moments, BLOCK=1024
    )
    _write(
        weight,
        x,
        d,
        s,
        scalars,
        state.counts,
        (key0, key1, _signed(seed)),
        by_row,
        config.rounding == "stochastic",
    )
    return UpdateResult(scalars[2], scalars[3] == 0)


def adam_step(
    weight: Tensor, gradient: Tensor, state: AdamState, config: AdamConfig, *, lr: float, seed: int = 0
) -> UpdateResult:
    """See `reference.adam_step`. These tensors are tiny: torch operators, the verdict on the device as
    above."""
    g = gradient.float()
    good = g.isfinite().all()
    b1, b2 = config.betas
    done = state.counts[0].clone()
    t = (done + 1).double()
    mean = state.exp_avg * b1 + g * (1 - b1)
    square = state.exp_avg_sq * b2 + g * g * (1 - b2)
    root = (square / (1 - b2**t).float()).sqrt_().add_(config.eps)
    update = mean / root * (lr / (1 - b1**t)).float()
    value = weight.float() * (1 - lr * config.weight_decay) - update
    random = None
    if config.rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16):
        a, b = counter.subkey(state.key, counter.ROUNDING, done, seed)  # tensors in, tensors out
        random = counter.words(torch.arange(weight.numel(), device=weight.device), a, b).view(weight.shape)
    weight.copy_(torch.where(good, round_to(value, weight.dtype, random), weight))
    state.exp_avg.copy_(torch.where(good, mean, state.exp_avg))
    state.exp_avg_sq.copy_(torch.where(good, square, state.exp_avg_sq))
    state.counts.add_(torch.stack((good, ~good)).long())
    return UpdateResult(torch.where(good, update.norm(), 0.0), ~good)


def _scales(config: ApolloConfig, rank: int, sums: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """s (C,) of step (4) and |U|^2 (1,) of step (6)."""
    eps = float(kernels.NORM_EPS.value)
    if config.by_tensor(rank):
        normal, raw = sums.sum(1).sqrt()
        s = (normal / (raw + eps)).expand(sums.shape[1]).contiguous()
    else:
        s = sums[0].sqrt() / (sums[1].sqrt() + eps)
    wide, inner = z.float(), y.float()
    squares = ((inner @ inner.T) @ wide).mul_(wide).sum(0).clamp_(min=0)  # |G_j|^2, see reference.py
    # A non-finite R must stop the update even where its channel's own norm came out finite.
    return s, (s.square() * squares).sum().add_(sums.sum() * 0).view(1)


def _write(
    weight: Tensor, x: Tensor, d: Tensor, s: Tensor, scalars: Tensor, counts: Tensor,
    key: tuple[int, int, int], by_row: bool, stochastic: bool,
) -> None:  # fmt: skip
    n = weight.shape[1]
    place = (weight.dtype, x.dtype, n, triton.next_power_of_2(len(x)), weight.stride(1) == 1, by_row)
    if place not in _tuned:
        _tuned[place] = CANDIDATES[0]
        if weight.is_cuda:
            _tuned[place] = _tune(weight, x, d, s, counts, key, by_row, stochastic)
    _launch(_tuned[place], weight, x, d, s, scalars, counts, key, by_row, stochastic)


def _launch(
    candidate: Blocks, weight: Tensor, x: Tensor, d: Tensor, s: Tensor, scalars: Tensor,
    counts: Tensor, key: tuple[int, int, int], by_row: bool, stochastic: bool,
) -> None:  # fmt: skip
    m, n = weight.shape
    block_m, block_n, block_t, warps, stages = candidate
    kernels.write[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        weight, weight.stride(0), weight.stride(1), x, x.stride(0), x.stride(1), d, d.stride(0), d.stride(1),
        s, scalars, counts, *key, m, n, len(x),
        BY_ROW=by_row, STOCHASTIC=stochastic, WIDEN=not weight.is_cuda,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_T=block_t, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _tune(
    weight: Tensor, x: Tensor, d: Tensor, s: Tensor, counts: Tensor, key: tuple[int, int, int],
    by_row: bool, stochastic: bool,
) -> Blocks:  # fmt: skip
    """The fastest candidate, timed once per kind of shape on private rows. Waits for the device, unlike a
    step."""
    rows = min(TUNING_ROWS, len(weight))
    scratch = torch.zeros_like(weight[:rows])
    scalars = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], device=weight.device)
    part, left = s[:rows] if by_row else s, d[:, :rows]

    def seconds(candidate: Blocks) -> float:
        def run() -> None:
            _launch(candidate, scratch, x, left, part, scalars, counts, key, by_row, stochastic)

        return float(triton.testing.do_bench(run, warmup=5, rep=20))

    return min(CANDIDATES, key=seconds)


def _table(device: torch.device) -> Tensor:
    if device not in _tables:
        _tables[device] = counter.gaussian_table().to(device)
    return _tables[device]


def _signed(word: int) -> int:
    """A 32-bit word as int32, so that a launch argument has the same type whatever its value."""
    word &= counter.MASK
    return word - (1 << 32) if word >> 31 else word


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
