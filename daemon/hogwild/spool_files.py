"""File-system manners of the spool: folders, durable writes, and who else has a file open."""

import contextlib
import enum
import fcntl
import getpass
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import orjson

from hogwild.errors import SpoolError
from hogwild.files import private
from hogwild.ledger import Ledger
from hogwild.ledger_records import BadLine
from hogwild.lines import SUFFIXES

MOVING = ".moving"  # beside incoming/: files on their way out of it
FOLDER_MODE = 0o2770  # a group drops files in; set-group-id keeps them the group's


class Incoming(NamedTuple):
    """What lies in incoming/."""

    files: int
    """That wait to be taken."""
    oldest_s: float
    """Seconds since the oldest of them came, or was last written to."""
    ignored: list[str]
    """Names of what is never taken, and may have been meant to be."""


def is_hidden(name: str) -> bool:
    """One of those that nobody means for the spool, not yet or not at all."""
    return name.startswith(".") or name.endswith(".tmp")


def is_spool_file(entry: "os.DirEntry[str]") -> bool:
    """May it be read, once it is complete?"""
    return entry.name.endswith(SUFFIXES) and entry.is_file(follow_symlinks=False)


def look_into(incoming: Path) -> Incoming:
    """What waits there, and what never will be taken; nothing, where the folder cannot be read."""
    ages, ignored = [], []
    with contextlib.suppress(OSError), os.scandir(incoming) as entries:
        now = time.time()
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if not is_spool_file(entry):
                ignored.append(printable(entry.name))
                continue
            with contextlib.suppress(OSError):
                # Not st_mtime, which `mv`, `cp -p` and rsync bring along: it may be of years ago, or of tomorrow.
                ages.append(now - entry.stat(follow_symlinks=False).st_ctime)
    return Incoming(len(ages), max([0.0, *ages]), sorted(ignored))


class Signature(NamedTuple):
    """What changes when a file does."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Signature":
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def user() -> str:
    """Who we are, for messages about permissions."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without an account
        return f"uid {os.getuid()}"


def make_folders(folders: Iterable[Path]) -> None:
    """Creates what is missing.

    Raises:
        SpoolError: one cannot be made or written.
    """
    for folder in folders:
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                try:
                    folder.chmod(FOLDER_MODE)
                except PermissionError:
                    pass  # RestrictSUIDSGID= of our unit; the bit is inherited, and tmpfiles.d makes what a group needs
        except OSError as error:
            raise SpoolError(f"{folder}: user {user()} cannot make this folder: {error.strerror}") from error
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError(f"{folder}: user {user()} needs to read and write it; check its owner and mode")


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_plain(path: str | Path) -> int:
    """A descriptor for reading; never follows a link, never waits for a pipe."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_whole(fd: int, limit: int) -> bytes | None:
    """The content from the start; None if it is longer than the limit."""
    parts: list[bytes] = []
    left = limit + 1
    while left > 0 and (data := os.read(fd, left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts) if left > 0 else None


def move(source: str, target: str, inode: int) -> bool:
    """Moves a file, unless somebody has put another in its place since it was read: that one stays.

    On its way it lies in `.moving/`, from where `return_half_moved` brings it back after a crash: it is looked at only
    once nobody can replace it any more, and until then it may be one that nobody has read.
    """
    spool, _, name = source.rsplit("/", 2)
    between = f"{spool}/{MOVING}/{name}"
    # Plain calls: every file of a storm comes through here, and pathlib costs more than they do.
    os.rename(source, between)  # noqa: PTH104
    try:
        if os.lstat(between).st_ino == inode:
            os.rename(between, target)  # noqa: PTH104
            return True
    except OSError:
        _bring_back(Path(between), Path(source))
        raise
    _bring_back(Path(between), Path(source))
    return False


def return_half_moved(incoming: Path) -> list[str]:
    """Brings back to `incoming` what a crash left in `.moving/`; returns the names."""
    moving = incoming.parent / MOVING
    names = sorted(path.name for path in moving.iterdir()) if moving.is_dir() else []
    for name in names:
        _bring_back(moving / name, incoming / name)
    return names


def _bring_back(between: Path, source: Path) -> None:
    while os.path.lexists(source):  # another one has come to the old place
        source = source.with_name(f"again-{source.name}")
    between.rename(source)


class Lease(enum.Enum):
    """What is known about those who may be writing to a file."""

    HELD = "nobody writes it, and whoever opens it now to write must wait until we let go"
    WRITTEN = "somebody has it open for writing"
    UNKNOWN = "the kernel does not say"


def take_lease(fd: int) -> Lease:
    """Asks the kernel for a read lease, which it grants only on a file that nobody has open for writing.

    It needs a local file system and a file of our own (or CAP_LEASE). Closing the descriptor gives it back.
    """
    try:
        # A writer that comes meanwhile would send SIGIO, which kills; SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return Lease.WRITTEN
    except OSError:
        return Lease.UNKNOWN
    return Lease.HELD


def is_wanted(fd: int) -> bool:
    """Whether somebody waits for our lease, to write to the file."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def printable(name: str) -> str:
    """A file name as it can be stored and logged: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def write_errors_file(ledger: Ledger, stored_as: str, name: str, path: Path) -> BadLine | None:
    """Writes what of a file cannot be trained, durably and atomically. Safe to repeat.

    Args:
        stored_as: in done/ or failed/.
        name: as it was dropped.

    Returns:
        The first of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    first: BadLine | None = None
    row = (0, -1)
    temporary.unlink(
        missing_ok=True
    )  # a new file: an fsync that has failed is not tried again on the same one
    with private(temporary) as file:
        while page := ledger.errors(stored_as, after=row):
            row = page[-1][:2]
            first = first or page[0][2]
            file.writelines(
                orjson.dumps(
                    {
                        "file": name,
                        "line": line.line_no,
                        "offset": line.byte_offset,
                        "field": line.field,
                        "reason": line.reason,
                        "excerpt": line.excerpt,
                    }
                )
                + b"\n"
                for _, _, line in page
            )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return first
