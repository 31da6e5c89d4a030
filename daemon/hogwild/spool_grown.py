"""Files that were taken while somebody may still have been writing to them.

The kernel tells us whether anybody has a file open for writing only if it is ours, or if we have CAP_LEASE, and
only on local file systems. Everywhere else a writer that pauses between two lines for longer than
`spool.settle_s` looks as if it were done. So such files are looked at for a while after they were taken: what
they grow by is taken too, as a file that continues the first one. Nothing that arrives within an hour of the last
change is lost; later changes are not seen.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hogwild import log
from hogwild.errors import AlreadyAccepted
from hogwild.ledger import Ledger
from hogwild.ledger_records import BadLine, FileRecord, GoodLine, Growing
from hogwild.lines import DamagedFileError, read_chunks, read_lines
from hogwild.settings import SpoolConfig
from hogwild.spool_files import Lease, Signature, open_plain, take_lease

WATCH_S = 3600.0
"""How long after its last change a file is looked at."""
CHECKED_AT_ONCE = 2000
"""Files that are looked at with every scan; more take turns."""

logger = log.get(__name__)


class Growth:
    """Looks after files in done/ and failed/ that may still grow."""

    def __init__(
        self,
        config: SpoolConfig,
        ledger: Ledger,
        on_accepted: Callable[[FileRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._ledger, self._on_accepted, self._clock = config, ledger, on_accepted, clock
        self._files: dict[Path, tuple[Growing, Signature | None, float]] = {}

    def recover(self) -> None:
        """Goes on with what an earlier process looked after."""
        for file in self._ledger.growing():
            self.add(file)

    def add(self, file: Growing) -> None:
        path = self._config.dir / "done" / file.stored_as
        if not path.exists():
            path = self._config.dir / "failed" / file.stored_as
        self._files[path] = (file, None, self._clock())

    def check(self, passes: int) -> bool:
        """Takes what files have grown by; True if one is changing now.

        Raises:
            LedgerError: the ledger failed.
        """
        changing, over = False, []
        now = self._clock()
        for path in list(self._files)[:CHECKED_AT_ONCE]:
            file, seen, since = self._files.pop(path)
            try:
                signature = Signature.of(path.lstat())
                if seen is None and signature.size == file.bytes:
                    seen = signature
                if signature == seen:
                    if signature.size != file.bytes and now - since >= self._config.settle_s:
                        file = self._take(path, file, signature, passes)
                    elif now - since > WATCH_S:
                        over.append(file.stored_as)
                        continue
                else:
                    seen, since = signature, now
                changing = changing or signature.size != file.bytes
            except OSError:  # somebody cleaned up, or it cannot be read: there is nothing to take
                over.append(file.stored_as)
                continue
            self._files[path] = (file, seen, since)
        if over:
            self._ledger.set_grown(*over)
        return changing

    def _take(self, path: Path, file: Growing, signature: Signature, passes: int) -> Growing:
        """What it is now."""
        with os.fdopen(open_plain(path), "rb") as opened:
            if take_lease(opened.fileno()) is Lease.WRITTEN:
                return file
            same = replace(file, bytes=signature.size)
            try:
                digest, length, start = _compare(path, file)
            except DamagedFileError:  # a compressed file whose next part is not complete
                return same
            if start is None:
                logger.error(
                    "spool.rewritten",
                    file=file.name,
                    stored_as=str(path),
                    hint="it was changed in place after it was accepted: drop the new content under a new name",
                )
                return same
            if digest == file.content_hash:
                return same
            lines = _after(path, self._config.max_line_bytes, start, file.content_bytes)
            try:
                record = self._ledger.accept_file(
                    file.name,
                    digest,
                    lines,
                    passes=passes,
                    size=signature.size,
                    content_bytes=length,
                    stored_as=file.stored_as,
                    continues=file.file_id,
                )
            except AlreadyAccepted as known:  # the whole of it came as well under another name
                now = replace(same, file_id=known.file_id, content_hash=digest, content_bytes=length)
                self._ledger.set_growing(now)
                return now
            now = replace(same, file_id=record.file_id, content_hash=digest, content_bytes=length)
            self._ledger.set_moved(record.file_id, growing=[now])
        if record.examples:
            self._on_accepted(record)
        logger.warning(
            "spool.grown",
            file=file.name,
            examples=record.examples,
            rejected=record.rejected,
            bytes=signature.size - file.bytes,
            hint="it was written to after it was taken; what was added is accepted too",
        )
        return now


def has_grown(path: Path, file: Growing) -> bool:
    """Does it begin with what was taken of it, and go on?"""
    try:
        _, length, start = _compare(path, file)
    except (DamagedFileError, OSError):
        return False
    return start is not None and length > file.content_bytes > 0


def _compare(path: Path, file: Growing) -> tuple[str, int, int | None]:
    """(hash of the content now, its length, where what is new begins); None: what was taken is no longer there."""
    whole, old = hashlib.sha256(), hashlib.sha256()
    length, start = 0, 0
    for chunk in read_chunks(path):
        whole.update(chunk)
        part = chunk[: max(0, file.content_bytes - length)]
        old.update(part)
        if (at := part.rfind(b"\n")) >= 0:
            start = length + at + 1
        length += len(chunk)
    kept = length >= file.content_bytes and (not file.content_bytes or old.hexdigest() == file.content_hash)
    return whole.hexdigest(), length, start if kept else None


def _after(path: Path, max_line_bytes: int, start: int, taken: int) -> Iterator[GoodLine | BadLine]:
    """Lines from `start` on. One that had no end is new only if more than its end has come."""
    for line in read_lines(path, max_line_bytes):
        if line.byte_offset < start:
            continue
        if isinstance(line, GoodLine) and line.byte_offset + len(line.raw.rstrip(b"\r")) <= taken:
            continue
        yield line
