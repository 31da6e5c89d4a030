"""Which weights a server begins with when no daemon holds an arena: the newest checkpoint, not the model as it came.

A server that comes back alone after a crash would otherwise serve the untrained model, and nobody would notice.
Imports no vllm.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from hogwild import checkpoint
from hogwild.checkpoint import CURRENT
from hogwild.errors import CheckpointError
from hogwild.layout import Source, source_from_json
from hogwild.weights import digest


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin with.

    Attributes:
        folder: complete Hugging Face folder, with links resolved.
        generation, epoch, steps: what its weights are.
    """

    folder: Path
    generation: int
    epoch: int
    steps: int


def newest_checkpoint(root: Path) -> Path | None:
    """The folder that `current` leads to, or None where nothing was ever saved.

    Raises:
        CheckpointError: there are checkpoints, but which one is the newest cannot be told.
    """
    link = root / CURRENT
    try:
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        if not os.path.lexists(link):
            return None
        folder = link.resolve()
        if folder.is_dir():
            next(folder.iterdir(), None)  # may we read it?
            return folder
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read by user {os.geteuid()}: {error}") from error
    others = [name for name in names if name != CURRENT and not name.startswith(".")]
    raise CheckpointError(
        f"{link} leads to {folder}, which is not there. Bring that folder back, or point `current` at another "
        f"checkpoint (there are: {', '.join(others) or 'none'})."
    )


def choose(state_dir: Path, source: Source) -> Start | None:
    """The checkpoint that a server of the model `source` begins with; None: there is none of this model.

    Raises:
        CheckpointError: there is one, or may be one, and it cannot be used.
    """
    root = (state_dir / "checkpoints").resolve()
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None  # nothing was ever saved there
    except OSError as error:
        raise CheckpointError(f"{root} cannot be looked at by user {os.geteuid()}: {error}") from error
    folder = newest_checkpoint(root)
    if folder is None:
        return None
    state = checkpoint.read_state(folder)
    if not _same_model(state, source):
        return None
    return Start(
        folder, int(state.get("generation", state["step"])), int(state.get("epoch", 0)), state["step"]
    )


def _same_model(state: dict[str, object], source: Source) -> bool:
    """Was this checkpoint trained from `source`? By the files' identity where that is enough, or bit for bit."""
    try:
        if source_from_json(state.get("source")).same_files(source):
            return True
    except (KeyError, TypeError, ValueError):
        pass  # saved by a version that did not note it
    return state.get("base_digest") == digest(Path(source.path))
