"""What people ask of history: a list of the generations, and what moved between two of them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hogwild import generation as generations
from hogwild.history_nodes import Links, load


def listing(state_dir: Path) -> list[dict[str, Any]]:
    """One record a generation, oldest first. Changes nothing, and needs no daemon.

    `bytes` is what it takes in history, `folder_bytes` what its complete folder takes (0: there is none). `undone`: a
    rollback has left it. `restorable`: what it needs is there; that it is undamaged is found out when it is read.
    """
    folders = generations.numbered(state_dir / "checkpoints")
    nodes, problems = load(state_dir / "history", folders)
    good = Links(nodes).restorable()
    link = state_dir / "checkpoints" / "current"
    current = generations.number(link.readlink()) if link.is_symlink() else None
    line, at = set(), current
    while at is not None and at not in line:
        line.add(at)
        at = nodes[at].parent if at in nodes else None
    records = []
    for number, node in nodes.items():
        state = node.state
        folder = folders.get(number)
        records.append(
            {
                "generation": number,
                "parent": state["parent"],
                "saved_at": state["saved_at"],
                "step": state["step"],
                "epoch": state["epoch"],
                **{key: state.get("trained", {}).get(key) for key in _TRAINED},
                "probes": state.get("probes"),
                "bytes": _bytes(node.path),
                "folder_bytes": _bytes(folder),
                "current": number == current,
                "undone": number not in line and number > 0,
                "restorable": number in good,
            }
        )
    for number, problem in problems.items():
        if number not in nodes:
            records.append({"generation": number, "restorable": False, "problem": problem})
    return sorted(records, key=lambda record: int(record["generation"]))


_TRAINED = ("examples", "passes", "loss_before", "loss_after")


def _bytes(folder: Path | None) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
    except FileNotFoundError:  # a daemon has forgotten it meanwhile
        return 0


def layer(tensor: str) -> str:
    """What a tensor belongs to: `model.layers.3.self_attn.q_proj.weight` -> `model.layers.3`."""
    found = re.match(r"(?:.*?\.)?\w+\.\d+(?=\.)", tensor)
    return found[0] if found else tensor.rpartition(".")[0] or tensor


def grouped(changes: Mapping[str, tuple[float, float, int]]) -> list[dict[str, Any]]:
    """Changes by layer, the largest first.

    Args:
        changes: tensor -> (squared norm of the difference, squared norm of the older one, elements that differ).

    Returns:
        one record a layer: layer, change (relative norm), elements, tensors {name: change}.
    """
    layers: dict[str, list[str]] = {}
    for name in changes:
        layers.setdefault(layer(name), []).append(name)
    records = [
        {
            "layer": key,
            "change": _relative(sum(changes[n][0] for n in names), sum(changes[n][1] for n in names)),
            "elements": sum(changes[n][2] for n in names),
            "tensors": dict(
                sorted(
                    ((n, _relative(*changes[n][:2])) for n in names), key=lambda item: item[1], reverse=True
                )
            ),
        }
        for key, names in layers.items()
    ]
    return sorted(records, key=lambda record: (-float(str(record["change"])), str(record["layer"])))


def _relative(difference: float, before: float) -> float:
    """|B - A| / |A|; of a tensor that was all zeros, |B - A|."""
    return float((difference / before) ** 0.5) if before else float(difference**0.5)
