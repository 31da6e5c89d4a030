"""What one update costs, on CPU, for the layers of a 1B-class model (Llama-3.2-1B), with bf16 weights.

    python benchmarks/update.py                 the table: ratios for one transformer layer (7 linear weights)
    python benchmarks/update.py --per-shape     the same for every shape
    python benchmarks/update.py --threads 2     that many trainer threads against one, on different layers and on
                                                the same ones (wall clock)

Everything after X and D are known is timed, against
    (a) the gradient product and a published-style eager APOLLO step (bf16 state, as the published code
    keeps it)
    (b) the gradient product and torch.optim.AdamW(fused=True)
    form: the better of our two forms, each forced
    floor: the larger of bytes that must move (read and write W, read X and D) over this machine's copy
    rate, and the
           multiply-adds that must be done (T m n in bf16) over its matmul rate, both measured in the same run
Each answer is checked against the reference first, and nothing is timed if one is wrong. Times are CPU
seconds of one thread (best of several, methods interleaved), so that other work on the machine counts as
little as possible.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hogwild_kernels import ApolloConfig, ApolloState, apollo_update, plan, reference
from hogwild_kernels.products import multiplies, tiles
from update_methods import EagerApollo, eager_apollo, floor_s, fused_adamw

LAYER = {
    "q, o": (2048, 2048, 2),
    "k, v": (512, 2048, 2),
    "gate, up": (8192, 2048, 2),
    "down": (2048, 8192, 1),
}
"""(m, n, how many of them) per transformer layer."""
TOKENS = (16, 64, 256, 1024)
RANKS = (1, 64, 256)
COLUMNS = ("a", "b", "ours", "factored", "plain", "floor")
_DEADLOCK_S = 300.0


def check() -> None:
    """Stops the run unless ours and (a) both give the reference's answer, for every shape, form and rank."""
    for m, n, _ in LAYER.values():
        for rank in RANKS:
            x, d = torch.randn(24, n), torch.randn(24, m)
            start = torch.randn(m, n) * 0.02
            truth, eager = start.clone(), start.clone()
            reference.factored_step(
                truth, x, d, ApolloState("layer", (m, n), ApolloConfig(rank=rank, lr=1e-3))
            )
            published = EagerApollo(eager, rank, 1e-3)
            published.p = ApolloState("layer", (m, n), ApolloConfig(rank=rank)).projection()
            published.step(d.t() @ x)
            answers = {"(a)": eager}
            for form in ("factored", "plain"):
                config = ApolloConfig(rank=rank, lr=1e-3, form=form)  # type: ignore[arg-type]
                answers[form] = start.clone()
                apollo_update(answers[form], x, d, ApolloState("layer", (m, n), config))
            for name, answer in answers.items():
                error = float((answer - truth).norm() / (truth - start).norm())
                if not error < 1e-4:  # 1e-5 of the weight; the change alone is a stricter measure
                    sys.exit(
                        f"wrong answer from {name} at {m}x{n} rank {rank}: off by {error:.1e} of the change"
                    )


def best(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, the best of several repeats after one warm-up, each in another order: what ran just before
    leaves its traces in caches and free memory."""
    found, order = dict.fromkeys(runs, math.inf), random.Random(0)
    for repeat in range(repeats + 1):
        for name in order.sample(list(runs), len(runs)):
            start = time.thread_time()
            runs[name]()
            if repeat:
                found[name] = min(found[name], time.thread_time() - start)
    return found


def machine() -> tuple[float, float]:
    """(bytes/s of a plain bf16 copy, bf16 multiply-adds/s of a large matmul) of one thread."""
    a, b = torch.empty(1 << 25, dtype=torch.bfloat16), torch.empty(1 << 25, dtype=torch.bfloat16)
    k = torch.randn(2048, 2048).to(torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32)
    out = torch.empty_like(k)
    seconds = best({"copy": lambda: b.copy_(a), "matmul": lambda: torch.mm(k, k, out=out)}, 5)
    return 4 * a.numel() / seconds["copy"], 2048**3 / seconds["matmul"]


def measure(
    m: int, n: int, tokens: int, rank: int, rates: tuple[float, float], repeats: int
) -> dict[str, float]:
    x, d = torch.randn(tokens, n).bfloat16(), torch.randn(tokens, m).bfloat16()
    start = (torch.randn(m, n) * 0.02).bfloat16()

    def ours(form: str) -> Callable[[], object]:
        state = ApolloState("layer", (m, n), ApolloConfig(rank=rank, form=form))  # type: ignore[arg-type]
        weight = start.clone()
        return lambda: apollo_update(weight, x, d, state)

    runs = {"a": eager_apollo(start.clone(), x, d, rank), "b": fused_adamw(start.clone(), x, d)}
    runs["ours"] = ours("auto")
    runs |= {form: ours(form) for form in ("factored", "plain")}
    seconds = best(runs, repeats)
    seconds["floor"] = floor_s(m, n, tokens, rates)
    seconds["memory"] = largest_allocation(runs["ours"]) / (2 * m * n)
    return seconds


class Allocations(TorchDispatchMode):
    """Notes the largest new storage that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest allocation of one run, the thread's own tile aside."""
    with Allocations() as seen:
        run()
    return seen.largest


def chosen(m: int, n: int, tokens: int, rank: int) -> str:
    """The form that the cost model takes for bf16 factors."""
    low_cost = plan.AMX if tiles() else plan.AVX512_BF16
    return plan.choose("auto", m, n, tokens, rank, multiplies(torch.bfloat16), low_cost).form


def row(name: str, tokens: int, rank: int, s: dict[str, float], form: str) -> None:
    better = min(s["factored"], s["plain"])
    cells = (
        name,
        tokens,
        rank,
        f"{1000 * s['ours']:.1f}",
        f"{s['a'] / s['ours']:.1f}x",
        f"{s['b'] / s['ours']:.2f}x",
    )
    rest = (f"{s['ours'] / better:.2f}", f"{s['ours'] / s['floor']:.1f}", f"{s['memory']:.2f}", form)
    print("|", " | ".join(map(str, cells + rest)), "|", flush=True)


def table(per_shape: bool, repeats: int) -> None:
    rates = machine()
    print(f"one thread: copy {rates[0] / 1e9:.1f} GB/s, matmul {rates[1] / 1e9:.0f} G multiply-adds/s")
    print("| shape | T | r | ours, ms | (a) / ours | (b) / ours | ours / better form | ours / floor "
          "| largest allocation / weight | form |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for tokens in TOKENS:
        for rank in RANKS:
            total, forms = dict.fromkeys((*COLUMNS, "memory"), 0.0), set()
            better = 0.0
            for m, n, count in LAYER.values():
                seconds = measure(m, n, tokens, rank, rates, repeats)
                form = chosen(m, n, tokens, rank)
                forms.add(form)
                if per_shape:
                    row(f"{m}x{n}", tokens, rank, seconds, form)
                for column in COLUMNS:
                    total[column] += count * seconds[column]
                better += count * min(seconds["factored"], seconds["plain"])
                total["memory"] = max(total["memory"], seconds["memory"])
            total["factored"] = total["plain"] = better
            row("layer", tokens, rank, total, " and ".join(sorted(forms)))


Part = tuple[Tensor, Tensor, Tensor, ApolloState]
"""Weight (m, n), X (T, n), D (T, m) and state: what `apollo_update` takes."""


def parts(shapes: list[tuple[int, int]], tokens: int, rank: int, dtype: torch.dtype) -> list[Part]:
    """A weight of zeros, and something to update it with, for every shape. The same whenever it is asked for."""
    torch.manual_seed(0)
    config, found = ApolloConfig(rank=rank), list[Part]()
    for number, (m, n) in enumerate(shapes):
        x, d = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)
        state = ApolloState(f"layer.{number}", (m, n), config)
        found.append((torch.zeros(m, n, dtype=dtype), x, d, state))
    return found


def race(work: list[list[Part]], rounds: int) -> float:
    """Seconds in which a thread for each list updates every weight of it so many times, after one that is not timed."""
    ready = threading.Barrier(len(work) + 1)
    left: list[BaseException] = []

    def run(mine: list[Part], seed: int) -> None:
        try:
            torch.set_num_threads(1)
            for number in range(rounds + 1):
                if number == 1:
                    ready.wait(_DEADLOCK_S)
                for part in mine:
                    apollo_update(*part, seed=seed)
        except BaseException as error:
            left.append(error)
            ready.abort()

    threads = [threading.Thread(target=run, args=(mine, i), daemon=True) for i, mine in enumerate(work)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # what broke it is said below
        ready.wait(_DEADLOCK_S)
    start = time.perf_counter()
    for thread in threads:
        thread.join(_DEADLOCK_S)
    seconds = time.perf_counter() - start
    if left or any(thread.is_alive() for thread in threads):
        sys.exit(f"threads failed: {left[0]!r}" if left else f"a thread has not ended after {_DEADLOCK_S} s")
    return seconds


def check_threads(threads: int) -> None:
    """Stops the run unless threads on weights of their own leave the bits that one after the other leaves, and threads
    on the same weights move them where one thread does: no farther than all their updates go, and at least half as
    far as those of one of them (others may be lost)."""
    shapes, rounds = [(512, 2048), (2048, 512)], 8
    own = [parts(shapes, 16, 64, torch.bfloat16) for _ in range(threads)]
    race(own, rounds)
    for seed, mine in enumerate(own):
        alone = parts(shapes, 16, 64, torch.bfloat16)
        for _ in range(rounds + 1):
            for part in alone:
                apollo_update(*part, seed=seed)
        if any(not torch.equal(a[0], b[0]) for a, b in zip(mine, alone, strict=True)):
            sys.exit(
                f"wrong answer: thread {seed} of {threads} on weights of its own is not what it is alone"
            )
    shared, alone = (parts(shapes, 16, 64, torch.float32) for _ in range(2))
    race([shared] * threads, rounds)
    race([alone], (rounds + 1) * threads - 1)
    for (moved, *_), (wanted, *_) in zip(shared, alone, strict=True):
        along = float((moved * wanted).sum() / wanted.square().sum())
        aside = float((moved - along * wanted).norm() / wanted.norm())
        if not (0.5 / threads < along < 1.1 and aside < 0.1):
            sys.exit(
                f"wrong answer: {threads} threads on one weight moved it {along:.2f} of the way, {aside:.2f} aside"
            )


def scaling(threads: int, rounds: int = 6, repeats: int = 5) -> None:
    """Updates per second of several trainer threads over those of one, the best of interleaved repeats."""
    check_threads(threads)
    shapes = [(m, n) for m, n, _ in LAYER.values()]
    print(
        f"wall clock, {os.cpu_count()} cores, {threads} threads of one core each, weights of {len(shapes)} shapes"
    )
    print("| T | r | one thread, updates/s | different layers | the same layers |\n|---|---|---|---|---|")
    for tokens in (16, 64, 256):
        for rank in (1, 64):

            def fresh(tokens: int = tokens, rank: int = rank) -> list[Part]:
                return parts(shapes, tokens, rank, torch.bfloat16)

            runs = {
                "one": [fresh()],
                "different": [fresh() for _ in range(threads)],
                "same": [fresh()] * threads,
            }
            rate = dict.fromkeys(runs, 0.0)
            for _ in range(repeats):
                for name, work in runs.items():
                    rate[name] = max(rate[name], len(work) * rounds * len(shapes) / race(work, rounds))
            ratios = " | ".join(f"{rate[name] / rate['one']:.2f}x" for name in ("different", "same"))
            print(f"| {tokens} | {rank} | {rate['one']:.0f} | {ratios} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-shape", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        check()
        if arguments.threads:
            scaling(arguments.threads)
        else:
            table(arguments.per_shape, arguments.repeats)


if __name__ == "__main__":
    main()
