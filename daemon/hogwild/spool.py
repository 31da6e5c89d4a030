"""The folder that people drop files into.

    incoming/  *.jsonl, *.jsonl.gz, *.jsonl.zst; dotfiles and everything else are left alone
    done/      accepted files, as they were dropped
    failed/    files without one good line, and <name>.errors.jsonl for every file with something that cannot train
    .moving/   files on their way from incoming/ to one of the two
    .daemon.lock  held by the one daemon that does all this

A file is ours once it is in the ledger (fsynced); only then does it move. A crash between the two leaves a
file in incoming/ that the ledger knows, which the next scan finishes. Scans are the truth; file events, which
the kernel may drop, only wake the scan early.
"""

import os
import threading
import time
from collections.abc import Callable

from hogwild import log, pulse, spool_identity
from hogwild.errors import SpoolError
from hogwild.ledger import Ledger
from hogwild.ledger_records import FileRecord
from hogwild.lines import SUFFIXES
from hogwild.settings import SpoolConfig
from hogwild.spool_files import (
    MOVING,
    Signature,
    is_hidden,
    is_spool_file,
    printable,
    return_half_moved,
    user,
    write_errors_file,
)
from hogwild.spool_grown import Growth
from hogwild.spool_take import Intake, Scan
from hogwild.spool_watch import Watch

__all__ = ["Scan", "Spool"]

IDLE_SHARE = 4
"""While files keep arriving, scans are this many times their own length apart."""

logger = log.get(__name__)


class Spool:
    """Takes what is dropped into the ledger.

    Args:
        passes: trained passes of lines that do not say.
        on_accepted: called after a file's examples are in the ledger; wakes the trainers.
        clock: seconds, monotonic.
        hold: takes the spool for this daemon, or makes sure that it still has it; see `spool_lock.py`.
        let_go: called where it cannot be used, which holds no disk any longer.
    """

    def __init__(
        self,
        config: SpoolConfig,
        ledger: Ledger,
        *,
        passes: int,
        on_accepted: Callable[[FileRecord], None] = lambda _record: None,
        clock: Callable[[], float] = time.monotonic,
        hold: Callable[[], None] = lambda: None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self._hold, self._let_go = hold, let_go
        self._config, self._ledger, self._passes, self._clock = config, ledger, passes, clock
        self._growth = Growth(config, ledger, on_accepted, clock)
        self._intake = Intake(
            config,
            ledger,
            self._growth,
            passes=passes,
            on_accepted=on_accepted,
            say_once=self._say_once,
        )
        self.incoming, self.done, self.failed = self._intake.incoming, self._intake.done, self._intake.failed
        self._watch = Watch(self.incoming)
        self._seen: dict[str, tuple[Signature, float]] = {}
        self._said: dict[str, tuple[object, ...]] = {}
        self._errors_not_before = 0.0
        self._recovered = False
        self.trouble = ""  # why the folder cannot be used; empty: it can
        self.scanned = threading.Event()  # once everything that lay there has been looked at

    def claim(self) -> None:
        """Creates the folders, and takes them for this daemon alone.

        Raises:
            SpoolTakenError: another daemon takes files from them.
            SpoolError: a folder cannot be made or written, naming it and the user, or is not the one it was.
        """
        others = [self.done, self.failed, self.incoming.parent / MOVING]
        try:
            spool_identity.verify(self.incoming, others, self._ledger, self._hold)
        except (SpoolError, OSError):
            self._let_go()
            raise

    def prepare(self) -> None:
        """As `claim`, and finishes what a crash interrupted."""
        self.claim()
        if not self._recovered:
            if names := return_half_moved(self.incoming):
                logger.warning("spool.returned", files=names, reason="a crash came while they were moved")
            self._intake.recover()
            self._growth.recover()
            self._recovered = True

    def wake(self) -> None:
        """Makes `run` scan now, or notice that it should stop."""
        self._watch.wake()

    def run(self, stop: threading.Event) -> None:
        """Scans until `stop` is set; call `wake` after setting it. File system errors heal when they end.

        Raises:
            LedgerError: the ledger failed; nothing can be accepted safely.
        """
        try:
            while not stop.is_set():
                pulse.beat()
                pause, began = self._config.rescan_interval_s, time.monotonic()
                try:
                    self.prepare()
                    self._watch.ensure()
                    waiting = bool(self.scan_once(stop).waiting)
                    self.scanned.set()
                    self.trouble = ""
                    if self._growth.check(self._passes) or waiting:
                        pause = min(pause, max(self._config.settle_s / 2, 0.02))
                    self._write_errors()
                    if self._said.pop("", None):
                        logger.info("spool.healed", folder=str(self.incoming))
                except (SpoolError, OSError) as error:
                    self.trouble = str(error)
                    self._say_once("", "spool.failed", error=self.trouble, user=user())
                rest = min(pause, IDLE_SHARE * (time.monotonic() - began))
                pulse.beat(pause)
                if not self._watch.wait(rest, events=False):
                    self._watch.wait(pause - rest)
        finally:
            self._watch.close()

    def scan_once(self, stop: threading.Event | None = None) -> Scan:
        """Takes every complete file, oldest first. Needs no thread and no events."""
        scan = Scan()
        present: dict[str, tuple[Signature, float]] = {}
        ready: list[tuple[int, str]] = []
        names: set[str] = set()
        now = self._clock()
        with os.scandir(self.incoming) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if name in self._said:
                    names.add(name)
                if not is_spool_file(entry):
                    names.add(name)
                    self._say_once(
                        name, "spool.ignored", reason=f"not a plain file named *{', *'.join(SUFFIXES)}"
                    )
                    continue
                try:
                    signature = Signature.of(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                known = self._seen.get(name)
                since = known[1] if known and known[0] == signature else now
                present[name] = (signature, since)
                if now - since >= self._config.settle_s:
                    ready.append((signature.mtime_ns, name))
                else:
                    scan.waiting.append(name)
        self._seen = present
        self._said = {name: said for name, said in self._said.items() if not name or name in names}
        ready.sort()
        self._intake.take(
            ((name, present[name][0], now - present[name][1]) for _, name in ready),
            scan,
            lambda: stop is not None and stop.is_set(),
        )
        return scan

    def _write_errors(self) -> None:
        """Puts examples that failed in training into failed/<name>.errors.jsonl, beside the bad lines."""
        if time.monotonic() < self._errors_not_before:
            return
        began = time.monotonic()
        written: set[str] = set()
        for file_id, stored_as, name, due in self._ledger.errors_due():
            if stored_as not in written:
                write_errors_file(self._ledger, stored_as, name, self.failed / f"{stored_as}.errors.jsonl")
                written.add(stored_as)
            self._ledger.errors_written(file_id, due)
        # A large file whose lines fail one by one is written again and again: not all the time.
        self._errors_not_before = time.monotonic() + 10 * (time.monotonic() - began)

    def _say_once(self, name: str, event: str, *about: object, **fields: object) -> None:
        """Warns about something that lasts, once until it changes."""
        said = (event, *about, *map(str, fields.values()))
        if self._said.get(name) != said:
            self._said[name] = said
            logger.warning(event, **({"file": printable(name)} if name else {}), **fields)
