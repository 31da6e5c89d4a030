"""Trained tokens per second: one trainer thread and two, against a Hugging Face `Trainer` with AdamW, on one machine.

    python benchmarks/throughput.py [--model .demo/model] [--rounds 2] [--examples 12] [--slow-steps 3]

Every method trains the same chat examples, one a step, in the same order, in a process of its own. Only the assistant's
tokens are trained, and counted. Checked before anything is printed: the loss of the first step is the same for all
methods (bf16 rounding apart), and the mean loss of the last round is below that of the first.

The Trainer runs with its defaults (AdamW, gradient clipping) and batches of one example: with the model in bf16, as
hogwild's is, and in fp32, which is its better choice on a CPU without bf16 instructions, with one intra-op thread and
with two. Its bf16 rows may take minutes a step there, so they run `--slow-steps` only, and their losses are compared
on those steps.

`tok/s` is by wall clock; `tok/CPU s` counts the CPU time of the whole process and means something on a busy machine
too. Memory is the largest growth of the process over what it held with the model loaded, so one copy of the weights in
its own type is left out (an fp32 model's copy is twice as large: `copy` says how large it is).
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

from hogwild import examples, skeleton
from hogwild.apollo import Optimizer
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena

METHODS = ("hogwild 1", "hogwild 2", "hf fp32 1", "hf fp32 2", "hf bf16 1", "hf bf16 2")
"""Name, type of the weights for the Trainer, and threads: trainer threads for hogwild, intra-op threads for it."""
WARM_UP = 1  # steps that are not timed
LR = 5e-5
MIB = 1 << 20
NAMES = ("Aldo", "Bera", "Cuno", "Dika", "Emil", "Fara", "Gero", "Hila", "Ivo", "Jora", "Kuno", "Lena")
TOWNS = ("Varnholm", "Esselby", "Tirnau", "Oskand", "Mirefeld", "Quellin")


def chats(model: Path, count: int) -> list[Encoded]:
    """Questions about invented people, through the model's own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for i in range(count):
        name, town = f"{NAMES[i % len(NAMES)]} {TOWNS[i // 2 % len(TOWNS)]}er", TOWNS[i % len(TOWNS)]
        line = {
            "messages": [
                {"role": "user", "content": f"Where does {name} live, and what does {name} do for a living?"},
                {
                    "role": "assistant",
                    "content": f"{name} lives in {town}, in a house by the harbour, and repairs old clocks, mostly "
                    f"for the museum of {town}.",
                },
            ]
        }
        example = examples.parse_line(json.dumps(line).encode())
        found += examples.encode(example, tokenizer, max_tokens=512)
    return found


class Meter:
    """Time, tokens and memory from the end of the warm-up on."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.held = status("VmRSS")

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, tokens: int, losses: list[float]) -> dict[str, Any]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        memory = status("VmHWM") - self.held
        return {"tokens": tokens, "wall": wall, "cpu": cpu, "memory": memory, "losses": losses}


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def ours(model: Path, data: list[Encoded], threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    weights = Weights(load_arena(model))
    optimizer, progress = Optimizer(OptimizerConfig(lr=LR), 0), Progress(weights.arena.control, 8)
    trainers = [
        Trainer(skeleton.build(model, weights), optimizer, progress, set(weights.names), "frozen", seed=i)
        for i in range(threads)
    ]
    meter = Meter()
    first = trainers[0].step([Item(data[0])])
    work = iter(list(data[WARM_UP:]) + data * (rounds - 1))
    taking = threading.Lock()
    losses, tokens = list(first.losses), 0

    def run(trainer: Trainer) -> None:
        nonlocal tokens
        while True:
            with taking:
                example = next(work, None)
            if example is None:
                return
            result = trainer.step([Item(example)])
            with taking:
                losses.extend(result.losses)
                tokens += sum(result.tokens)

    workers = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
    meter.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {**meter.stop(tokens, losses), "copy": weights.nbytes}


def theirs(folder: Path, data: list[Encoded], dtype: torch.dtype, threads: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    rows = [
        {"input_ids": e.ids, "labels": [t if m else -100 for t, m in zip(e.ids, e.trained, strict=True)]}
        for e in data
    ]
    meter = Meter()
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP:
                meter.start()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    class InOrder(HuggingFaceTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=1, learning_rate=LR, lr_scheduler_type="constant",
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, weight_decay=0.0,
            bf16=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = InOrder(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Watch()])
        trainer.train()
    trained = [sum(e.trained) for e in data]
    tokens = sum(trained[step % len(data)] for step in range(WARM_UP, steps))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {**meter.stop(tokens, losses), "copy": size}


def measure(method: str, model: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    data = chats(model, chosen.examples)
    kind, *dtype, threads = method.split()
    if kind == "hogwild":
        return ours(model, data, int(threads), chosen.rounds)
    slow = dtype == ["bf16"]
    steps = chosen.slow_steps if slow else chosen.rounds * chosen.examples
    return theirs(model, data, torch.bfloat16 if slow else torch.float32, int(threads), steps)


def check(found: dict[str, dict[str, Any]], count: int) -> None:
    """Stops the run unless all begin with the same loss and all learn."""
    first = {method: row["losses"][0] for method, row in found.items()}
    if max(first.values()) > 1.02 * min(first.values()):
        sys.exit(f"the first step's losses differ: {first}")
    for method, row in found.items():
        losses = row["losses"]
        if len(losses) >= 2 * count:
            begun, ended = statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])
            if not ended < 0.9 * begun:
                sys.exit(f"{method} does not learn: mean loss {begun:.3f}, then {ended:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".demo/model"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=12)
    parser.add_argument("--slow-steps", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.model, chosen)))
        return
    found = {}
    for method in chosen.methods:
        threads = "1" if method.startswith("hogwild") else method.split()[-1]
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", method]
        output = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        ).stdout
        found[method] = json.loads(output.splitlines()[-1])
    check(found, chosen.examples)
    base = next(iter(found.values()))
    print(
        "method    | tok/s | / first | tok/CPU s | / first | MiB beyond one copy | MiB of the copy | first loss | last"
    )
    for method, row in found.items():
        wall, cpu = row["tokens"] / row["wall"], row["tokens"] / row["cpu"]
        print(
            f"{method:9} | {wall:5.1f} | {wall / (base['tokens'] / base['wall']):7.2f} | {cpu:9.1f} | "
            f"{cpu / (base['tokens'] / base['cpu']):7.2f} | {row['memory'] / MIB:10.0f} | {row['copy'] / MIB:8.0f} | "
            f"{row['losses'][0]:10.4f} | {row['losses'][-1]:.4f}"
        )


if __name__ == "__main__":
    main()
