"""File-system manners of the spool: folders, durable writes, and who else has a file open."""

import fcntl
import getpass
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from hogwild.errors import SpoolError
from hogwild.ledger import Ledger
from hogwild.ledger_records import BadLine, FileRecord

MOVING = ".moving"  # beside incoming/: files on their way out of it
FOLDER_MODE = 0o2770  # a group drops files in; set-group-id keeps them the group's


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
                folder.chmod(FOLDER_MODE)
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


def open_plain(path: Path) -> BinaryIO:
    """Opens for reading; never follows a link, never waits for a pipe."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def move_if_same(source: Path, target: Path, signature: Signature) -> bool:
    """Moves a file, unless somebody has replaced it by another since it was read: that one stays.

    On its way it lies in `.moving/`, from where `return_half_moved` brings it back after a crash: it is looked at only
    once nobody can replace it any more, and until then it may be one that nobody has read.
    """
    between = source.parent.parent / MOVING / source.name
    source.rename(between)
    if Signature.of(between.lstat()) == signature:
        between.rename(target)
        return True
    _bring_back(between, source)
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


def is_open_for_writing(fd: int) -> bool:
    """Whether anybody has this file open for writing. False where that cannot be known.

    The kernel grants a read lease only on a file that nobody writes. It needs a local file system and a file
    of our own (or CAP_LEASE); everywhere else only the settling time protects.
    """
    try:
        # A writer that comes while the lease is held would send SIGIO, which kills; SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def write_errors_file(ledger: Ledger, record: FileRecord, path: Path) -> BadLine:
    """Writes a file's bad lines from the ledger, durably, and returns the first. Safe to repeat."""
    temporary = path.with_name(f".{path.name}.tmp")
    first: BadLine | None = None
    row = 0
    with temporary.open("wb") as file:
        while page := ledger.rejected(record.file_id, after_row=row):
            for row, line in page:  # noqa: B007  # the last row is where the next page begins
                first = first or line
                file.write(
                    orjson.dumps(
                        {
                            "file": record.name,
                            "line": line.line_no,
                            "offset": line.byte_offset,
                            "field": line.field,
                            "reason": line.reason,
                            "excerpt": line.excerpt,
                        }
                    )
                    + b"\n"
                )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    assert first is not None
    return first
