"""The folder that people drop files into.

    incoming/  *.jsonl, *.jsonl.gz, *.jsonl.zst; dotfiles and everything else are left alone
    done/      accepted files, as they were dropped
    failed/    files without one good line, and <name>.errors.jsonl for every file with a bad one
    .moving/   files on their way from incoming/ to one of the two

A file is ours once it is in the ledger (fsynced); only then does it move. A crash between the two leaves a
file in incoming/ that the ledger knows, which the next scan finishes. Scans are the truth; file events, which
the kernel may drop, only wake the scan early.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hogwild import log
from hogwild.config import SpoolConfig
from hogwild.errors import AlreadyAccepted, SpoolError
from hogwild.ledger import Ledger
from hogwild.ledger_records import BadLine, FileRecord, GoodLine
from hogwild.lines import SUFFIXES, DamagedFileError, content_hash, raw_hash, read_lines
from hogwild.spool_files import (
    MOVING,
    Signature,
    fsync_folder,
    is_open_for_writing,
    make_folders,
    move_if_same,
    open_plain,
    return_half_moved,
    user,
    write_errors_file,
)
from hogwild.spool_watch import Watch

FORCE = ".force."
"""In a file's name: learn it although the same content was learned before."""
UNFINISHED_FACTOR = 5
"""A file that is empty or ends in mid-line gets this many times `settle_s`: more is probably coming."""

logger = log.get(__name__)


@dataclass(slots=True)
class Scan:
    """What one scan did, as names in incoming/."""

    accepted: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Not complete yet, or in the way of something that the log names."""


class _ChangedError(Exception):
    """The file was written while it was read."""


class Spool:
    """Takes what is dropped into the ledger.

    Args:
        passes: trained passes of lines that do not say.
        on_accepted: called after a file's examples are in the ledger; wakes the trainers.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: SpoolConfig,
        ledger: Ledger,
        *,
        passes: int,
        on_accepted: Callable[[FileRecord], None] = lambda _record: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.incoming = config.dir / "incoming"
        self.done = config.dir / "done"
        self.failed = config.dir / "failed"
        self._config = config
        self._ledger = ledger
        self._passes = passes
        self._on_accepted = on_accepted
        self._clock = clock
        self._seen: dict[str, tuple[Signature, float]] = {}
        self._said: dict[str, tuple[object, ...]] = {}
        self._wake = threading.Event()
        self._recovered = False

    def prepare(self) -> None:
        """Creates the folders and finishes what a crash interrupted.

        Raises:
            SpoolError: a folder cannot be made or written, naming it and the user.
        """
        make_folders([self.incoming, self.done, self.failed, self.incoming.parent / MOVING])
        if not self._recovered:
            if names := return_half_moved(self.incoming):
                logger.warning("spool.returned", files=names, reason="a crash came while they were moved")
            for record in self._ledger.unmoved():
                if not (self.incoming / record.name).exists():
                    self._ledger.set_moved(record.file_id)
            self._recovered = True

    def wake(self) -> None:
        """Makes `run` scan now, or notice that it should stop."""
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Scans until `stop` is set; call `wake` after setting it. File system errors heal when they end.

        Raises:
            LedgerError: the ledger failed; nothing can be accepted safely.
        """
        watch = Watch(self.incoming, self.wake)
        try:
            while not stop.is_set():
                self._wake.clear()
                pause = self._config.rescan_interval_s
                try:
                    self.prepare()
                    watch.ensure()
                    if self.scan_once(stop).waiting:
                        pause = min(pause, max(self._config.settle_s / 2, 0.02))
                    self._said.pop("", None)
                except (SpoolError, OSError) as error:
                    self._say_once("", "spool.failed", error=str(error), user=user())
                self._wake.wait(pause)
        finally:
            watch.close()

    def scan_once(self, stop: threading.Event | None = None) -> Scan:
        """Takes every complete file, oldest first. Needs no thread and no events."""
        scan = Scan()
        present: dict[str, tuple[Signature, float]] = {}
        ready: list[tuple[int, str]] = []
        now = self._clock()
        with os.scandir(self.incoming) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.endswith(".tmp"):
                    continue
                if not entry.name.endswith(SUFFIXES) or not entry.is_file(follow_symlinks=False):
                    self._say_once(
                        entry.name, "spool.ignored", reason=f"not a plain file named *{', *'.join(SUFFIXES)}"
                    )
                    continue
                try:
                    signature = Signature.of(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                known = self._seen.get(entry.name)
                since = known[1] if known and known[0] == signature else now
                present[entry.name] = (signature, since)
                if self._is_complete(entry.name, signature, now - since):
                    ready.append((signature.mtime_ns, entry.name))
                else:
                    scan.waiting.append(entry.name)
        self._seen = present
        self._said = {
            name: said for name, said in self._said.items() if os.path.lexists(self.incoming / name)
        }
        for _, name in sorted(ready):
            if stop is not None and stop.is_set():
                break
            self._take(name, present[name][0], scan)
        if scan.accepted or scan.rejected or scan.duplicates:
            for folder in (self.done, self.failed, self.incoming):
                fsync_folder(folder)
        return scan

    def _is_complete(self, name: str, signature: Signature, unchanged_s: float) -> bool:
        if unchanged_s < self._config.settle_s:
            return False
        try:
            with open_plain(self.incoming / name) as file:
                if is_open_for_writing(file.fileno()):
                    return False
                if name.endswith(".jsonl"):
                    file.seek(max(0, signature.size - 1))
                    if file.read(1) != b"\n":
                        return unchanged_s >= UNFINISHED_FACTOR * self._config.settle_s
        except OSError as error:
            self._say_once(
                name, "spool.unreadable", path=str(self.incoming / name), user=user(), error=str(error)
            )
            return False
        return True

    def _take(self, name: str, signature: Signature, scan: Scan) -> None:
        path = self.incoming / name
        began = time.perf_counter()
        lines: Iterable[GoodLine | BadLine]
        try:
            try:
                digest = content_hash(path)
                lines = read_lines(path, self._config.max_line_bytes)
            except DamagedFileError as error:
                digest = raw_hash(path)
                lines = [BadLine(0, 0, None, str(error), "")]
            record = self._interrupted(name, digest)
            if record is None:
                record = self._ledger.accept_file(
                    name,
                    digest,
                    _unchanged(path, signature, lines),
                    passes=self._passes,
                    size=signature.size,
                    stored_as=self._free_name(name, digest),
                    force=FORCE in name,
                )
            if record.examples:
                self._on_accepted(record)
            self._put_away(record, path, signature, scan, began)
        except AlreadyAccepted as known:
            stored_as = self._free_name(name, digest)
            if not move_if_same(path, self.done / stored_as, signature):
                return
            scan.duplicates.append(name)
            logger.warning(
                "spool.duplicate",
                file=name,
                same_as=known.name,
                accepted_at=known.accepted_at,
                stored_as=f"done/{stored_as}",
                hint=f"already learned; to learn it again, put `{FORCE[:-1]}` before .jsonl in its name",
            )
        except (_ChangedError, FileNotFoundError):
            scan.waiting.append(name)
        except OSError as error:
            scan.waiting.append(name)
            self._say_once(
                name,
                "spool.unreadable",
                signature,
                path=error.filename or str(path),
                user=user(),
                error=str(error),
            )

    def _interrupted(self, name: str, digest: str) -> FileRecord | None:
        """The record of a file that a crash kept from moving."""
        for record in self._ledger.unmoved():
            if record.name == name and record.content_hash == digest:
                return record
        return None

    def _put_away(
        self, record: FileRecord, path: Path, signature: Signature, scan: Scan, began: float
    ) -> None:
        """Writes down the bad lines and moves the file. Done all over if a crash comes between."""
        errors = self.failed / f"{record.stored_as}.errors.jsonl"
        first = write_errors_file(self._ledger, record, errors) if record.rejected else None
        folder = self.done if record.state == "accepted" else self.failed
        move_if_same(path, folder / record.stored_as, signature)
        self._ledger.set_moved(record.file_id)
        self._said.pop(record.name, None)
        if first is not None:
            logger.warning(
                "spool.rejected",
                file=record.name,
                lines=record.rejected,
                line=first.line_no,
                offset=first.byte_offset,
                field=first.field,
                reason=first.reason,
                errors=f"failed/{errors.name}",
            )
        if record.state == "rejected":
            scan.rejected.append(record.name)
            return
        scan.accepted.append(record.name)
        logger.info(
            "spool.accepted",
            file=record.name,
            examples=record.examples,
            rejected=record.rejected,
            bytes=record.bytes,
            stored_as=f"done/{record.stored_as}",
            ms=round((time.perf_counter() - began) * 1000, 1),
        )

    def _free_name(self, name: str, digest: str) -> str:
        """`name`, or one with part of the content's hash if another file of that name was here before."""
        stem, dot, suffix = name.partition(".jsonl")
        candidates = [name, f"{stem}.{digest[:8]}{dot}{suffix}"]
        number = 2
        while any(
            os.path.lexists(taken)
            for taken in (
                self.done / candidates[0],
                self.failed / candidates[0],
                self.failed / f"{candidates[0]}.errors.jsonl",
            )
        ):
            candidates = candidates[1:] or [f"{stem}.{digest[:8]}.{number}{dot}{suffix}"]
            number += 1
        return candidates[0]

    def _say_once(self, name: str, event: str, *about: object, **fields: object) -> None:
        """Warns about something that lasts, once until it changes."""
        said = (event, *about, *map(str, fields.values()))
        if self._said.get(name) != said:
            self._said[name] = said
            logger.warning(event, **({"file": name} if name else {}), **fields)


def _unchanged(
    path: Path, signature: Signature, lines: Iterable[GoodLine | BadLine]
) -> Iterator[GoodLine | BadLine]:
    """Passes lines through, and refuses the file if it is not the one that was complete before."""
    yield from lines
    if Signature.of(path.lstat()) != signature:
        raise _ChangedError
