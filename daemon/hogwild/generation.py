"""What a generation is called, and what its state.json says. Imports no torch.

A generation is one saved state of the model: weights, optimizer state, place in the ledger. They are numbered 1, 2, 3,
... in the order in which they were saved, and a number is never used again. Generation 0 is the model as it came.

    generation         its number
    parent             the generation that its weights descend from; null for generation 0
    step               training steps done when it was begun
    epoch              weight epoch then
    ledger_position    every pass of the ledger up to this pass_id is in it
    saved_at           UTC
    trained            what was trained since the parent: {examples, passes, loss_before, loss_after}
    arena, base_path, base_digest, config, versions
    checksums          file -> sha256, of every other file of the folder
    checksum           sha256 of the rest of state.json, as compact JSON with sorted keys
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hogwild.errors import CheckpointError
from hogwild.files import hash_file

PREFIX = "generation-"
STATE = Path("hogwild", "state.json")
OPTIMIZER = Path("hogwild", "optimizer.safetensors")
_NUMBERS = ("generation", "step", "epoch", "ledger_position")


def name(generation: int) -> str:
    """The folder's name: generation-00000012."""
    return f"{PREFIX}{generation:08d}"


def number(folder: Path) -> int | None:
    """The generation that a folder is called after; None for another name."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if digits != folder.name and digits.isascii() and digits.isdigit() else None


def numbered(root: Path) -> dict[int, Path]:
    """The generations that have a folder in `root`, oldest first."""
    found = {number(path): path for path in root.glob(f"{PREFIX}*")}
    return {key: found[key] for key in sorted(key for key in found if key is not None)}


def encode_state(state: Mapping[str, Any]) -> bytes:
    """state.json, with its own checksum."""
    return json.dumps({**state, "checksum": _checksum(state)}, indent=2).encode() + b"\n"


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a complete checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return parse_state(folder / STATE)


def parse_state(path: Path) -> dict[str, Any]:
    """As `read_state`, of a state.json that lies elsewhere."""
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; this is not a complete hogwild checkpoint"
        ) from error
    for key in _NUMBERS:
        value = state.get(key) if isinstance(state, dict) else None
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{path} holds no {key}; this is not a complete hogwild checkpoint")
    if state.get("checksum") != _checksum(state):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit; restore an older generation")
    return state


def verify(folder: Path) -> dict[str, Any]:
    """Read a complete checkpoint folder through and compare every file with its checksum; returns its state.

    Raises:
        CheckpointError: naming every file that is missing or damaged.
    """
    state = read_state(folder)
    problems = []
    for file, expected in sorted(state["checksums"].items()):
        try:
            if hash_file(folder / file) != expected:
                problems.append(f"{folder / file}: its content is not what was saved")
        except OSError as error:
            problems.append(f"{folder / file}: {error.strerror}")
    if problems:
        raise CheckpointError(
            "\n  - ".join([f"checkpoint {folder} is damaged ({len(problems)} found):", *problems])
        )
    return state


def _checksum(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
