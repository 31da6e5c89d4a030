"""Checkpoints: complete Hugging Face folders, replaced atomically, with what training needs to go on beside them.

    <root>/generation-00000012/   model.safetensors, config.json, tokenizer: what `vllm serve` and transformers load
                       hogwild/   optimizer.safetensors, state.json (see generation.py)
    <root>/current -> generation-00000012   a symbolic link, swapped by rename
    <root>/last-generation        the highest number whose folder is gone: none is given twice

The order on disk is: write into a folder that no name leads to, fsync every file, fsync the folders, rename, fsync the
parent, swap the link, fsync the parent. A crash at any moment leaves the previous checkpoint current and whole.

Nobody pauses while a checkpoint is written. What it holds: every element is a value that it had at some moment while
the file was written, and every update that had finished before the writing began is in.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from hogwild import clock
from hogwild import generation as generations
from hogwild import log as logs
from hogwild.errors import ArenaError, CheckpointError
from hogwild.files import copy_file, fsync, new_file
from hogwild.generation import OPTIMIZER, STATE, read_state
from hogwild.layout import weight_files
from hogwild.settings import Config
from hogwild.tensor_file import write_tensors
from hogwild.weights import Weights

__all__ = ["Checkpoints", "read_moments", "read_optimizer", "read_state"]

log = logs.get(__name__)

CURRENT, LAST = "current", "last-generation"
_UNFINISHED = ".unfinished-"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


class Checkpoints:
    """The checkpoints under one folder.

    Attributes:
        keep: complete folders that stay.
        max_age_s: older ones go; 0: no limit.
        max_bytes: the oldest go until all fit; 0: no limit. The current one always stays.
    """

    def __init__(
        self, root: Path, keep: int, *, max_age_s: float = 0.0, max_bytes: int = 0, readonly: bool = False
    ) -> None:
        """Make the folder if needed, and clear away what an interrupted write left; with `readonly`, do neither.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        self.keep, self.max_age_s, self.max_bytes = keep, max_age_s, max_bytes
        self.root = root.resolve()  # as `current` resolves to: the two are compared
        if readonly:
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.root = root.resolve()
            for leftover in self.root.glob(f"{_UNFINISHED}*"):
                remove(leftover)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep checkpoints in {root} as user {os.geteuid()}: {error}"
            ) from error

    def current(self) -> Path | None:
        """The newest complete checkpoint (or the one that was rolled back to), or None."""
        link = self.root / CURRENT
        return link.resolve() if link.exists() else None

    def current_generation(self) -> int | None:
        """The number that `current` leads to, also where its folder is missing; None without a checkpoint."""
        link = self.root / CURRENT
        return generations.number(link.readlink()) if link.is_symlink() else None

    def folders(self) -> dict[int, Path]:
        """The complete checkpoints on disk by generation, oldest first."""
        return generations.numbered(self.root)

    def save(
        self,
        weights: Weights,
        base: Path,  # the folder that the model came from: its configuration, tokenizer and frozen tensors are copied
        optimizer: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],  # needs "step", "epoch" and "ledger_position"; all of it goes to state.json
    ) -> Path:
        """Write a checkpoint of the live weights as the next generation, and make it current.

        Raises:
            CheckpointError: it could not be written (disk full, permissions); the previous one stays current.
        """
        number = self._next_generation()
        full = {
            "generation": number,
            "parent": self.current_generation() or 0,
            "epoch": 0,
            "saved_at": now(),
            **state,
        }

        def fill(folder: Path) -> dict[str, Any]:
            sums = copy_beside(base, folder)
            for file in weight_files(base):
                sums[file] = write_tensors(folder / file, _tensors_of(base / file, weights))
            weights.arena.weights.ensure_alive()
            sums[str(OPTIMIZER)] = write_tensors(folder / OPTIMIZER, dict(optimizer))
            return {**full, "checksums": sums}

        folder = self.put(number, fill)
        self.point_current_at(number)
        return folder

    def put(self, number: int, fill: Callable[[Path], Mapping[str, Any]]) -> Path:
        """Make the complete, durable folder of a generation.

        Args:
            fill: writes every file but state.json into the folder given, fsynced; returns the state with checksums.

        Raises:
            CheckpointError: it could not be written; nothing is left of it.
        """
        final, unfinished = self.root / generations.name(number), self.unfinished(generations.name(number))
        try:
            remove(unfinished)
            (unfinished / "hogwild").mkdir(parents=True)
            text = generations.encode_state(fill(unfinished))
            new_file(unfinished / STATE, lambda sink: sink.write(text))
            fsync(unfinished / "hogwild")
            fsync(unfinished)
            if final.exists():  # damaged, and made anew
                self._discard(final)
            unfinished.rename(final)
            fsync(self.root)
        except (OSError, SafetensorError, ArenaError) as error:
            remove(unfinished, ignore_errors=True)
            raise self._unwritten(number, error) from error
        except CheckpointError:
            remove(unfinished, ignore_errors=True)
            raise
        return final

    def unfinished(self, name: str) -> Path:
        """A name that nobody takes for a checkpoint, and that is cleared away at the next start."""
        return self.root / f"{_UNFINISHED}{name}"

    def point_current_at(self, generation: int) -> None:
        """Swap the link, durably.

        Raises:
            CheckpointError: it could not be swapped; it leads where it led.
        """
        link = self.unfinished(CURRENT)
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(generations.name(generation))
            link.rename(self.root / CURRENT)
            fsync(self.root)
        except OSError as error:
            raise self._unwritten(generation, error) from error

    def prune(self, may_go: Callable[[int, Path], bool] = lambda _number, _folder: True) -> list[int]:
        """Remove complete folders beyond `keep`, `max_age_s` and `max_bytes`; returns their numbers.

        Args:
            may_go: asked before each; False if it must stay (nothing else holds it), or has been put elsewhere.
        """
        current = self.current_generation()
        newest_first = [item for item in reversed(self.folders().items()) if item[0] != current]
        kept, gone = 1, []
        held = folder_bytes(self.root / generations.name(current)) if current is not None else 0
        for number, folder in newest_first:
            nbytes = folder_bytes(folder)
            fits = not self.max_bytes or held + nbytes <= self.max_bytes
            young = not self.max_age_s or clock.now() - folder.stat().st_mtime <= self.max_age_s
            if kept < self.keep and fits and young:
                kept, held = kept + 1, held + nbytes
            elif may_go(number, folder):
                self._discard(folder)
                gone.append(number)
        return gone

    def _next_generation(self) -> int:
        return 1 + max([self._last(), *self.folders()])

    def _last(self) -> int:
        """The highest number among those whose folders are gone; 0 if none is."""
        try:
            return int((self.root / LAST).read_text())
        except (OSError, ValueError):
            return 0

    def _note_last(self, number: int) -> None:
        """Durably: a number must not come back after its folder is gone."""
        if number > self._last():
            fresh = self.unfinished(LAST)
            fresh.unlink(missing_ok=True)
            new_file(fresh, lambda sink: sink.write(f"{number}\n".encode()))
            fresh.rename(self.root / LAST)
            fsync(self.root)

    def _unwritten(self, number: int, error: Exception) -> CheckpointError:
        remedy = f"make room or mend the permissions of {self.root} (user {os.geteuid()})"
        name = getattr(error, "filename", None)
        if name is not None and not Path(name).is_relative_to(self.root):  # the model's folder, copied from
            remedy = f"bring back, or let user {os.geteuid()} read, {name}"
        return CheckpointError(
            f"checkpoint {self.root / generations.name(number)} could not be written: {error}. The previous checkpoint "
            f"is still current; {remedy}."
        )

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint; half-removed, it no longer bears the name of one."""
        unfinished = self.unfinished(f"old-{folder.name}")
        try:
            self._note_last(generations.number(folder) or 0)
            remove(unfinished)
            folder.rename(unfinished)
            remove(unfinished)
        except OSError:
            pass  # what is left is removed with the next one, or at the next start


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer tensors of a checkpoint.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    path = folder / OPTIMIZER
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_moments(folder: Path, config: Config) -> dict[str, torch.Tensor]:
    """The same, for training with this configuration; nothing, where seed or gap have changed.

    Moments live in a random projection that follows from these two: in another one they mean nothing.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    saved = read_state(folder).get("config", {})
    changed = {
        f"{table}.{key}": f"{saved[table][key]} -> {now}"
        for table, key, now in (
            ("training", "seed", config.training.seed),
            ("optimizer", "gap", config.optimizer.gap),
        )
        if saved.get(table, {}).get(key, now) != now
    }
    tensors = read_optimizer(folder)
    if changed:
        log.warning("optimizer.reset", changed=changed, checkpoint=str(folder))
        return {}
    return tensors


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def side_files(base: Path) -> list[Path]:
    """Configuration, tokenizer and the like: every plain file of a model folder that holds no weights."""
    return [path for path in sorted(base.iterdir()) if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES]


def copy_beside(base: Path, folder: Path) -> dict[str, str]:
    """Copy a model folder's `side_files`; returns their checksums."""
    return {path.name: copy_file(path, folder / path.name) for path in side_files(base)}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below; what goes away meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _tensors_of(file: Path, weights: Weights) -> dict[str, torch.Tensor]:
    """What belongs into a file of this name: live views, and the base model's own tensor where there is none."""
    tensors = {}
    with safe_open(file, framework="pt") as base:
        for name in base.keys():  # noqa: SIM118 - a safetensors file is not a dict
            live = name in weights.arena.layout.tensors
            tensors[name] = weights.view(name) if live else base.get_tensor(name)
    return tensors
