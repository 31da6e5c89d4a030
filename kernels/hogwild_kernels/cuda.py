"""The APOLLO step on CUDA: Triton kernels in sequence on the caller's stream, without waiting for the host
once.

    project    Y P^T, P generated in place, and Y Y^T: parts of both, by columns of Y
    collect    their sums
    channels   R and the norms of its channels, s; |G_j|^2 from the Gram matrix, |U|^2
    finish     guard, limiter, bias correction: a few scalars
    write      D^T X, scaled, into W, rounded once; M and V

Whether an update is skipped is known only on the device: `write` reads the verdict there. Only the factored form
exists here. docs/gpu-results.md has what was measured on a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import counter
from . import triton_kernels as kernels
from .config import AdamConfig, ApolloConfig
from .rounding import round_to
from .state import AdamState, ApolloState, UpdateResult

Blocks = tuple[int, int, int, int, int, int]

CANDIDATES: list[Blocks] = [
    # BLOCK_M, BLOCK_N, BLOCK_T at most, warps, stages, tiles of one program; the first is used where nothing is timed
    (64, 64, 64, 4, 3, 4),
    (64, 128, 64, 4, 3, 4),
    (64, 128, 64, 8, 3, 4),
    (128, 64, 64, 8, 3, 4),
    (128, 128, 64, 8, 3, 1),
]
"""What the autotuning of `write` chooses from: the whole search."""

_PROGRAMS = 264
"""Of `project`, at most: two for each multiprocessor of an H200."""
_BLOCK_K = 64
_MANY = 8192
"""Channels, of which a program takes twice as many."""

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

    by_tensor, widen = config.by_tensor(rank), not weight.is_cuda
    rank_step, channel_step = (1, rank) if by_row else (n, 1)
    split = _split(tokens, rank, size, count)
    programs = triton.cdiv(count, split.channels)
    # [Y P^T | Y Y^T]; matrix units want it in bf16
    planes, kind = (2, torch.bfloat16) if x.dtype == d.dtype == torch.bfloat16 else (1, torch.float32)
    small = torch.empty(planes, tokens, rank + tokens, dtype=kind, device=device)
    parts = torch.empty(split.parts, *small.shape[1:], device=device)
    r, scale = torch.empty_like(state.exp_avg), torch.empty(count, device=device)
    sums, scalars = torch.empty(3, programs, device=device), torch.empty(4, device=device)

    columns = triton.cdiv(rank, split.columns) + triton.cdiv(tokens, split.columns)
    kernels.project[(triton.cdiv(tokens, split.tokens), columns, split.parts)](
        y, y.stride(0), y.stride(1), parts, state.counts, state.config.gap, key0, key1, _table(device),
        counter.gaussian_gain(rank), tokens, size, rank, split.chunk,
        WIDEN=widen, BLOCK_T=split.tokens, BLOCK_C=split.columns, BLOCK_K=_BLOCK_K,
        num_warps=8 if split.tokens > 64 else 4, num_stages=1,
    )  # fmt: skip
    kernels.collect[(triton.cdiv(parts[0].numel(), 128),)](
        parts, small, parts[0].numel(), split.parts, PLANES=planes, BLOCK=128, DEPTH=16
    )
    kernels.channels[(programs,)](
        small, z, z.stride(0), z.stride(1), r, state.exp_avg, state.exp_avg_sq, rank_step, channel_step,
        scale, sums, tokens, count, rank, eps=config.eps, **moments,
        BY_TENSOR=by_tensor, PLANES=planes, WIDEN=widen,
        BLOCK_T=min(64, split.tokens), BLOCK_R=split.columns, BLOCK_C=split.channels,
        num_warps=8 if split.channels > 64 else 4, num_stages=1 if tokens <= 64 else 3,
    )  # fmt: skip
    kernels.finish[(1,)](
        sums, programs, state.norm, state.counts, scalars, lr, math.sqrt(config.alpha(size, rank)),
        _log(b1), _log(b2), config.gamma, config.limiter_floor, config.weight_decay,
        BY_TENSOR=by_tensor, BLOCK=512,
    )  # fmt: skip
    _write(
        _Write(
            weight, x, d, scale, scalars, state.counts, (key0, key1, _signed(seed)),
            (r, state.exp_avg, state.exp_avg_sq), moments, by_row, config.rounding == "stochastic",
        )  # fmt: skip
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
        random = counter.rounding_bits(1, weight.numel(), a, b, device=weight.device).view(weight.shape)
    weight.copy_(torch.where(good, round_to(value, weight.dtype, random), weight))
    state.exp_avg.copy_(torch.where(good, mean, state.exp_avg))
    state.exp_avg_sq.copy_(torch.where(good, square, state.exp_avg_sq))
    state.counts.add_(torch.stack((good, ~good)).long())
    return UpdateResult(torch.where(good, update.norm(), 0.0), ~good)


@dataclass(frozen=True)
class _Split:
    """How `project` and `channels` cut up their work: sides of their tiles, and columns of Y for one program."""

    tokens: int
    columns: int
    channels: int
    chunk: int
    parts: int


def _split(tokens: int, rank: int, size: int, count: int) -> _Split:
    block = min(128, max(16, triton.next_power_of_2(tokens)))
    columns = min(64, max(16, triton.next_power_of_2(rank)))
    tiles = triton.cdiv(tokens, block) * (triton.cdiv(rank, columns) + triton.cdiv(tokens, columns))
    parts = max(1, min(_PROGRAMS // tiles, triton.cdiv(size, _BLOCK_K)))
    chunk = triton.cdiv(triton.cdiv(size, parts), _BLOCK_K) * _BLOCK_K
    channels = (64 if count >= _MANY else 32) * (1 if tokens <= 64 else 2)
    return _Split(block, columns, channels, chunk, triton.cdiv(size, chunk))


@dataclass(frozen=True)
class _Write:
    """What `write` is given, but for its blocks."""

    weight: Tensor  # (m, n)
    x: Tensor  # (T, n)
    d: Tensor  # (T, m)
    scale: Tensor  # (max(m, n),)
    scalars: Tensor  # (4,) from `finish`
    counts: Tensor
    key: tuple[int, int, int]
    state: tuple[Tensor, Tensor, Tensor]  # R, M, V
    betas: dict[str, float]
    by_row: bool
    stochastic: bool

    def launch(self, blocks: Blocks) -> None:
        (m, n), w, x, d = self.weight.shape, self.weight, self.x, self.d
        block_m, block_n, block_t, warps, stages, run = blocks
        run = max(1, min(run, triton.cdiv(n, block_n)))
        block_t = min(block_t, max(16, triton.next_power_of_2(len(x))))
        kernels.write[(triton.cdiv(m, block_m), triton.cdiv(triton.cdiv(n, block_n), run))](
            w, w.stride(0), w.stride(1), x, x.stride(0), x.stride(1), d, d.stride(0), d.stride(1),
            self.scale, self.scalars, self.counts, *self.key, *self.state, self.state[0].numel(), **self.betas,
            m=m, n=n, tokens=len(x), run=run,
            BY_ROW=self.by_row, STOCHASTIC=self.stochastic, EVEN=m % block_m == 0 and n % block_n == 0,
            WHOLE=len(x) <= block_t, WIDEN=not w.is_cuda, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_T=block_t,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def on_scratch(self) -> _Write:
        """The same on private rows, for timing."""
        rows = min(TUNING_ROWS, len(self.weight))
        nothing = self.scale.new_empty(0)
        return replace(
            self,
            weight=torch.zeros_like(self.weight[:rows]),
            d=self.d[:, :rows],
            scale=self.scale[:rows] if self.by_row else self.scale,
            scalars=torch.tensor([0.0, 1.0, 0.0, 1.0], device=self.weight.device),
            state=(nothing, nothing, nothing),
        )


def _write(work: _Write) -> None:
    w, x = work.weight, work.x
    kind = (w.dtype, x.dtype, w.shape[1], triton.next_power_of_2(len(x)), w.stride(1) == 1, work.by_row)
    if kind not in _tuned:
        _tuned[kind] = _tune(work) if w.is_cuda else CANDIDATES[0]
    work.launch(_tuned[kind])


def _tune(work: _Write) -> Blocks:
    """The fastest candidate, timed once per kind of shape. Waits for the device, unlike a step."""
    scratch = work.on_scratch()

    def seconds(candidate: Blocks) -> float:
        return float(triton.testing.do_bench(lambda: scratch.launch(candidate), warmup=5, rep=20))

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
