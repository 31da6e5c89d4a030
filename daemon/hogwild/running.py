"""Daemons that run, and the configuration that each of them has: for commands that nobody told. Imports no torch.

A daemon leaves word in `<state_dir>/running.json`. Where its state folder is not known either, the lock says it, which
is among its open files.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hogwild import state_lock
from hogwild.errors import HogwildError
from hogwild.files import replace_file
from hogwild.settings import Config

NAME = "running.json"


@dataclass(frozen=True)
class Running:
    """A daemon.

    Attributes:
        pid: its process.
        file: its configuration file; None: it has none.
        config: what it goes by now.
    """

    pid: int
    file: Path | None
    config: Config


def leave_word(config: Config, file: Path | None) -> None:
    """Called by the daemon, at start and after a reload. OSError: it could not be written.

    For its user alone: there may be a key among `server.arguments`, and the file that it is from may be private.
    """
    said = {"pid": os.getpid(), "file": str(file.absolute()) if file else None}
    text = json.dumps({**said, "config": config.model_dump(mode="json")})
    replace_file(config.state_dir / NAME, text.encode() + b"\n", mode=0o600)


def status(state_dir: Path, pid: int) -> dict[str, Any]:
    """What the daemon `pid`, which works there, has said last of what it does; its `pid` alone before it has.

    Raises:
        OSError: it cannot be read.
    """
    try:
        said = json.loads((state_dir / "status.json").read_bytes())
    except (
        FileNotFoundError,
        ValueError,
    ):  # half of it after a power cut: nobody waits for the disk to have it
        said = {}
    # not what an earlier daemon left
    return dict(said) if said.get("pid") == pid else {"pid": pid, "training": False}


def none_in(state_dir: Path) -> HogwildError:
    """Nobody works there; where there are others, which."""
    others = "".join(
        f"; process {one.pid} works in {one.config.state_dir}{f' (--config {one.file})' if one.file else ''}"
        for one in anywhere()
    )
    return HogwildError(f"no daemon is running with the state folder {state_dir}{others}")


def in_folder(state_dir: Path) -> Running | None:
    """The daemon that works there; None: none does, or it cannot be seen what it goes by."""
    try:
        said = json.loads((state_dir / NAME).read_bytes())  # first: a lock may be another program's
        pid = state_lock.holder(state_dir)
        if pid is None or said["pid"] != pid:  # what an earlier one left
            return None
        return Running(
            pid, Path(said["file"]) if said["file"] else None, Config.model_validate(said["config"])
        )
    except (OSError, HogwildError, ValueError, LookupError, TypeError, ValidationError):
        return None  # of another user, or of another version


def anywhere() -> list[Running]:
    """Every daemon whose open files we may see."""
    folders = {
        lock.parent for pid in _processes() for lock in _open_files(pid) if lock.name == state_lock.NAME
    }
    return [one for folder in sorted(folders) if (one := in_folder(folder)) is not None]


def _processes() -> Iterator[str]:
    yield from (name for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208  # no Path for each


def _open_files(pid: str) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield Path(os.readlink(entry.path))  # noqa: PTH115
