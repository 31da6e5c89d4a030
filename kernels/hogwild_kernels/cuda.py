"""The APOLLO step on CUDA: Triton kernels in sequence on the caller's stream, without waiting for the host
once.

    project    Y P^T, P generated in place, and Y Y^T: parts of both, by columns of Y
    collect    their sums
    channels   R and the norms of its channels, s; |G_j|^2 from the Gram matrix, |U|^2; at its end guard, limiter and
               bias correction: a few scalars
    write      D^T X, scaled, into W, rounded once; M and V

Whether an update is skipped is known only on the device: `write` reads the verdict there. Only the factored form
exists here. docs/gpu-results.md has what was measured on a device.
"""

from __future__ import annotations

import functools
import math
import statistics
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import counter
from . import triton_elementwise as elementwise
from . import triton_kernels as kernels
from .config import AdamConfig, ApolloConfig
from .launch import Grid, Prepared, Scratch, aligned, compile_together, stream_of
from .state import AdamState, ApolloState, UpdateResult

Blocks = tuple[int, int, int, int, int, int, bool]

CANDIDATES: list[Blocks] = [
    # BLOCK_M, BLOCK_N, BLOCK_T at most, warps, stages, tiles of one program, FETCH; the first is used where nothing is
    # timed
    (64, 64, 64, 4, 3, 4, True),
    (64, 128, 64, 4, 3, 4, False),
    (32, 128, 64, 4, 3, 4, False),
    (64, 64, 256, 4, 2, 8, False),
    (128, 128, 64, 8, 3, 1, False),
    (128, 128, 32, 4, 4, 1, False),
]
"""What the autotuning of `write` chooses from: the whole search."""

_PROGRAMS = 528
"""Of `project`, at most: four for each multiprocessor of an H200."""
_BLOCK_K = 64
_MANY = 8192
"""Channels, of which a program takes twice as many."""

TUNING_BYTES = 64 << 20
"""Autotuning runs on private memory, on so many bytes of rows: enough to keep the whole device busy. It must never
touch a served weight, not even with its own values."""

_L2_BYTES, _TIMED = 256 << 20, 9
"""More than any second-level cache; runs of each candidate, the first of which loads it."""

_MOST_PLANS = 8192

_tuned: dict[tuple[Any, ...], Blocks] = {}
_plans: dict[tuple[Any, ...], _Plan] = {}
_adams: dict[tuple[Any, ...], Prepared] = {}
_tables: dict[torch.device, Tensor] = {}
_first = threading.Lock()
"""One plan at a time is compiled and tuned: Triton hands a second thread what the first has not compiled yet, and two
that tune spoil each other's timings."""


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
    kind = (
        weight.device, weight.dtype, x.dtype, d.dtype, len(x), state.shape, state.rank, weight.stride(), x.stride(),
        d.stride(), aligned(weight, x, d), id(config), state.config.gap,
    )  # fmt: skip
    plan = _plans.get(kind)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[kind] = _Plan(weight, x, d, state, config)
    return plan.run(weight, x, d, state, lr, seed)


class _Plan:
    """How the updates of one kind are done: those that agree in all that a kernel is compiled for.

    It holds no tensor of theirs: weights of a shape, in all layers of a model, share one. It does hold the
    configuration, whose identity is part of the kind.
    """

    def __init__(
        self, weight: Tensor, x: Tensor, d: Tensor, state: ApolloState, config: ApolloConfig
    ) -> None:
        m, n = state.shape
        tokens, rank = len(x), state.rank
        self.config, self.gap, self.by_row = config, state.config.gap, m >= n
        y, z = (x, d) if self.by_row else (d, x)
        self.size, self.count = min(m, n), max(m, n)
        split = self.split = _split(tokens, rank, self.size, self.count)
        self.programs = _cdiv(self.count, split.channels)
        # [Y P^T | Y Y^T]; matrix units want it in bf16
        both = x.dtype == d.dtype == torch.bfloat16
        planes, kind = (2, torch.bfloat16) if both else (1, torch.float32)
        self.gain, self.table = counter.gaussian_gain(rank), _table(weight.device)
        self.root_alpha = math.sqrt(config.alpha(self.size, rank))
        b1, b2 = config.betas
        self.moments, self.logs = (b1, 1 - b1, b2, 1 - b2), (_log(b1), _log(b2))
        widen = not weight.is_cuda
        columns = _cdiv(rank, split.columns) + _cdiv(tokens, split.columns)
        self.y_strides, self.z_strides = y.stride(), z.stride()
        self.project_grid: Grid = (_cdiv(tokens, split.tokens), columns, split.parts)
        self.project = Prepared(
            kernels.project,
            {"WIDEN": widen, "BLOCK_T": split.tokens, "BLOCK_C": split.columns, "BLOCK_K": _BLOCK_K},
            num_warps=8 if split.tokens > 64 else 4,
            num_stages=1,
        )
        self.width = tokens * (rank + tokens)
        block, depth = (128, 32) if tokens <= 64 else (256, 16)
        self.collect_grid: Grid = (_cdiv(self.width, block), 1, 1)
        self.collect = Prepared(kernels.collect, {"PLANES": planes, "BLOCK": block, "DEPTH": depth})
        self.channels = Prepared(
            kernels.channels,
            {
                "BY_TENSOR": config.by_tensor(rank), "PLANES": planes, "WIDEN": widen,
                "BLOCK_T": min(64, split.tokens), "BLOCK_R": split.columns, "BLOCK_C": split.channels, "BLOCK": 512,
            },
            num_stages=1 if tokens <= 64 else 3,
        )  # fmt: skip
        self.scratch = Scratch(
            (planes * self.width, kind),
            (split.parts * self.width, torch.float32),
            (state.exp_avg.numel(), torch.float32),
            (self.count, torch.float32),
            (3 * self.programs, torch.float32),
            (3, torch.float32),
            (1, torch.int32),
        )
        self.write: _Launch | None = None

    def run(
        self, weight: Tensor, x: Tensor, d: Tensor, state: ApolloState, lr: float, seed: int
    ) -> UpdateResult:
        if self.write is not None:
            return self._run(weight, x, d, state, lr, seed)
        with _first:
            return self._run(weight, x, d, state, lr, seed)

    def _run(
        self, weight: Tensor, x: Tensor, d: Tensor, state: ApolloState, lr: float, seed: int
    ) -> UpdateResult:
        tokens, rank, split, config, device = len(x), state.rank, self.split, self.config, weight.device
        y, z = (x, d) if self.by_row else (d, x)
        key0, key1 = (_signed(word) for word in state.key)
        mean, square = state.exp_avg, state.exp_avg_sq
        stream, width = stream_of(weight), self.width

        _memory, parts_of_it = self.scratch.take(device, as_tensors=self.write is None or stream is None)
        small, parts, r, scale, sums, scalars, finished = parts_of_it
        numbers = torch.empty(2, device=device)
        calls = (
            (self.project, self.project_grid, (
                y, *self.y_strides, parts, state.counts, self.gap, key0, key1, self.table, self.gain, finished,
                tokens, self.size, rank, split.chunk,
            )),
            (self.collect, self.collect_grid, (parts, small, width, split.parts)),
            (self.channels, (self.programs, 1, 1), (
                small, z, *self.z_strides, r, mean, square, *((1, rank) if self.by_row else (self.count, 1)),
                scale, sums, finished, state.norm, state.counts, scalars, numbers,
                tokens, self.count, rank, *self.moments, config.eps, lr, self.root_alpha, *self.logs,
                config.gamma, config.limiter_floor, config.weight_decay,
            )),
        )  # fmt: skip
        if self.write is None and stream is not None:
            compile_together(calls)
        for kernel, grid, arguments in calls:
            kernel(grid, stream, *arguments)
        work = _Write(
            weight, x, d, scale, scalars, state.counts, (key0, key1, _signed(seed)), (r, mean, square), self.moments,
            self.by_row, config.rounding == "stochastic",
        )  # fmt: skip
        if self.write is None:
            write = work.launch_with(_fastest(work))
            write.start(work, stream)
            self.write = write  # now that it is compiled: whoever sees it goes on without the lock, from bare addresses
        else:
            self.write.start(work, stream)
        return UpdateResult.on_device(numbers)


def adam_step(
    weight: Tensor, gradient: Tensor, state: AdamState, config: AdamConfig, *, lr: float, seed: int = 0
) -> UpdateResult:
    """See `reference.adam_step`: one program of one kernel, for these tensors are tiny."""
    place, device = weight.contiguous(), weight.device
    numbers = torch.empty(2, device=device)
    b1, b2 = config.betas
    key0, key1 = (_signed(word) for word in state.key)
    gradient, stochastic = gradient.contiguous(), config.rounding == "stochastic"
    kind = device, place.dtype, gradient.dtype, place.numel(), aligned(place, gradient), stochastic
    kernel = _adams.get(kind)
    if kernel is None:
        kernel = _adams[kind] = Prepared(elementwise.adam, {"STOCHASTIC": stochastic, "BLOCK": 1024})
    kernel(
        (1, 1, 1), stream_of(weight),
        place, gradient, state.exp_avg, state.exp_avg_sq, state.counts, numbers,
        key0, key1, _signed(seed), place.numel(), lr, b1, 1 - b1, b2, 1 - b2, _log(b1), _log(b2),
        config.eps, config.weight_decay,
    )  # fmt: skip
    if place is not weight:
        weight.copy_(place)
    return UpdateResult.on_device(numbers)


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
    block = min(128 if tokens < 1024 else 256, max(16, _power_of_2(tokens)))
    columns = min(64, max(16, _power_of_2(rank)))
    tiles = _cdiv(tokens, block) * (_cdiv(rank, columns) + _cdiv(tokens, columns))
    parts = max(1, min(_PROGRAMS // tiles, _cdiv(size, _BLOCK_K)))
    chunk = _cdiv(_cdiv(size, parts), _BLOCK_K) * _BLOCK_K
    return _Split(block, columns, 64 if count >= _MANY else 32, chunk, _cdiv(size, chunk))


@dataclass(slots=True)
class _Write:
    """What `write` is given, but for its blocks. (Scratch is a tensor, or an address.)"""

    weight: Tensor  # (m, n)
    x: Tensor  # (T, n)
    d: Tensor  # (T, m)
    scale: Any  # (max(m, n),)
    scalars: Any  # (3,) from `channels`
    counts: Tensor
    key: tuple[int, int, int]
    state: tuple[Any, Tensor, Tensor]  # R, M, V
    betas: tuple[float, float, float, float]
    by_row: bool
    stochastic: bool

    def launch_with(self, blocks: Blocks) -> _Launch:
        """How it is launched with these blocks."""
        m, n = self.weight.shape
        block_m, block_n, block_t, warps, stages, run, fetch = blocks
        run = max(1, min(run, _cdiv(m, block_m)))
        block_t = min(block_t, max(16, _power_of_2(len(self.x))))
        constants = {
            "BY_ROW": self.by_row, "STOCHASTIC": self.stochastic, "EVEN": m % block_m == 0 and n % block_n == 0,
            "WHOLE": len(self.x) <= block_t, "WIDEN": not self.weight.is_cuda,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_T": block_t, "FETCH": fetch,
        }  # fmt: skip
        prepared = Prepared(kernels.write, constants, num_warps=warps, num_stages=stages)
        return _Launch((_cdiv(n, block_n), _cdiv(_cdiv(m, block_m), run), 1), run, prepared)

    def arguments(self, run: int) -> tuple[Any, ...]:
        (m, n), w, x, d = self.weight.shape, self.weight, self.x, self.d
        return (
            w, *w.stride(), x, *x.stride(), d, *d.stride(), self.scale, self.scalars, self.counts, *self.key,
            *self.state, self.state[1].numel(), *self.betas, m, n, _cdiv(n, 2), len(x), run,
        )  # fmt: skip

    def on_scratch(self) -> _Write:
        """The same on private rows, for timing."""
        rows = min(len(self.weight), max(1, TUNING_BYTES // self.weight[:1].nbytes))
        nothing = self.scale.new_empty(0)
        return replace(
            self,
            weight=torch.empty_like(self.weight[:rows]).normal_(),
            d=self.d[:, :rows],
            scale=self.scale[:rows] if self.by_row else self.scale,
            scalars=torch.tensor([0.0, 1.0, 1.0], device=self.weight.device),
            state=(nothing, nothing, nothing),
        )


@dataclass(frozen=True, slots=True)
class _Launch:
    """`write` with one choice of blocks, `run` tiles for each program."""

    grid: Grid
    run: int
    kernel: Prepared

    def start(self, work: _Write, stream: int | None) -> None:
        self.kernel(self.grid, stream, *work.arguments(self.run))


def _fastest(work: _Write) -> Blocks:
    """Of the candidates for this kind of shape; found by timing the first time, which waits for the device, unlike a
    step."""
    w, x = work.weight, work.x
    kind = (w.dtype, x.dtype, w.shape[1], _power_of_2(len(x)), w.stride(1) == 1, work.by_row)
    if kind not in _tuned:
        _tuned[kind] = _tune(work) if w.is_cuda else CANDIDATES[0]
    return _tuned[kind]


def _tune(work: _Write) -> Blocks:
    scratch = work.on_scratch()
    stream = stream_of(scratch.weight)
    launches = {candidate: scratch.launch_with(candidate) for candidate in CANDIDATES}
    compile_together([(one.kernel, one.grid, scratch.arguments(one.run)) for one in launches.values()])

    flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device=scratch.weight.device)

    def milliseconds(candidate: Blocks) -> float:
        times = []
        try:
            for _ in range(_TIMED):
                flush.zero_()  # so that it reads the weight from memory, as in a step
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                launches[candidate].start(scratch, stream)
                end.record()
                times.append((begin, end))
        except triton.OutOfResources:  # of a GPU with less shared memory
            return math.inf
        torch.cuda.current_stream().synchronize()
        return float(statistics.median(begin.elapsed_time(end) for begin, end in times))

    return min(CANDIDATES, key=milliseconds)


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
