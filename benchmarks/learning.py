"""Does it learn? Three tables, one command each; results and curves go to benchmarks/results/ and docs/.

    python benchmarks/learning.py scratch    (i)   APOLLO and APOLLO-Mini against AdamW, from scratch
    python benchmarks/learning.py rounding   (ii)  fine-tuning at 1e-5: stochastic rounding against nearest
    python benchmarks/learning.py threads    (iii) HOGWILD: 1, 2 and 4 threads on one stream, with staleness
    python benchmarks/learning.py tables     prints what has been measured and draws docs/learning-*.png

Finished runs are kept in the results file and not repeated; delete it to start over. One core, no GPU.
docs/learning.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import learning_tables
import learning_threads
from hogwild_kernels import ApolloConfig, ApolloState, apollo_update
from learning_model import Linear, Model, Text, load_text
from learning_setup import BATCH, EVERY, FINE_TUNING_STEPS, SHAPE, STEPS, schedule, validate

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PRETRAINED = RESULTS / "pretrained.pt"
"""The last APOLLO model of table (i), not kept in the repository."""
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
THREAD_SEEDS = (0, 1, 2, 3)
"""Of table (iii), whose differences are small."""
METHODS = {
    "AdamW": None,
    "APOLLO r=64": 64,
    "APOLLO-Mini": 1,
    "APOLLO-Mini, head by Adam": 1,
    "AdamW, fp32": None,
}
"""Rank of each. The embedding and the norms are Adam's in all; the published training code leaves Adam the head too."""
BF16 = ("AdamW", "APOLLO r=64", "APOLLO-Mini")
"""Those with bf16 activations. The others have fp32: they were run on a CPU without bf16 arithmetic, where a step in
bf16 takes twelve times as long."""


def apollo_hook(states: dict[str, ApolloState], rate: list[float]) -> Any:
    def update(layer: Linear, x: Tensor, d: Tensor, _: Any) -> None:
        result = apollo_update(layer.weight.data, x, d, states[layer.name], lr=rate[0])
        assert not result.skipped

    return update


def from_scratch(text: Text, method: str, lr: float, seed: int) -> dict[str, Any]:
    """One run of table (i): fp32 weights, the same batches for every method of a seed."""
    torch.manual_seed(seed)
    head_by_adam = "head by Adam" in method
    model = Model(SHAPE, torch.bfloat16 if method in BF16 else torch.float32)
    rank, rate = METHODS[method], [lr]
    trained = list(model.parameters())
    if rank is not None:
        config = ApolloConfig(rank=rank, seed=seed)
        linears = [f for f in model.linears() if not (head_by_adam and f is model.head)]
        states = {f.name: ApolloState(f.name, tuple(f.weight.shape), config) for f in linears}
        for linear in linears:
            linear.hook = apollo_hook(states, rate)
        trained = [p for p in trained if all(p is not f.weight for f in linears)]
    adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve, start = [(0, validate(model, text))], time.perf_counter()
    for step in range(STEPS):
        rate[0] = adam.param_groups[0]["lr"] = schedule(step, STEPS, lr)
        model(text.batch(BATCH, SHAPE.context, generator)).backward()
        if rank is None:  # what AdamW is used with; APOLLO has its own limiter
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        if (step + 1) % EVERY == 0:
            curve.append((step + 1, validate(model, text)))
    if method == "APOLLO r=64" and seed:
        torch.save(model.state_dict(), PRETRAINED)
    return {
        "curve": curve,
        "final": curve[-1][1],
        "seconds": time.perf_counter() - start,
        "text": text.digest,
    }


def fine_tune(text: Text, rounding: str, seed: int, lr: float = 1e-5) -> dict[str, Any]:
    """One run of table (ii): the pretrained model moves on to another text with bf16 or (the truth) fp32
    weights."""
    model = Model(SHAPE)
    model.load_state_dict(torch.load(PRETRAINED))
    config = ApolloConfig(rank=64, seed=seed, rounding="nearest" if rounding == "nearest" else "stochastic")
    states = {f.name: ApolloState(f.name, tuple(f.weight.shape), config) for f in model.linears()}
    for linear in model.linears():
        linear.weight.data = linear.weight.data.bfloat16()  # all three start from the same bf16 weights
        if rounding == "fp32 weights":
            linear.weight.data = linear.weight.data.float()
        linear.hook = apollo_hook(states, [lr])
    for _, parameter in model.rest():
        parameter.requires_grad_(False)
    model.embed.weight.requires_grad_(
        True
    )  # so that the backward pass reaches the first layer; it is not updated
    start = {f.name: f.weight.data.float().clone() for f in model.linears()}
    generator = torch.Generator().manual_seed(2000 + seed)
    curve = [(0, validate(model, text))]
    for step in range(FINE_TUNING_STEPS):
        model(text.batch(BATCH, SHAPE.context, generator)).backward()
        model.embed.weight.grad = None
        if (step + 1) % EVERY == 0:
            curve.append((step + 1, validate(model, text)))
    moved = math.sqrt(
        sum(float((f.weight.data.float() - start[f.name]).square().sum()) for f in model.linears())
    )
    return {"curve": curve, "final": curve[-1][1], "moved": moved, "text": text.digest}


def scratch_runs(done: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    text = load_text("perl-doc", SHAPE.context, 128)
    for method in METHODS:
        for lr in GRID:
            yield f"{method}|{lr:g}|0", lambda m=method, r=lr: from_scratch(text, m, r, 0)
    for seed in SEEDS[1:]:
        for method in METHODS:
            best = min(GRID, key=lambda r: float(done[f"{method}|{r:g}|0"]["final"]))
            yield f"{method}|{best:g}|{seed}", lambda m=method, r=best, s=seed: from_scratch(text, m, r, s)


def rounding_runs(_: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if not PRETRAINED.exists():
        sys.exit("run `python benchmarks/learning.py scratch` first: fine-tuning starts from its model")
    text = load_text("fortunes", SHAPE.context, 128)
    for seed in SEEDS[:2]:
        for rounding in ("stochastic", "nearest", "fp32 weights"):
            yield f"{rounding}|1e-05|{seed}", lambda r=rounding, s=seed: fine_tune(text, r, s)


def thread_runs(_: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if not PRETRAINED.exists():
        sys.exit("run `python benchmarks/learning.py scratch` first: fine-tuning starts from its model")
    model = torch.load(PRETRAINED)
    scratch, tuning = load_text("perl-doc", SHAPE.context, 128), load_text("fortunes", SHAPE.context, 128)
    cases = [("fine-tuning", lr, tuning, model) for lr in learning_threads.FINE_TUNING_LRS]
    cases += [("from scratch", learning_threads.LR, scratch, None)]
    for what, lr, text, start in cases:
        for seed in THREAD_SEEDS:
            for threads in (1, 2, 4):
                run = partial(learning_threads.hogwild, text, threads, seed, lr, start)
                yield f"{what} at {lr:g}: {threads}|{seed}", run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["scratch", "rounding", "threads", "tables"])
    table = parser.parse_args().table
    torch.set_num_threads(1)
    if table != "tables":
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"learning-{table}.json"
        done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        runs = {"scratch": scratch_runs, "rounding": rounding_runs, "threads": thread_runs}[table]
        for key, run in runs(done):
            if key not in done:
                done[key] = run()
                file.with_suffix(".tmp").write_text(json.dumps(done, indent=1))
                file.with_suffix(".tmp").replace(file)
                print(key, f"{done[key]['final']:.4f}", flush=True)
    learning_tables.show(RESULTS, ROOT.parent / "docs")


if __name__ == "__main__":
    main()
