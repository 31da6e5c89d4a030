"""Checkpoints: complete Hugging Face folders, replaced atomically, with what training needs to go on beside them.

    <root>/step-00000120/            model.safetensors, config.json, tokenizer: what `vllm serve` and transformers load
                        hogwild/     optimizer.safetensors, state.json (step, ledger position, base model, versions)
    <root>/current -> step-00000120  a symbolic link, swapped by rename

A step that is saved again (nothing was trained in between) becomes step-00000120.2, and the older folder goes.

The order on disk is: write into a folder that no name leads to, fsync every file, fsync the folders, rename, fsync the
parent, swap the link, fsync the parent. A crash at any moment leaves the previous checkpoint current and whole.

Nobody pauses while a checkpoint is written. What it holds: every element is a value that it had at some moment while
the file was written, and every update that had finished before the writing began is in.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hogwild.errors import CheckpointError
from hogwild.layout import weight_files
from hogwild.weights import Weights

CURRENT = "current"
_PREFIX, _UNFINISHED = "step-", ".unfinished-"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


class Checkpoints:
    """The checkpoints under one folder."""

    def __init__(self, root: Path, keep: int) -> None:
        """Make the folder if needed, and clear away what an interrupted write left.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        self.keep = keep
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.root = root.resolve()  # as `current` resolves to: the two are compared
            for leftover in self.root.glob(f"{_UNFINISHED}*"):
                folder = leftover.is_dir() and not leftover.is_symlink()
                shutil.rmtree(leftover) if folder else leftover.unlink()
        except OSError as error:
            raise CheckpointError(
                f"cannot keep checkpoints in {root} as user {os.geteuid()}: {error}"
            ) from error

    def current(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        link = self.root / CURRENT
        return link.resolve() if link.exists() else None

    def save(
        self,
        weights: Weights,
        base: Path,  # the folder that the model came from: its configuration, tokenizer and frozen tensors are copied
        optimizer: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],  # needs "step" and "ledger_position"; all of it goes to state.json
    ) -> Path:
        """Write a checkpoint of the live weights and make it current.

        Raises:
            CheckpointError: it could not be written (disk full, permissions); the previous one stays current.
        """
        same_step = self._of_step(state["step"])
        final = self._free_name(state["step"])
        unfinished = self.root / f"{_UNFINISHED}{final.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / "hogwild").mkdir(parents=True)
            _copy_beside(base, unfinished)
            for file in weight_files(base):
                _write_tensors(unfinished / file, _tensors_of(base / file, weights))
            _write_tensors(unfinished / "hogwild" / "optimizer.safetensors", dict(optimizer))
            _write_bytes(
                unfinished / "hogwild" / "state.json", json.dumps(dict(state), indent=2).encode() + b"\n"
            )
            _fsync(unfinished / "hogwild")
            _fsync(unfinished)
            unfinished.rename(final)
            _fsync(self.root)
            self._point_current_at(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final} could not be written: {error}. The previous checkpoint is still current; "
                f"make room or mend the permissions of {self.root} (user {os.geteuid()})."
            ) from error
        for replaced in same_step:
            self._discard(replaced)
        self._prune()
        return final

    def _of_step(self, step: int) -> list[Path]:
        """Checkpoints of that step that are there already: nothing has been trained since."""
        name = f"{_PREFIX}{step:08d}"
        return [path for path in (self.root / name, *self.root.glob(f"{name}.*")) if path.exists()]

    def _free_name(self, step: int) -> Path:
        """step-00000007, or step-00000007.2 and so on: a name that `current` leads to is never taken away."""
        path, number = self.root / f"{_PREFIX}{step:08d}", 1
        while path.exists():
            number += 1
            path = self.root / f"{_PREFIX}{step:08d}.{number}"
        return path

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint; half-removed, it no longer bears the name of one."""
        unfinished = self.root / f"{_UNFINISHED}old-{folder.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            folder.rename(unfinished)
            shutil.rmtree(unfinished)
        except OSError:
            pass  # the new checkpoint is in place; what is left is removed with the next one, or at the next start

    def _point_current_at(self, folder: Path) -> None:
        link = self.root / f"{_UNFINISHED}{CURRENT}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.rename(self.root / CURRENT)
        _fsync(self.root)

    def _prune(self) -> None:
        current = self.current()
        complete = sorted(path for path in self.root.glob(f"{_PREFIX}*") if path != current)
        for path in complete[: max(len(complete) - (self.keep - 1), 0)]:
            self._discard(path)


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / "hogwild" / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; this is not a complete hogwild checkpoint"
        ) from error
    for key in ("step", "ledger_position"):
        value = state.get(key) if isinstance(state, dict) else None
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{path} holds no {key}; this is not a complete hogwild checkpoint")
    return state


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer tensors of a checkpoint.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    path = folder / "hogwild" / "optimizer.safetensors"
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _tensors_of(file: Path, weights: Weights) -> dict[str, torch.Tensor]:
    """What belongs into a file of this name: live views, and the base model's own tensor where there is none."""
    tensors, regions = {}, set()
    with safe_open(file, framework="pt") as base:
        for name in base.keys():  # noqa: SIM118 - a safetensors file is not a dict
            region = weights.arena.layout.tensors.get(name)
            if region is None:
                tensors[name] = base.get_tensor(name)
            elif region in regions:  # two names for one tensor: safetensors refuses to write shared memory
                tensors[name] = weights.view(name).clone(memory_format=torch.contiguous_format)
            else:
                tensors[name] = weights.view(name).contiguous()
                regions.add(region)
    return tensors


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes 0600; another user's `vllm serve` may read this
    _fsync(path)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _fsync(path)


def _copy_beside(base: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and the like: every plain file of the base folder that holds no weights."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES:
            _write_bytes(folder / path.name, path.read_bytes())


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
