"""What frozen context costs, against gradients through the context: time and memory of one training step.

    python benchmarks/context.py [--model DIR] [--contexts 64 256 1024 2048 4096] [--tokens 64]

Each row is a text of so many tokens of context and `--tokens` trained ones, on a model with the shape of SmolLM2-135M
(or the one in DIR), weights in bf16. Checked before anything is timed: the frozen step's loss equals the full one's.
Memory is the growth of the resident set of a child process of its own during the step, after a step on a short text.
Times are CPU seconds of one thread, so that other work on the machine counts as little as possible. `forward`
is a forward pass without gradient over the context alone: what the frozen step may grow by.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hogwild import skeleton
from hogwild.apollo import Optimizer
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
REPEATS = 3
MIB = 1 << 20


def random_model(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def text(context: int, tokens: int) -> Encoded:
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(100, 40000, (context + tokens,), generator=generator).tolist()
    return Encoded(ids, [False] * context + [True] * tokens)


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def row(model: Path, context: int, tokens: int, kind: Literal["frozen", "full"]) -> dict[str, Any]:
    """In a process of its own: one row of the table, for one kind."""
    torch.set_num_threads(1)
    weights = Weights(load_arena(model))
    trainer = Trainer(
        skeleton.build(model, weights), Optimizer(OptimizerConfig(lr=1e-12, rounding="nearest"), 0),
        Progress(weights.arena.control, 8), set(weights.names), kind, seed=0, batch_tokens=512, activation_mib=1 << 20,
    )  # fmt: skip
    example = text(context, tokens)
    trainer.step([Item(text(8, tokens))])  # moments and scratch memory exist from here on; lr moves nothing
    gc.collect()
    malloc_trim()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    result, seconds = timed(lambda: trainer.step([Item(example)]))
    grown = status("VmHWM") - before
    forward = math.nan
    if kind == "frozen":
        work = [trainer._cut(0, Item(example), "frozen")]
        if not work[0].context:  # short enough to go through with the trained tokens
            work[0].context = example.ids[:context]
        forward = timed(lambda: trainer._read(work))[1]
    if context <= 512:
        seconds = min(seconds, *(timed(lambda: trainer.step([Item(example)]))[1] for _ in range(REPEATS)))
    return {"loss": result.losses[0], "seconds": seconds, "grown": grown, "forward": forward}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """(result, CPU seconds of this thread)"""
    began = time.thread_time()
    result = run()
    return result, time.thread_time() - began


def malloc_trim() -> None:
    """Gives freed memory back, so that what a step needs is seen as growth."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        print(json.dumps(row(chosen.model, int(chosen.row[0]), chosen.tokens, chosen.row[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model or random_model(Path(folder))
        print(
            f"{chosen.tokens} trained tokens after the context; CPU seconds of one thread, MiB beyond the weights"
        )
        print(
            "context | frozen s | full s | full / frozen | forward s | frozen MiB | full MiB | loss difference"
        )
        first: dict[str, Any] | None = None
        for context in chosen.contexts:
            found = {}
            for kind in ("frozen", "full"):
                command = [
                    sys.executable, __file__, "--model", str(model), "--tokens", str(chosen.tokens),
                    "--row", str(context), kind,
                ]  # fmt: skip
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[kind] = json.loads(output.splitlines()[-1])
            frozen, full = found["frozen"], found["full"]
            difference = abs(frozen["loss"] - full["loss"])
            if not difference < 2e-3 * full["loss"]:
                sys.exit(
                    f"context {context}: the frozen loss is {frozen['loss']}, the full one {full['loss']}"
                )
            first = first or frozen
            print(
                f"{context:7} | {frozen['seconds']:8.2f} | {full['seconds']:6.2f} | "
                f"{full['seconds'] / frozen['seconds']:13.2f} | {frozen['forward']:9.2f} | "
                f"{frozen['grown'] / MIB:10.0f} | {full['grown'] / MIB:8.0f} | {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
