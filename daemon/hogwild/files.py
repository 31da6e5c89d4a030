"""Files that are written once, hashed on the way, and durable when they are closed. Imports no torch."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

PIECE = 8 << 20  # bytes that are held at once


class Sink:
    """A new file that is hashed while it is written; `close` makes it durable."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.fchmod(self._fd, 0o644)  # another user's `vllm serve` may read this, whatever the umask
        self._sha = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._sha.update(view)
        self.nbytes += len(view)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> str:
        """Fsync; returns the sha256 of what was written, hex."""
        try:
            os.fsync(self._fd)
        finally:
            self.abandon()
        return self._sha.hexdigest()

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def new_file(path: Path, fill: Callable[[Sink], None]) -> str:
    """Write a new file, fsync it, return its sha256 (hex). OSError: it could not be; what is there is incomplete."""
    sink = Sink(path)
    try:
        fill(sink)
        return sink.close()
    finally:
        sink.abandon()


def copy_file(source: Path, target: Path) -> str:
    """Copy into a new file, fsynced; returns its sha256."""

    def fill(sink: Sink) -> None:
        with source.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                sink.write(piece)

    return new_file(target, fill)


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
