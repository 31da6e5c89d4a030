"""Tables and plots of `benchmarks/learning.py` from its results files."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = dict[str, dict[str, Any]]
COLOURS = ["#0b6e99", "#d9730d", "#448361", "#9065b0", "#b3261e"]


def show(results: Path, docs: Path) -> None:
    """Prints every table there are results for and draws docs/learning-<table>.png."""
    docs.mkdir(exist_ok=True)
    for name, draw in (("scratch", scratch), ("rounding", rounding), ("threads", threads)):
        file = results / f"learning-{name}.json"
        if file.exists():
            draw(json.loads(file.read_text()), docs / f"learning-{name}.png")


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f} (one seed)"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def scratch(runs: Runs, picture: Path) -> None:
    rates: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for key, run in runs.items():
        method, lr, _ = key.split("|")
        rates[method][float(lr)].append(run)
    print("\n(i) From scratch: final validation loss, nats per byte\n")
    grid = sorted({lr for found in rates.values() for lr in found})
    print(
        "| method | "
        + " | ".join(f"lr {lr:g}, seed 0" for lr in grid)
        + " | best lr | mean ± sd over seeds |"
    )
    print("|---" * (len(grid) + 3) + "|")
    curves = {}
    for method, found in rates.items():
        best = max(found, key=lambda lr: (len(found[lr]), -found[lr][0]["final"]))
        cells = [f"{found[lr][0]['final']:.4f}" if lr in found else "" for lr in grid]
        print(
            f"| {method} | "
            + " | ".join(cells)
            + f" | {best:g} | {spread([r['final'] for r in found[best]])} |"
        )
        curves[f"{method}, lr {best:g}"] = found[best]
    plot(curves, picture, "steps of 512 bytes", "4.9M parameters from scratch")


def rounding(runs: Runs, picture: Path) -> None:
    groups = grouped(runs)
    print("\n(ii) Fine-tuning at lr 1e-5: validation loss on the new text, nats per byte\n")
    print("| weights | before | after, mean ± sd over seeds | distance moved |\n|---|---|---|---|")
    for name, found in groups.items():
        before, moved = found[0]["curve"][0][1], statistics.fmean(r["moved"] for r in found)
        print(f"| {name} | {before:.4f} | {spread([r['final'] for r in found])} | {moved:.3f} |")
    plot(groups, picture, "steps of 512 bytes", "bf16 weights, lr 1e-5")


def threads(runs: Runs, picture: Path) -> None:
    tables: dict[str, Runs] = defaultdict(dict)
    for key, run in runs.items():
        what, threads_and_seed = key.split(": ")
        tables[what][threads_and_seed] = run
    for what, found in tables.items():
        ending = what.replace(" at", "").replace(" ", "-")
        thread_table(what, found, picture.with_name(f"learning-threads-{ending}.png"))


def thread_table(what: str, runs: Runs, picture: Path) -> None:
    groups = grouped(runs)
    print(f"\n(iii) HOGWILD: one stream of examples, bf16 weights, no locks, {what}\n")
    print(
        "| threads | final loss, mean ± sd over seeds | above one thread | staleness: mean, max | updates lost "
        "| seconds |\n|---|---|---|---|---|---|"
    )
    for name, found in groups.items():
        mean = statistics.fmean(r["staleness"]["mean"] for r in found)
        worst = max(r["staleness"]["max"] for r in found)
        lost = max(r["lost"] for r in found)
        seconds = statistics.fmean(r["seconds"] for r in found)
        final = spread([r["final"] for r in found])
        above = spread([r["final"] - one["final"] for r, one in zip(found, groups["1"], strict=False)])
        if name == "1":
            above = ""
        print(f"| {name} | {final} | {above} | {mean:.2f}, {worst} | {lost} | {seconds:.0f} |")
    names = {f"{name} thread{'s' * (name != '1')}": found for name, found in groups.items()}
    plot(names, picture, "examples of 512 bytes", f"threads on the same weights, {what}")


def grouped(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, run in runs.items():
        groups[key.split("|")[0]].append(run)
    return groups


def plot(curves: dict[str, list[dict[str, Any]]], picture: Path, across: str, title: str) -> None:
    """A line per group: the mean over seeds, with each seed drawn thin behind it."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for colour, (name, found) in zip(COLOURS, curves.items(), strict=False):
        for run in found:
            axes.plot(*zip(*run["curve"], strict=True), color=colour, alpha=0.25, linewidth=0.8)
        steps = [step for step, _ in found[0]["curve"]]
        means = [statistics.fmean(run["curve"][i][1] for run in found) for i in range(len(steps))]
        axes.plot(steps, means, color=colour, label=name, linewidth=1.8)
    losses = [loss for found in curves.values() for run in found for step, loss in run["curve"] if step]
    margin = 0.05 * (max(losses) - min(losses))
    axes.set_ylim(min(losses) - margin, max(losses) + margin)
    axes.set_xlabel(across)
    axes.set_ylabel("validation loss, nats per byte")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
