"""Section 3: the update kernels. Each answer is held against the reference in fp64 before anything is timed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import gpu_models
from gpu_bench import Bench
from gpu_report import Row
from gpu_timing import Clock
from hogwild_kernels import ApolloConfig, ApolloState, apollo_update
from update_methods import SEED, against_fp64, eager_apollo, floor_s, fused_adamw, moved

TOKENS, RANKS = (16, 64, 256, 1024), (1, 64, 256)
AIM, AIM_TOKENS = 0.85, 256
_NAME = "layer"
_ORDER = ((64, 64), (16, 64), (256, 64), (1024, 64))  # (T, r): what matters most, first; then the others
_SAFETY = 1.5


@dataclass
class Times:
    """Seconds of one update; of a whole layer, summed."""

    device: float = 0.0
    called: float = 0.0
    eager: float = 0.0
    adamw: float = 0.0
    adamw_device: float = 0.0
    floor: float = 0.0

    def add(self, other: Times, count: int) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + count * value)


def run(bench: Bench) -> None:
    wanted = list(_ORDER) + [(t, r) for t in TOKENS for r in RANKS if (t, r) not in _ORDER]
    if bench.tiny:
        wanted = [(64, 8), (16, 1)]
    clock, shares, left = Clock(bench.device), list[tuple[float, str]](), list[str]()
    recent, worst, checked = deque[float](maxlen=3), 0.0, 0
    for tokens, rank in wanted:
        for name in gpu_models.NAMES:
            label, began = f"{name} T={tokens} r={rank}", bench.left_s()
            if began < _SAFETY * max(recent, default=0.0):
                left.append(label)
                continue
            share, differ, number = _layer(bench, clock, name, tokens, rank)
            recent.append(
                began - bench.left_s()
            )  # the first few have kernels compiled, and say little of the others
            worst, checked = max(worst, differ), checked + number
            if tokens <= AIM_TOKENS:
                shares.append((share, label))
    if left:
        bench.out.leave_out(f"no time was left for {', '.join(left)}")
    bench.out.check(
        f"each of {checked} updates was the reference's in fp64, before it was timed",
        checked > 0,
        f"at most {worst:.2%} of the elements of one were rounded to the other neighbour",
    )
    low, where = min(shares)
    bench.out.aim(
        f"an update runs at {AIM:.0%} of its floor or better at T <= {AIM_TOKENS}",
        low >= AIM,
        f"{sum(share >= AIM for share, _ in shares)} of {len(shares)} do; least: {low:.0%}, {where}",
    )


def _layer(bench: Bench, clock: Clock, name: str, tokens: int, rank: int) -> tuple[float, float, int]:
    """Check and time every linear weight of a layer: (share of the floor, as `check`, how many were checked)."""
    linears = gpu_models.sizes(gpu_models.folder_of(name, bench.tiny, bench.folder)).linears
    total, worst, rows = Times(), 0.0, list[Row]()
    for (m, n), count in linears.items():
        torch.manual_seed(m + n + tokens)
        x, d = (torch.randn(tokens, k, device=bench.device).to(torch.bfloat16) for k in (n, m))
        weight = (torch.randn(m, n, device=bench.device) * 0.02).to(torch.bfloat16)
        worst = max(worst, check(bench, weight, x, d, rank))
        times = measure(bench, clock, weight, x, d, rank)
        total.add(times, count)
        rows.append(_row(f"{m}x{n}", tokens, rank, times, moved(m, n, tokens), m * n))
    nbytes = sum(moved(m, n, tokens) * count for (m, n), count in linears.items())
    elements = sum(m * n * count for (m, n), count in linears.items())
    bench.out.row("All linear weights of one layer", **_row(name, tokens, rank, total, nbytes, elements))
    for row in rows:
        bench.out.row("Each weight", **row)
    return total.floor / total.device, worst, len(linears)


def check(bench: Bench, weight: Tensor, x: Tensor, d: Tensor, rank: int) -> float:
    """See that this update is right, on a copy; the share of elements whose bits differ from the reference's."""
    (m, n), config = weight.shape, ApolloConfig(rank=rank, lr=1e-3, weight_decay=0.01)
    state = ApolloState(_NAME, (m, n), config, bench.device)
    if not bench.cuda:  # a CPU that multiplies bf16 rounds products to it, as cpu.py says
        x, d = x.float(), d.float()
    problem, differ = against_fp64(partial(apollo_update, state=state, seed=SEED), weight, x, d, state)
    if problem:  # what is right is said once, for all
        bench.out.check(f"the update of {m}x{n} at T={len(x)}, r={rank} is the reference's", False, problem)
    return differ


def measure(bench: Bench, clock: Clock, weight: Tensor, x: Tensor, d: Tensor, rank: int) -> Times:
    (m, n), repeats = weight.shape, 3 if bench.tiny else 10
    state = ApolloState(_NAME, (m, n), ApolloConfig(rank=rank), bench.device)

    def ours() -> object:
        return apollo_update(weight, x, d, state)

    called = clock.as_called(ours, repeats)
    device = clock.on_device(_captured(bench, clock, ours), repeats)
    eager = clock.as_called(eager_apollo(weight.clone(), x, d, rank), repeats)
    fused = fused_adamw(weight.clone(), x, d)
    with torch.no_grad():
        adamw = clock.as_called(fused, repeats)
        adamw_device = clock.on_device(fused, repeats)
    return Times(device, called, eager, adamw, adamw_device, floor_s(m, n, len(x), bench.rates))


def _captured(bench: Bench, clock: Clock, run: Callable[[], object]) -> Callable[[], object]:
    try:
        return clock.captured(run)
    except RuntimeError as error:
        bench.out.leave_out(
            f"an update as a CUDA graph: {error}; times of the device include the host's part"
        )
        return run


def _row(name: str, tokens: int, rank: int, t: Times, nbytes: int, elements: int) -> Row:
    return {
        "weight": name,
        "T": tokens,
        "r": rank,
        "device, ms": 1000 * t.device,
        "floor, ms": 1000 * t.floor,
        "share of floor": t.floor / t.device,
        "GB/s": nbytes / t.device / 1e9,
        "TFLOP/s": 2 * tokens * elements / t.device / 1e12,
        "as called, ms": 1000 * t.called,
        "(a) / ours": t.eager / t.called,
        "(b) / ours": t.adamw / t.called,
        "(b) / ours, device": t.adamw_device / t.device,
    }
