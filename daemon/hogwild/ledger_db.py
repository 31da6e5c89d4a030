"""The SQLite connection under the ledger: opening, owning, migrating, and what a commit promises.

Durability. The ledger is in WAL mode. A commit with `fsync=True` survives a power cut; one without survives a
crash or a kill of the process, and a power cut may take it back. Passes are of the second kind on purpose: a
power cut also takes the weights in memory that they describe, and nothing older than the last checkpoint is
lost, because every fsynced commit carries all earlier ones with it.
"""

import fcntl
import getpass
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hogwild.errors import LedgerError
from hogwild.files import PRIVATE
from hogwild.ledger_schema import APPLICATION_ID, MIGRATIONS, VERSION

NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"  # SQL: UTC, to the millisecond
BUSY_TIMEOUT_MS = 30_000  # someone else's sqlite3 shell may hold the write lock for a moment


class Database:
    """One connection, used by any thread through one lock. The process that writes owns the ledger alone.

    Raises:
        LedgerError: not a ledger, newer than this program, unreadable, or owned by another process.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._db: sqlite3.Connection | None = None
        try:
            if not readonly:
                path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
                self._own()
            mode = "ro" if readonly else "rwc"
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            if not readonly and path.stat().st_uid == os.geteuid():
                path.chmod(PRIVATE)  # it holds every line that was dropped; its log takes over this mode
            self._open(readonly)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise LedgerError(f"{path}: {_explain(path, error)}") from error
        except LedgerError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        with self._lock:
            return self._db is not None

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """The connection, for SELECTs, while no other thread uses it."""
        with self._lock:
            if self._db is None:
                raise LedgerError(f"{self.path}: the ledger is closed")
            try:
                yield self._db
            except sqlite3.Error as error:
                raise LedgerError(f"{self.path}: {_explain(self.path, error)}") from error

    @contextmanager
    def write(self, *, fsync: bool) -> Iterator[sqlite3.Connection]:
        """One transaction: committed at the end, rolled back on any exception."""
        with self.read() as db:
            db.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _own(self) -> None:
        """Holds a lock file as long as the process lives; SQLite's own locks last for one transaction."""
        lock = self.path.with_name(self.path.name + ".lock")
        self._owner = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._owner, 32, 0).decode(errors="replace").strip() or "unknown"
            raise LedgerError(
                f"{self.path}: in use by process {owner}; one daemon owns a state folder, stop it first"
            ) from None
        os.ftruncate(self._owner, 0)
        os.pwrite(self._owner, f"{os.getpid()}\n".encode(), 0)

    def _open(self, readonly: bool) -> None:
        db = self._db
        assert db is not None
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        application = int(db.execute("PRAGMA application_id").fetchone()[0])
        empty = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
        if application != APPLICATION_ID and not (empty and not readonly):
            raise LedgerError(f"{self.path}: is a database, but not a ledger of hogwild")
        if version > VERSION:
            raise LedgerError(
                f"{self.path}: written by a newer hogwild (schema {version}; this one knows {VERSION}): "
                "install that one again, or bring back a backup from before the upgrade"
            )
        if readonly:
            if version < VERSION:
                raise LedgerError(
                    f"{self.path}: of an older hogwild (schema {version}); start the daemon once"
                )
            return
        db.execute("PRAGMA journal_mode = WAL")
        # What the log of an earlier process holds is written into the database anew, and fsynced there: if that
        # process ended because its fsync failed, the log may be in memory only, and fsync will not say so again.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        for number in range(version, VERSION):
            # One script, one transaction: a ledger is never between two versions.
            db.executescript(
                f"BEGIN IMMEDIATE; {MIGRATIONS[number]}; PRAGMA application_id = {APPLICATION_ID};"
                f" PRAGMA user_version = {number + 1}; COMMIT;"
            )
        db.execute("PRAGMA foreign_keys = ON")  # a migration that writes a table anew needs them off
        if version == 0:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _explain(path: Path, error: Exception) -> str:
    user = getpass.getuser()
    text = str(error)
    if path.is_dir():
        return "is a folder; a ledger is a file"
    if isinstance(error, PermissionError) or "unable to open" in text or "readonly" in text:
        return f"user {user} cannot write it ({text}); check the owner and mode of the file and of its folder"
    if "is full" in text:
        return f"{text}: make room on the disk of {path.parent}; what was accepted is safe there"
    if "not a database" in text:
        return "is not a ledger (not an SQLite file, or encrypted, or damaged)"
    if "malformed" in text:
        return f"is damaged ({text}); restore it from a copy, or move it away to start a new one"
    return text
