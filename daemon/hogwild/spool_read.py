"""Reads a file of incoming/, once it is complete: a small one is held in memory, a large one is read twice.

A file that somebody is writing to, or that is no longer what the scan saw, raises `ChangedError`; a later scan tries it
again. Nothing here touches the ledger or moves a file: that is `spool_take.py`.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hogwild import pulse
from hogwild.ledger_records import BadLine, GoodLine, Growing
from hogwild.lines import DamagedFileError, content_hash, parse_lines, raw_hash, read_lines, unpack
from hogwild.settings import SpoolConfig
from hogwild.spool_files import Lease, Signature, is_wanted, open_plain, read_whole, take_lease

UNFINISHED_FACTOR = 5
"""A file that is empty or ends in mid-line gets this many times `settle_s`: more is probably coming."""


class ChangedError(Exception):
    """The file was written while it was read, or somebody has it open for writing."""


@dataclass(slots=True)
class Candidate:
    """A complete file in incoming/, opened."""

    raw_name: str
    path: str  # plain strings: pathlib costs as much as reading a small file
    signature: Signature
    unchanged_s: float
    began: float
    name: str
    """As it can be stored and logged."""
    fd: int = -1
    lease: Lease = Lease.UNKNOWN
    links: int = 1
    digest: str = ""
    content_bytes: int = 0
    lines: Sequence[GoodLine | BadLine] | None = None
    """None: too large to be held."""
    stored_as: str = ""
    taken: Growing | None = None
    """What the ledger has of it, if it has grown since it was accepted."""

    def may_grow(self) -> bool:
        """Whether somebody may have it open for writing, has it under another name too, or is just opening it."""
        return self.lease is not Lease.HELD or self.links > 1 or is_wanted(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def read(one: Candidate, config: SpoolConfig, limit: int) -> None:
    """Opens a file and makes sure that it is complete; reads it if it is small.

    Args:
        limit: bytes of content, decompressed, that are held; the lines of a longer file stay None.

    Raises:
        ChangedError: it is not complete.
        OSError: it cannot be read.
    """
    one.fd = open_plain(one.path)
    one.lease = take_lease(one.fd)
    if one.lease is Lease.WRITTEN:
        raise ChangedError
    stat = os.fstat(one.fd)
    one.links = stat.st_nlink
    if Signature.of(stat) != one.signature:
        raise ChangedError
    data = read_whole(one.fd, limit) if stat.st_size <= limit else None
    if one.raw_name.endswith(".jsonl"):
        last = data[-1:] if data is not None else os.pread(one.fd, 1, stat.st_size - 1)
        if last != b"\n" and one.unchanged_s < UNFINISHED_FACTOR * config.settle_s:
            raise ChangedError
    content = None if data is None else _unpack(one, data, limit)
    if content is None:
        return
    if one.lines is None:
        one.digest, one.content_bytes = hashlib.sha256(content).hexdigest(), len(content)
        one.lines = list(parse_lines([content], config.max_line_bytes))
    if one.lease is not Lease.HELD and Signature.of(os.fstat(one.fd)) != one.signature:
        raise ChangedError


def read_large(one: Candidate, max_line_bytes: int) -> Iterable[GoodLine | BadLine]:
    """Reads a file that is not held, for its hash now, and again for its lines as they are asked for.

    Raises:
        ChangedError: with the last line: it is not the file any more that was complete.
        OSError: it cannot be read.
    """
    lines: Iterable[GoodLine | BadLine]
    try:
        one.digest, one.content_bytes = content_hash(Path(one.path))
        lines = read_lines(Path(one.path), max_line_bytes)
    except DamagedFileError as error:
        one.digest, one.content_bytes = raw_hash(Path(one.path)), 0
        lines = [BadLine(0, 0, None, str(error), "")]
    return _unchanged(one, lines)


def _unpack(one: Candidate, data: bytes, limit: int) -> bytes | None:
    """Decompressed content; None if there is too much of it."""
    if one.raw_name.endswith(".jsonl"):
        return data
    parts: list[bytes] = []
    length = 0
    try:
        for chunk in unpack(io.BytesIO(data), one.raw_name):
            parts.append(chunk)
            length += len(chunk)
            if length > limit:
                return None
    except DamagedFileError as error:
        one.digest = hashlib.sha256(data).hexdigest()
        one.lines = [BadLine(0, 0, None, str(error), "")]
    return b"".join(parts)


def _unchanged(one: Candidate, lines: Iterable[GoodLine | BadLine]) -> Iterator[GoodLine | BadLine]:
    """Passes lines through, and refuses the file if it is not the one that was complete before."""
    for line in lines:
        pulse.beat()
        yield line
    if Signature.of(os.lstat(one.path)) != one.signature:
        raise ChangedError
