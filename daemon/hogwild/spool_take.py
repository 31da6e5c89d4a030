"""Takes complete files out of incoming/: read, into the ledger, then moved. Small files go many at a time.

For every file: read -> ledger, fsynced -> errors file, fsynced -> moved -> folders fsynced -> "moved" noted.
A crash between two of these leaves a file in incoming/ that the ledger knows, and the next scan goes on there.
A batch makes one ledger transaction and one fsync of each folder for all its files.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hogwild import log, pulse, spool_names, spool_read
from hogwild.errors import AlreadyAccepted, LedgerError
from hogwild.ledger import Ledger
from hogwild.ledger_records import BadLine, FileRecord, Growing, NewFile
from hogwild.settings import SpoolConfig
from hogwild.spool_files import Signature, fsync_folder, move, printable, user, write_errors_file
from hogwild.spool_grown import Growth, has_grown
from hogwild.spool_names import ERRORS, FORCE
from hogwild.spool_read import Candidate, ChangedError

BATCH_FILES = 256  # each is held open meanwhile
BATCH_BYTES = 1024 * 1024  # of content, decompressed; parsed, it takes several times as much memory

logger = log.get(__name__)


@dataclass(slots=True)
class Scan:
    """What one scan did, as names in incoming/."""

    accepted: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Not complete yet, or in the way of something that the log names."""


class Intake:
    """See the module."""

    def __init__(
        self,
        config: SpoolConfig,
        ledger: Ledger,
        growth: Growth,
        *,
        passes: int,
        on_accepted: Callable[[FileRecord], None],
        say_once: Callable[..., None],
    ) -> None:
        self.incoming, self.done, self.failed = (config.dir / x for x in ("incoming", "done", "failed"))
        self._config, self._ledger, self._growth, self._passes = config, ledger, growth, passes
        self._on_accepted, self._say_once = on_accepted, say_once
        self._unmoved: dict[str, dict[str, FileRecord]] = {}
        """Name -> hash of the content -> what the ledger has of a file that has not left incoming/."""

    def recover(self) -> None:
        """Finds what a crash kept from being moved."""
        for record in self._ledger.unmoved():
            like = spool_names.printed_like(self.incoming, record.name)
            moved = any(os.path.lexists(f"{x}/{record.stored_as}") for x in (self.done, self.failed))
            if not moved and any(printable(name) == record.name for name in like):
                self._unmoved.setdefault(record.name, {})[record.content_hash] = record
            else:
                self._ledger.set_lost(record.file_id)

    def take(
        self, ready: Iterable[tuple[str, Signature, float]], scan: Scan, stopped: Callable[[], bool]
    ) -> None:
        """Takes files: (name, signature, seconds for which it has not changed)."""
        batch: list[Candidate] = []
        held = 0
        try:
            for name, signature, unchanged_s in ready:
                if stopped():
                    return
                pulse.beat()
                path, began = f"{self.incoming}/{name}", time.perf_counter()
                one = Candidate(name, path, signature, unchanged_s, began, printable(name))

                def read(one: Candidate = one) -> None:
                    spool_read.read(one, self._config, BATCH_BYTES)

                if not self._guarded(read, one, scan):
                    one.close()
                    continue
                if one.lines is None:
                    self._finish(batch, scan)
                    held = 0
                    self._take_large(one, scan)
                    continue
                batch.append(one)
                held += one.content_bytes
                if len(batch) >= BATCH_FILES or held >= BATCH_BYTES:
                    self._finish(batch, scan)
                    held = 0
            self._finish(batch, scan)
        finally:
            for one in batch:
                one.close()

    def _guarded(self, work: Callable[[], object], one: Candidate, scan: Scan) -> bool:
        """Whether it worked; one file that cannot be taken is no reason not to take the others."""
        try:
            work()
        except (ChangedError, FileNotFoundError):
            pass
        except LedgerError:
            raise
        except OSError as error:
            self._say_once(
                one.raw_name, "spool.unreadable", one.signature,
                path=printable(str(error.filename or one.path)), user=user(), error=str(error),
            )  # fmt: skip
        except Exception as error:
            self._say_once(
                one.raw_name, "spool.stuck", one.signature, path=printable(one.path), error=repr(error),
                hint="this is a bug; the file stays where it is until it changes",
            )  # fmt: skip
        else:
            return True
        scan.waiting.append(one.raw_name)
        return False

    def _finish(self, batch: list[Candidate], scan: Scan) -> None:
        """Takes a batch into the ledger, fsynced, and moves its files."""
        if not batch:
            return
        try:
            spool_names.choose(batch, self._ledger, (self.done, self.failed))
            known = {id(one): self._left_over(one) for one in batch}
            new = [one for one in batch if known[id(one)] is None]
            results = self._ledger.accept_files(
                [
                    NewFile(
                        one.name, one.digest, one.signature.size, one.content_bytes, one.stored_as,
                        FORCE in one.raw_name, one.lines or (),
                    )
                    for one in new
                ],
                passes=self._passes,
            )  # fmt: skip
            accepted = iter(results)
            outcome = [(one, known[id(one)] or next(accepted)) for one in batch]
            for one, result in outcome:
                one.lines = None  # they are in the ledger
                if isinstance(result, FileRecord) and result.examples:
                    self._on_accepted(result)
            self._put_away(outcome, scan)
        finally:
            for one in batch:
                one.close()
            batch.clear()

    def _take_large(self, one: Candidate, scan: Scan) -> None:
        """As `_finish` for one file that is read twice instead of being held: for its hash, and for its lines."""

        def take() -> None:
            lines = spool_read.read_large(one, self._config.max_line_bytes)
            spool_names.choose([one], self._ledger, (self.done, self.failed))
            record: FileRecord | AlreadyAccepted | None = self._left_over(one)
            if record is None:
                try:
                    record = self._ledger.accept_file(
                        one.name,
                        one.digest,
                        lines,
                        passes=self._passes,
                        size=one.signature.size,
                        content_bytes=one.content_bytes,
                        stored_as=one.stored_as,
                        force=FORCE in one.raw_name,
                    )
                except AlreadyAccepted as known:
                    record = known
            if isinstance(record, FileRecord) and record.examples:
                self._on_accepted(record)
            self._put_away([(one, record)], scan)

        try:
            self._guarded(take, one, scan)
        finally:
            one.close()

    def _put_away(self, files: Sequence[tuple[Candidate, FileRecord | AlreadyAccepted]], scan: Scan) -> None:
        """Writes down bad lines, moves the files, and notes it, all durably. Repeated if a crash comes between."""
        moved: list[tuple[Candidate, FileRecord | AlreadyAccepted, str, BadLine | None]] = []
        growing: list[Growing] = []
        # Before they move: a restart finds a file by its row, and a duplicate has none.
        copies = [_growing(one, result) for one, result in files if isinstance(result, AlreadyAccepted)]
        if copies:
            self._ledger.set_growing(*copies)
        for one, result in files:
            if isinstance(result, FileRecord):
                self._unmoved.setdefault(result.name, {})[result.content_hash] = result

            def put(one: Candidate = one, result: FileRecord | AlreadyAccepted = result) -> None:
                first, stored_as = None, one.stored_as
                folder = self.done
                if isinstance(result, FileRecord):
                    stored_as = result.stored_as
                    folder = self.done if result.state == "accepted" else self.failed
                    if result.rejected:
                        errors = self.failed / f"{stored_as}{ERRORS}"
                        first = write_errors_file(self._ledger, stored_as, one.name, errors)
                target = f"{folder}/{stored_as}"
                same = move(one.path, target, one.signature.inode)
                if not same and not isinstance(result, FileRecord):
                    raise ChangedError
                moved.append((one, result, target, first))
                if same and (one.taken or one.may_grow()):
                    growing.append(one.taken or _growing(one, result))

            self._guarded(put, one, scan)
        over = {file.stored_as for file in copies} - {file.stored_as for file in growing}
        if over:
            self._ledger.set_grown(*over)
        if not moved:
            return
        for folder in (self.done, self.failed, self.incoming):
            fsync_folder(folder)
        records = [result for _, result, _, _ in moved if isinstance(result, FileRecord)]
        if records:
            self._ledger.set_moved(*(record.file_id for record in records), growing=growing)
        for file in growing:
            self._growth.add(file)
        for one, result, target, first in moved:
            self._report(one, result, target, first, scan)

    def _left_over(self, one: Candidate) -> FileRecord | None:
        """What the ledger has of a file that could not be moved when it was accepted, grown or not since."""
        records = self._unmoved.get(one.name, {})
        if one.digest in records:
            return records[one.digest]
        for record in records.values():
            taken = self._ledger.taken(record.file_id)
            if taken is not None and has_grown(Path(one.path), taken):
                one.taken = taken
                return record
        return None

    def _became(self, known: AlreadyAccepted) -> str:
        record = self._ledger.file(known.file_id)
        counts = {"quarantined": record.quarantined, "failed": record.failed}
        counts |= {"undone by a rollback": record.undone}
        away = [f"{count} {state}" for state, count in counts.items() if count]
        return f"accepted before, of its examples: {', '.join(away)}" if away else "already learned"

    def _report(
        self,
        one: Candidate,
        result: FileRecord | AlreadyAccepted,
        target: str,
        first: BadLine | None,
        scan: Scan,
    ) -> None:
        where = "/".join(target.rsplit("/", 2)[1:])
        if isinstance(result, AlreadyAccepted):
            scan.duplicates.append(one.raw_name)
            logger.warning(
                "spool.duplicate",
                file=one.name,
                same_as=result.name,
                accepted_at=result.accepted_at,
                stored_as=where,
                hint=f"{self._became(result)}; to learn it again, put `{FORCE[:-1]}` before .jsonl in its name",
            )
            return
        if records := self._unmoved.pop(result.name, None):
            records.pop(result.content_hash, None)
            if records:
                self._unmoved[result.name] = records
        if first is not None:
            logger.warning(
                "spool.rejected",
                file=one.name,
                lines=result.rejected,
                line=first.line_no,
                offset=first.byte_offset,
                field=first.field,
                reason=first.reason,
                errors=f"failed/{result.stored_as}.errors.jsonl",
            )
        if result.state == "rejected":
            scan.rejected.append(one.raw_name)
            return
        scan.accepted.append(one.raw_name)
        logger.info(
            "spool.accepted",
            file=one.name,
            examples=result.examples,
            rejected=result.rejected,
            bytes=result.bytes,
            stored_as=where,
            ms=round((time.perf_counter() - one.began) * 1000, 1),
        )


def _growing(one: Candidate, result: FileRecord | AlreadyAccepted) -> Growing:
    stored_as = result.stored_as if isinstance(result, FileRecord) else one.stored_as
    return Growing(result.file_id, one.name, stored_as, one.digest, one.signature.size, one.content_bytes)
