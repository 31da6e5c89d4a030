"""What goes from a complete folder into history, and back into a complete folder."""

import base64
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from hogwild.checkpoint import remove
from hogwild.delta import Bytes, encode
from hogwild.errors import CheckpointError
from hogwild.files import Sink, copy_file, new_file, rest
from hogwild.generation import OPTIMIZER
from hogwild.history_nodes import BASE, BLOBS, DELTA, LINKED, Entry
from hogwild.history_read import BrokenLinkError, Reader, TensorFolder
from hogwild.tensor_file import parse_header, read_header

_UNFINISHED = ".unfinished-"


class PutOffError(CheckpointError):
    """Recording was broken off because something more urgent came; nothing is left of it."""


class Writer:
    """Reads a complete folder once and writes what history keeps of it."""

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Any],
        parent: Reader | None,
        base: bool,
        interrupt: threading.Event,
        *,
        zero: bool,
        headers: Mapping[str, bytes],
    ) -> None:
        self._folder, self._state, self._parent, self._base = folder, state, parent, base
        self._zero, self._headers, self._interrupt = zero, headers, interrupt
        self._source = TensorFolder(folder, optimizer=not zero)
        self._known = {name: parent.kind(name) for name in parent.names()} if parent is not None else {}

    def write(self, entry: Path, blobs: Path) -> tuple[Entry, dict[str, Any]]:
        """Write the frames and the blobs; returns what entry.json and index.json are to say."""
        tensors: dict[str, dict[str, Any]] = {}
        headers = dict(self._headers)
        delta = Sink(entry / DELTA)
        base = Sink(entry / BASE) if self._base else None
        try:
            for file in self._source.files:
                header = read_header(file)
                headers[str(file.relative_to(self._folder))] = header.raw
                moments = file == self._folder / OPTIMIZER
                for one in header.entries:
                    if self._interrupt.is_set():
                        raise PutOffError("recording was broken off")
                    tensors[one.name] = self._tensor(one, moments, delta, base)
                    rest()
            delta.close()
            if base is not None:
                base.close()
        finally:
            delta.abandon()
            if base is not None:
                base.abandon()
        needs = {name for name, item in tensors.items() if item["coding"] != "full"}
        linked = {name for name, item in tensors.items() if item["coding"] in LINKED}
        parent = self._parent
        said = Entry(
            delta=parent is not None,
            both_ways=parent is not None and parent.linked() <= linked,
            base=self._base,
            whole=not needs,
            blobs=self._blobs(blobs, headers),
        )
        return said, {"headers": {file: _pack(raw) for file, raw in headers.items()}, "tensors": tensors}

    def _tensor(self, one: Any, moments: bool, delta: Sink, base: Sink | None) -> dict[str, Any]:
        new = self._source.read(one.name)
        after = hashlib.sha256(new.data).hexdigest()
        itemsize = one.torch_dtype.itemsize
        item: dict[str, Any] = {
            "dtype": one.dtype, "shape": one.shape, "nbytes": one.nbytes, "itemsize": itemsize,
            "before": None, "after": after,
        }  # fmt: skip
        if self._zero:
            return {**item, "coding": "none"}
        linked = not moments and self._known.get(one.name) == (one.dtype, one.shape)
        if moments or (self._parent is not None and not linked):
            return {**item, "coding": "full", "delta": _frames(delta, new, None, itemsize)}
        if base is not None:
            item["base"] = _frames(base, new, None, itemsize)
        if self._parent is None:
            return {**item, "coding": "none"}
        old = self._parent.read(one.name)
        item["before"] = hashlib.sha256(old.data).hexdigest()
        if item["before"] == after:
            return {**item, "coding": "same"}
        return {**item, "coding": "xor", "delta": _frames(delta, new, old, itemsize)}

    def _blobs(self, blobs: Path, headers: Mapping[str, bytes]) -> dict[str, str]:
        """Files without tensors: name -> hash, each stored once under its hash."""
        found = {file: sha for file, sha in self._state["checksums"].items() if file not in headers}
        for file, sha in found.items():
            if not (blobs / sha).exists():
                fresh = blobs / f"{_UNFINISHED}{sha}"
                remove(fresh)
                if copy_file(self._folder / file, fresh) != sha:
                    raise CheckpointError(f"{self._folder / file} is not what was saved")
                fresh.rename(blobs / sha)
        return found


def _frames(sink: Sink, new: Bytes, old: Bytes | None, itemsize: int) -> list[Any]:
    """[offset, lengths]"""
    offset = sink.nbytes
    return [offset, encode(sink, new, old, itemsize)]


def fill(target: Path, reader: Reader, root: Path) -> dict[str, Any]:
    """Write every file of a generation but its state.json into `target`; returns its state.

    Raises:
        BrokenLinkError: what was written is not what was saved.
    """
    node = reader.node
    wanted: dict[str, str] = node.state["checksums"]
    headers = {file: _unpack(text) for file, text in node.index.get("headers", {}).items()}
    for file, expected in wanted.items():
        path = target / file
        made = node.number == 0 and file == str(OPTIMIZER)  # the model as it came has none
        if node.folder is not None and not made and (node.folder / file).exists():
            if copy_file(node.folder / file, path) != expected:
                raise BrokenLinkError("folder", node, f"{file} is not what was saved")
        elif file in headers:
            raw = headers[file]
            entries = parse_header(raw, path).entries

            def write(sink: Sink, raw: bytes = raw, entries: Any = entries) -> None:
                sink.write(raw)
                for one in entries:
                    sink.write(reader.read(one.name).data)

            if new_file(path, write) != expected:
                raise BrokenLinkError("delta", node, f"{file} is not what was saved")
        elif not _copy_same([root / BLOBS / expected, *(one / file for one in reader.spare)], path, expected):
            raise BrokenLinkError("delta", node, f"{root / BLOBS / expected} ({file}) is missing or damaged")
    return node.state


def _copy_same(sources: list[Path], target: Path, expected: str) -> bool:
    """Copy the first of these files that has the hash; False: none has."""
    for source in sources:
        try:
            if copy_file(source, target) == expected:
                return True
        except FileNotFoundError:
            pass
        remove(target)
    return False


def _pack(raw: bytes) -> str:
    return base64.b64encode(zstandard.compress(raw, 3)).decode()


def _unpack(text: str) -> bytes:
    return zstandard.decompress(base64.b64decode(text))
