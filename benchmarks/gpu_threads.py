"""Section 6: one, two and four trainer threads on the same weights and the same examples."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import torch

import gpu_models
from gpu_bench import Bench
from gpu_step import optimizer_of, trainer_of
from hogwild.arena.client import Arena
from hogwild.trainer import Item, Progress, Trainer

MODEL, THREADS = "Llama 1B", (1, 2, 4)
_EXAMPLES, _PASSES, _TOKENS = 16, 3, 64
_PATIENCE_S = 60.0


def run(bench: Bench) -> None:
    folder = gpu_models.folder_of(MODEL, bench.tiny, bench.folder)
    sizes = gpu_models.sizes(folder)
    free = bench.free()
    if free is not None and free < 2 * sizes.nbytes + (4 << 30):
        bench.out.leave_out(f"{MODEL} does not fit: {free / 2**30:.0f} GiB are free")
        return
    arena = gpu_models.make_arena(folder, bench.device)
    vocabulary = gpu_models.config_of(MODEL, bench.tiny).vocab_size
    tokens = 8 if bench.tiny else _TOKENS
    items = [Item(gpu_models.example(vocabulary, 1, tokens, seed)) for seed in range(_EXAMPLES)]
    optimizer, progress = optimizer_of(arena, bench.tiny), Progress(arena.control, 8)
    trainer_of(folder, arena, optimizer, progress).step([items[0]])  # finds the fastest kernels
    alone = 0.0
    for threads in THREADS:
        if bench.left_s() < 5:
            bench.out.leave_out(f"{threads} thread{'s' * (threads > 1)}: no time was left")
            continue
        alone = _measure(bench, folder, arena, items, threads, alone)


def _measure(
    bench: Bench, folder: Path, arena: Arena, items: list[Item], threads: int, alone: float
) -> float:
    """Updates/s of so many threads."""
    passes = 1 if bench.tiny else _PASSES
    gpu_models.fill(arena, seed=0)
    optimizer, progress = optimizer_of(arena, bench.tiny), Progress(arena.control, 8)
    trainers = [trainer_of(folder, arena, optimizer, progress, seed) for seed in range(threads)]
    before = _mean_loss(trainers[0], items)
    updates, seconds = _train(trainers, items * passes)
    after = _mean_loss(trainers[0], items)
    rate = updates / seconds
    bench.out.row(
        f"{MODEL}, {passes * len(items)} steps of one example of {len(items[0].encoded.ids)} tokens",
        threads=threads,
        **{
            "updates/s": rate,
            "times one thread": rate / (alone or rate),
            "steps/s": len(items) * passes / seconds,
            "loss before": before,
            "loss after": after,
        },
    )
    bench.out.check(
        f"with {threads} thread{'s' * (threads > 1)} the loss falls",
        after < before,
        f"{before:.3f} to {after:.3f}",
    )
    return alone or rate


def _mean_loss(trainer: Trainer, items: list[Item]) -> float:
    return sum(trainer.loss(item.encoded) for item in items) / len(items)


def _train(trainers: list[Trainer], items: list[Item]) -> tuple[int, float]:
    """(updates, seconds): every item once, by whichever thread is free."""
    work: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        work.put(item)
    updates, failures = [0] * len(trainers), list[BaseException]()

    def loop(number: int) -> None:
        torch.set_num_threads(1)
        try:
            while True:
                updates[number] += trainers[number].step([work.get_nowait()]).updates
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(number,), daemon=True) for number in range(len(trainers))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_S)
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    if any(thread.is_alive() for thread in threads):
        raise RuntimeError(f"a trainer thread has not ended within {_PATIENCE_S:.0f} s")
    return sum(updates), seconds
