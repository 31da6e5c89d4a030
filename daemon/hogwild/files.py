"""Files that are written once, hashed on the way, and durable when they are closed. Imports no torch."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hogwild import pulse

PIECE = 8 << 20  # bytes that are held at once
_LONGEST_REST_S = 5.0
_pace = threading.local()


@contextlib.contextmanager
def paced(share: float, hurry: threading.Event) -> Iterator[None]:
    """Inside, this thread takes no more than a share of one core's time, as long as nobody is in a hurry.

    Not by a lower priority: a thread that holds the interpreter lock and gets no processor keeps all others waiting.
    """
    _pace.rest = (share, hurry, time.thread_time())
    try:
        yield
    finally:
        _pace.rest = None


def rest() -> None:
    """Called after every piece of work: sleep as long as the pace asks for; without one, not at all."""
    pulse.beat()
    if (pace := getattr(_pace, "rest", None)) is None:
        return
    share, hurry, since = pace
    if share < 1.0 and not hurry.is_set():
        hurry.wait(min((time.thread_time() - since) * (1.0 / share - 1.0), _LONGEST_REST_S))
    _pace.rest = (share, hurry, time.thread_time())


@contextlib.contextmanager
def reporting(tell: Callable[[int], None]) -> Iterator[None]:
    """Inside, `tell` is called with the bytes of each piece that this thread writes."""
    _pace.tell = tell
    try:
        yield
    finally:
        _pace.tell = None


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
        if (tell := getattr(_pace, "tell", None)) is not None:
            tell(memoryview(data).nbytes)
        rest()

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
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            sha.update(piece)
            rest()
    return sha.hexdigest()


def fsync(path: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


PRIVATE = 0o640
"""What holds lines that people dropped: for the owner and the group, whatever the umask."""


def private(path: Path, mode: int = PRIVATE) -> BinaryIO:
    """A new file with that mode, open for writing. OSError: it exists, or cannot be made."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    return os.fdopen(fd, "wb")


def replace_file(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Put `data` in the place of a small file: the old one or the new one is there, whatever happens. OSError.

    Nobody but its owner and group may read it, unless `mode` says otherwise.
    """
    fresh = path.with_suffix(".tmp")
    fresh.unlink(
        missing_ok=True
    )  # of an interrupted write: an fsync that has failed is not tried again on it
    with private(fresh, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    fsync(path.parent)
