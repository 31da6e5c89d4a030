"""What history costs: sizes and times of differences against full copies, and the training rate while a checkpoint is
written.

    make bench-history        both parts, on SmolLM2-135M trained by the real trainer

Part 1 saves a generation after so many steps, at several learning rates, and restores every one of them; nothing is
reported before every restored file has the hash of the one that was saved. Part 2 alternates windows of training
in which a checkpoint is always under way (saved, compressed, pruned, and at once the next one) with windows without,
in one run, and reports the ratio of their rates: what training loses while a checkpoint runs.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hogwild import config as configuration
from hogwild import demo_model, examples, generation, skeleton
from hogwild.apollo import Optimizer
from hogwild.files import fsync, hash_file
from hogwild.keeper import SAVING, TIDYING, Keeper
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena

WORDS = [f"{a}{b}" for a in ("stone", "river", "bell", "salt", "oak") for b in ("gate", "man", "field")]


class Run:
    """The model in memory, trained by `threads` trainers, and what is kept of it."""

    def __init__(self, model: Path, state: Path, lr: float, threads: int) -> None:
        settings = {"state_dir": str(state), "optimizer.lr": lr, "training.threads": threads,
                    "checkpoint.keep": 1, "history.base_every": 8}  # fmt: skip
        self.config = configuration.load(None, settings)
        self.model, self.keeper = model, Keeper(self.config)
        arena = load_arena(model)
        self.weights, self.progress = (
            Weights(arena),
            Progress(arena.control, self.config.training.epoch_updates),
        )
        self.optimizer = Optimizer(self.config.optimizer, self.config.training.seed)
        self.trainers = [
            Trainer(
                skeleton.build(model, self.weights), self.optimizer, self.progress, set(self.weights.names),
                "frozen", seed=index,
            )
            for index in range(threads)
        ]  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.chance = random.Random(1)
        torch.set_num_threads(1)

    def example(self) -> Item:
        question, answer = (" ".join(self.chance.choices(WORDS, k=count)) for count in (8, 10))
        messages = [{"role": "user", "content": f"{question}?"}, {"role": "assistant", "content": answer}]
        line = json.dumps({"messages": messages}).encode()
        return Item(examples.encode(examples.parse_line(line), self.tokenizer, max_tokens=512)[0])

    def save(self) -> Path:
        state = {"step": self.progress.steps, "epoch": self.progress.epoch, "ledger_position": 0,
                 "base_path": str(self.model), "base_digest": None}  # fmt: skip
        return self.keeper.checkpoints.save(self.weights, self.model, self.optimizer.tensors(), state)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def sizes(model: Path, lr: float, spacings: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row a spacing: means over `repeats` generations that many steps apart, each verified."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-history-") as place:
        run = Run(model, Path(place) / "state", lr, threads=1)
        rows, saved = [], {}
        for spacing in spacings:
            measured: dict[str, list[float]] = {
                name: [] for name in ("bytes", "full", "save", "record", "copy")
            }
            numbers = []
            for _ in range(repeats):
                for _ in range(spacing):
                    run.trainers[0].step([run.example()])
                began = time.perf_counter()
                folder = run.save()
                measured["save"].append(time.perf_counter() - began)
                number = generation.number(folder) or 0
                saved[number] = files(folder)
                (recorded,) = run.keeper.history.record()
                index = json.loads((run.keeper.history.root / folder.name / "index.json").read_bytes())
                deltas = sum(sum(item["delta"][1]) for item in index["tensors"].values() if "delta" in item)
                measured["bytes"].append(deltas)
                measured["full"].append(recorded.full_bytes)
                measured["record"].append(recorded.seconds)
                weights = sum(
                    sum(item["delta"][1]) for item in index["tensors"].values() if item["coding"] == "xor"
                )
                measured.setdefault("weights", []).append(weights)
                measured.setdefault("moments", []).append(deltas - weights)
                measured["copy"].append(copy(folder, Path(place) / "copy"))
                numbers.append(number)
                run.keeper.checkpoints.prune(run.keeper.history.may_go)
            rows.append(
                {
                    "lr": lr,
                    "steps": spacing,
                    "generations": numbers,
                    **{k: statistics.fmean(v) for k, v in measured.items()},
                }
            )
        newest = max(saved)
        restores = {}
        for number, expected in saved.items():
            target = Path(place) / "restored"
            began = time.perf_counter()
            run.keeper.history.export(number, target)
            restores[number] = time.perf_counter() - began
            assert files(target) == expected, f"generation {number} is not what was saved"
            shutil.rmtree(target)
        for row in rows:
            row["restore"] = statistics.fmean(
                restores[n] for n in row["generations"] if n != newest or len(saved) == 1
            )
        run.keeper.close()
        return rows


def copy(source: Path, target: Path) -> float:
    """Seconds for a plain, durable copy of a complete folder: what a full save of it costs at least."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        fsync(path)
    took = time.perf_counter() - began
    shutil.rmtree(target)
    return took


def rate(model: Path, threads: int, windows: int, window_s: float) -> dict[str, Any]:
    """Steps a second with checkpoints under way, over steps a second without: windows take turns in one run."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-history-") as place:
        run = Run(model, Path(place) / "state", 1e-5, threads)
        pool = [run.example() for _ in range(16)]
        stop = threading.Event()

        def train(index: int) -> None:
            turn = index
            while not stop.is_set():
                run.trainers[index].step([pool[turn % len(pool)]])
                turn += threads

        workers = [threading.Thread(target=train, args=(index,), daemon=True) for index in range(threads)]
        for worker in workers:
            worker.start()
        while run.progress.steps < 4 * threads:
            time.sleep(0.05)
        costs: list[float] = []

        def window(saving: bool) -> float:
            began, steps = time.perf_counter(), run.progress.steps
            while saving and time.perf_counter() - began < window_s:
                start = time.perf_counter()
                run.keeper.background(run.save, SAVING).result()
                costs.append(time.perf_counter() - start)
                run.keeper.background(run.keeper.tidy, TIDYING).result()
            time.sleep(max(window_s - (time.perf_counter() - began), 0.0))
            return (run.progress.steps - steps) / (time.perf_counter() - began)

        pairs = []
        for number in range(windows):
            first, second = (True, False) if number % 2 else (False, True)
            rates = {first: window(first), second: window(second)}
            pairs.append((rates[True], rates[False]))
        stop.set()
        for worker in workers:
            worker.join()
        ratios = [with_ / without for with_, without in pairs]
        run.keeper.close()
        return {
            "ratio": statistics.fmean(p[0] for p in pairs) / statistics.fmean(p[1] for p in pairs),
            "ratios": ratios, "saves": len(costs), "save_s": statistics.fmean(costs), "threads": threads,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("sizes", "rate", "all"), nargs="?", default="all")
    parser.add_argument("--model", type=Path, default=Path(".demo/model"))
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5, 5e-5])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window-s", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = demo_model.build(arguments.model).resolve()
    print(f"{os.cpu_count()} CPUs; times depend on the machine, ratios less so")
    if arguments.part in ("sizes", "all"):
        print(
            "\n  lr      steps  full MiB  stored MiB  (weights  moments)  smaller  record/copy  restore/copy"
        )
        for lr in arguments.lr:
            for row in sizes(model, lr, arguments.steps, arguments.repeats):
                full, stored = row["full"] / 2**20, row["bytes"] / 2**20
                print(
                    f"  {row['lr']:<7.0e} {row['steps']:>5}  {full:>8.1f}  {stored:>10.1f}  "
                    f"({row['weights'] / 2**20:>7.1f}  {row['moments'] / 2**20:>7.1f})  {full / stored:>6.1f}x  "
                    f"{row['record'] / row['copy']:>11.2f}  {row['restore'] / row['copy']:>12.2f}",
                    flush=True,
                )
        print("  every generation was restored and is bit-identical to what was saved")
    if arguments.part in ("rate", "all"):
        found = rate(model, arguments.threads, arguments.windows, arguments.window_s)
        print(
            f"\n  training rate with checkpoints under way, over without: {found['ratio']:.3f} "
            f"({found['saves']} checkpoints, {found['threads']} trainer threads; each took {found['save_s']:.1f} s "
            f"to be durable)\n"
            f"  pairs of windows: {', '.join(f'{ratio:.3f}' for ratio in found['ratios'])}"
        )


if __name__ == "__main__":
    main()
