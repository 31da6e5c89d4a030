"""Reading a generation out of history, tensor by tensor, by way of its neighbours."""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from hogwild.delta import Bytes, DamagedError, decode_into, read_exactly
from hogwild.errors import CheckpointError
from hogwild.generation import OPTIMIZER, name
from hogwild.history_nodes import BASE, DELTA, INDEX, Node
from hogwild.layout import weight_files
from hogwild.tensor_file import Entry, read_header


class BrokenLinkError(CheckpointError):
    """A part of history that cannot be used, by name.

    Attributes:
        part: ("folder" | "delta" | "base" | "index" | "model", generation).
    """

    def __init__(self, kind: str, node: Node, reason: object) -> None:
        from_model = kind == "folder" and node.folder is not None and node.folder == node.model
        self.part = ("model" if from_model else kind, node.number)
        files = {"delta": DELTA, "base": BASE, "index": INDEX}
        place = node.folder if kind == "folder" else (node.path or Path()) / files[kind]
        super().__init__(f"{place} ({name(node.number)}) is damaged: {reason}")


class TensorFolder:
    """The tensors of a complete folder.

    Args:
        optimizer: its optimizer state, too.
    """

    def __init__(self, folder: Path, *, optimizer: bool = True) -> None:
        """Raises CheckpointError when a file is damaged."""
        self.files = [folder / file for file in weight_files(folder)]
        if optimizer:
            self.files.append(folder / OPTIMIZER)
        self.entries: dict[str, tuple[Path, Entry]] = {}
        for file in self.files:
            for entry in read_header(file).entries:
                self.entries[entry.name] = (file, entry)

    def read(self, tensor: str) -> Bytes:
        """Raises KeyError, OSError, DamagedError."""
        file, entry = self.entries[tensor]
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_exactly(fd, entry.nbytes, entry.offset)
        finally:
            os.close(fd)


class Reader:
    """One generation, read along a path that `Links.path` found.

    Args:
        path: the generation first, a whole copy last.

    Attributes:
        node: the generation.
        spare: complete folders, of whatever generation: most have the same tokenizer.
    """

    def __init__(self, nodes: dict[int, Node], path: list[int]) -> None:
        """Raises BrokenLinkError."""
        self._nodes = [nodes[number] for number in path]
        self.node = self._nodes[0]
        self.spare = [node.folder for node in nodes.values() if node.folder is not None]
        self._open = ExitStack()
        self._fds: dict[Path, int] = {}
        self._folder: TensorFolder | None = None
        for node in self._nodes:
            try:
                _ = node.index
            except CheckpointError as error:
                raise BrokenLinkError("index", node, error) from error
        last = self._nodes[-1]
        if last.folder is not None:
            try:
                self._folder = TensorFolder(last.folder, optimizer=last.number > 0)
            except (CheckpointError, OSError) as error:
                raise BrokenLinkError("folder", last, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def linked(self) -> set[str]:
        """Its tensors whose bits are not all in its own frames: all weights, as a rule."""
        return {name for name in self.names() if self.node.tensors.get(name, {}).get("coding") != "full"}

    def names(self) -> list[str]:
        """Every tensor of the generation."""
        if self.node.tensors:
            return list(self.node.tensors)
        return list(self._folder.entries) if self._folder else []

    def kind(self, tensor: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape)"""
        item = self.node.tensors.get(tensor)
        if item is not None:
            return item["dtype"], tuple(item["shape"])
        assert self._folder is not None
        entry = self._folder.entries[tensor][1]
        return entry.dtype, entry.shape

    def read(self, tensor: str) -> Bytes:
        """Its bytes, checked against the hash that was taken when it was saved.

        Raises:
            BrokenLinkError: something on the way is damaged.
        """
        item = self.node.tensors.get(tensor)
        source, data = self._combine(tensor, item)
        if item is not None and hashlib.sha256(data.data).hexdigest() != item["after"]:
            raise BrokenLinkError(*source, f"{tensor} is not what was saved")
        return data

    def _combine(self, tensor: str, item: dict[str, Any] | None) -> tuple[tuple[str, Node], Bytes]:
        """Walk the path, combining the bits on the way; returns what the last of them came from, and the bits."""
        total: Bytes | None = None
        for place, node in enumerate(self._nodes):
            last = node is self._nodes[-1]
            if last and self._folder is not None:
                try:
                    data = self._folder.read(tensor)
                except (KeyError, OSError, DamagedError) as error:
                    raise BrokenLinkError("folder", node, error) from error
                if total is None:
                    return ("folder", node), data
                if len(total) != len(data):
                    raise BrokenLinkError("folder", node, f"{tensor} is of another size")
                return ("folder", node), np.bitwise_xor(total, data, out=total)
            assert item is not None, "a generation without an index is read from its own folder"
            if total is None:
                total = np.zeros(item["nbytes"], np.uint8)
            own = node.tensors[tensor]
            if own["coding"] == "full":
                self._add(total, "delta", node, own["delta"], item["itemsize"])
                return ("delta", node), total
            if last:
                self._add(total, "base", node, own["base"], item["itemsize"])
                return ("base", node), total
            following = self._nodes[place + 1]
            link = node if node.parent == following.number else following
            frames = link.tensors[tensor]
            if frames["coding"] == "xor":
                self._add(total, "delta", link, frames["delta"], item["itemsize"])
        raise AssertionError("a path ends at a whole copy")

    def _add(self, total: Bytes, kind: str, node: Node, frames: list[Any], itemsize: int) -> None:
        assert node.path is not None
        path = node.path / (DELTA if kind == "delta" else BASE)
        offset, lengths = frames
        try:
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._open.callback(os.close, self._fds[path])
            decode_into(total, self._fds[path], offset, lengths, itemsize)
        except (OSError, DamagedError) as error:
            raise BrokenLinkError(kind, node, error) from error
