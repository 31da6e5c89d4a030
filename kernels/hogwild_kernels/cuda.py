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

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from . import counter
from . import triton_kernels as kernels
from .config import AdamConfig, ApolloConfig
from .state import AdamState, ApolloState, UpdateResult

Blocks = tuple[int, int, int, int, int, int]

CANDIDATES: list[Blocks] = [
    # BLOCK_M, BLOCK_N, BLOCK_T at most, warps, stages, tiles of one program; the first is used where nothing is timed
    (64, 64, 64, 4, 3, 4),
    (64, 128, 64, 4, 3, 4),
    (64, 128, 64, 8, 3, 8),
    (32, 128, 64, 4, 3, 4),
    (128, 128, 64, 8, 3, 1),
]
"""What the autotuning of `write` chooses from: the whole search."""

_PROGRAMS = 528
"""Of `project`, at most: four for each multiprocessor of an H200."""
_BLOCK_K = 64
_MANY = 8192
"""Channels, of which a program takes twice as many."""

TUNING_ROWS = 1024
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
    programs = _cdiv(count, split.channels)
    # [Y P^T | Y Y^T]; matrix units want it in bf16
    planes, kind = (2, torch.bfloat16) if x.dtype == d.dtype == torch.bfloat16 else (1, torch.float32)
    small = torch.empty(planes, tokens, rank + tokens, dtype=kind, device=device)
    parts = torch.empty(split.parts, *small.shape[1:], device=device)
    r, scale = torch.empty_like(state.exp_avg), torch.empty(count, device=device)
    sums, scalars = torch.empty(3, programs, device=device), torch.empty(4, device=device)
    skipped = torch.empty((), dtype=torch.bool, device=device)

    columns = _cdiv(rank, split.columns) + _cdiv(tokens, split.columns)
    kernels.project[(_cdiv(tokens, split.tokens), columns, split.parts)](
        y, y.stride(0), y.stride(1), parts, state.counts, state.config.gap, key0, key1, _table(device),
        counter.gaussian_gain(rank), tokens, size, rank, split.chunk,
        WIDEN=widen, BLOCK_T=split.tokens, BLOCK_C=split.columns, BLOCK_K=_BLOCK_K,
        num_warps=8 if split.tokens > 64 else 4, num_stages=1,
    )  # fmt: skip
    kernels.collect[(_cdiv(parts[0].numel(), 128),)](
        parts, small, parts[0].numel(), split.parts, PLANES=planes, BLOCK=128, DEPTH=16
    )
    kernels.channels[(programs,)](
        small, z, z.stride(0), z.stride(1), r, state.exp_avg, state.exp_avg_sq, rank_step, channel_step,
        scale, sums, tokens, count, rank, eps=config.eps, **moments,
        BY_TENSOR=by_tensor, PLANES=planes, WIDEN=widen,
        BLOCK_T=min(64, split.tokens), BLOCK_R=split.columns, BLOCK_C=split.channels,
        num_stages=1 if tokens <= 64 else 3,
    )  # fmt: skip
    kernels.finish[(1,)](
        sums, programs, state.norm, state.counts, scalars, skipped, lr, math.sqrt(config.alpha(size, rank)),
        _log(b1), _log(b2), config.gamma, config.limiter_floor, config.weight_decay,
        BY_TENSOR=by_tensor, BLOCK=512,
    )  # fmt: skip
    keys, state_of_step = (key0, key1, _signed(seed)), (r, state.exp_avg, state.exp_avg_sq)
    stochastic = config.rounding == "stochastic"
    _write(
        _Write(weight, x, d, scale, scalars, state.counts, keys, state_of_step, moments, by_row, stochastic)
    )
    return UpdateResult(scalars[2], skipped)


def adam_step(
    weight: Tensor, gradient: Tensor, state: AdamState, config: AdamConfig, *, lr: float, seed: int = 0
) -> UpdateResult:
    """See `reference.adam_step`: one program of one kernel, for these tensors are tiny."""
    place, device = weight.contiguous(), weight.device
    norm, skipped = torch.empty((), device=device), torch.empty((), dtype=torch.bool, device=device)
    b1, b2 = config.betas
    key0, key1 = (_signed(word) for word in state.key)
    kernels.adam[(1,)](
        place, gradient.contiguous(), state.exp_avg, state.exp_avg_sq, state.counts, norm, skipped,
        key0, key1, _signed(seed), place.numel(), lr, b1, 1 - b1, b2, 1 - b2, _log(b1), _log(b2),
        config.eps, config.weight_decay, STOCHASTIC=config.rounding == "stochastic", BLOCK=1024,
    )  # fmt: skip
    if place is not weight:
        weight.copy_(place)
    return UpdateResult(norm, skipped)


@dataclass(frozen=True)
class _Split:
    """How `project` and `channels` cut up their work: sides of their tiles, and columns of Y for one program."""

    tokens: int
    columns: int
    channels: int
    chunk: int
    parts: int


@functools.cache
def _split(tokens: int, rank: int, size: int, count: int) -> _Split:
    block = min(128, max(16, _power_of_2(tokens)))
    columns = min(64, max(16, _power_of_2(rank)))
    tiles = _cdiv(tokens, block) * (_cdiv(rank, columns) + _cdiv(tokens, columns))
    parts = max(1, min(_PROGRAMS // tiles, _cdiv(size, _BLOCK_K)))
    chunk = _cdiv(_cdiv(size, parts), _BLOCK_K) * _BLOCK_K
    return _Split(block, columns, 64 if count >= _MANY else 32, chunk, _cdiv(size, chunk))


@dataclass(slots=True)
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

    def launch(self, blocks: Blocks, only_compile: bool = False) -> None:
        (m, n), w, x, d = self.weight.shape, self.weight, self.x, self.d
        block_m, block_n, block_t, warps, stages, run = blocks
        run = max(1, min(run, _cdiv(n, block_n)))
        block_t = min(block_t, max(16, _power_of_2(len(x))))
        grid = _cdiv(m, block_m), _cdiv(_cdiv(n, block_n), run)
        start = functools.partial(kernels.write.warmup, grid=grid) if only_compile else kernels.write[grid]
        start(
            w, w.stride(0), w.stride(1), x, x.stride(0), x.stride(1), d, d.stride(0), d.stride(1),
            self.scale, self.scalars, self.counts, *self.key, *self.state, self.state[0].numel(), **self.betas,
            m=m, n=n, pairs=_cdiv(n, 2), tokens=len(x), run=run,
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
            weight=torch.empty_like(self.weight[:rows]).normal_(),
            d=self.d[:, :rows],
            scale=self.scale[:rows] if self.by_row else self.scale,
            scalars=torch.tensor([0.0, 1.0, 0.0, 1.0], device=self.weight.device),
            state=(nothing, nothing, nothing),
        )


def _write(work: _Write) -> None:
    w, x = work.weight, work.x
    kind = (w.dtype, x.dtype, w.shape[1], _power_of_2(len(x)), w.stride(1) == 1, work.by_row)
    if kind not in _tuned:
        _tuned[kind] = _tune(work) if w.is_cuda else CANDIDATES[0]
    work.launch(_tuned[kind])


def _tune(work: _Write) -> Blocks:
    """The fastest candidate, timed once per kind of shape. Waits for the device, unlike a step."""
    scratch = work.on_scratch()
    with ThreadPoolExecutor(len(CANDIDATES)) as threads, triton.AsyncCompileMode(threads):
        for candidate in CANDIDATES:
            scratch.launch(candidate, only_compile=True)

    def seconds(candidate: Blocks) -> float:
        try:
            return float(triton.testing.do_bench(lambda: scratch.launch(candidate), warmup=5, rep=20))
        except triton.OutOfResources:  # of a GPU with less shared memory
            return math.inf

    return min(CANDIDATES, key=seconds)


def _table(device: torch.device) -> Tensor:
    if device not in _tables:
        _tables[device] = counter.gaussian_table().to(device)
    return _tables[device]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(x: int) -> int:
    """The next one, x included. Triton's own functions for this take a microsecond or two, twenty times a step."""
    return 1 << (x - 1).bit_length()


def _signed(word: int) -> int:
    """A 32-bit word as int32, so that a launch argument has the same type whatever its value."""
    word &= counter.MASK
    return word - (1 << 32) if word >> 31 else word


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
