"""The table and the plot of `benchmarks/forgetting.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {"none": "no replay", "replay": "replay", "default": "replay and self-replay"}
COLUMNS = (
    ("trained", "trained wording"),
    ("paraphrases", "paraphrases"),
    ("first_drop_trained", "first drop, trained"),
    ("first_drop_paraphrases", "first drop, paraphrases"),
    ("perplexity_change", "perplexity"),
)


def show(done: dict[str, Any], plot: Path | None) -> None:
    """Print the table of the runs that are finished; draw them where `plot` says."""
    print("\n| | " + " | ".join(title for _, title in COLUMNS) + " | steps | training |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name in NAMES:
        if "end" in done.get(name, {}):
            end, last = done[name]["end"], done[name]["drops"][-1]
            cells = [f"{end[key]:+.1%}" if "perplexity" in key else f"{end[key]:.0%}" for key, _ in COLUMNS]
            print(
                f"| {NAMES[name]} | {' | '.join(cells)} | {last['steps']} | {last['train_s'] / 60:.0f} min |"
            )
    if plot is not None:
        _draw(done, plot)


def _draw(done: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for name, title in NAMES.items():
        if not (drops := done.get(name, {}).get("drops")):
            continue
        x = [drop["facts"] for drop in drops]
        left.plot(x, [100 * drop["paraphrases"] for drop in drops], marker="o", label=title)
        right.plot(x, [100 * drop["perplexity_change"] for drop in drops], marker="o", label=title)
    left.set(
        title="Paraphrases never trained, of all facts so far", ylabel="answered right, %", ylim=(0, 102)
    )
    right.set(title="Perplexity of text never trained", ylabel="change, %")
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("facts taught, 10 a drop")
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
