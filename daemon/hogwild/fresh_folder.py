"""A folder that is filled whole or not at all, wherever it is: also where it may not be renamed. Imports no torch."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hogwild.errors import UsageError
from hogwild.files import fsync

UNFINISHED = ".hogwild-unfinished"
"""Folder in it, as long as it is not complete. An interrupted run leaves it, and the next one begins anew."""


def refuse(folder: Path) -> None:
    """Raises UsageError where something is that must not be written over."""
    if folder.is_symlink() and not folder.exists():
        raise UsageError(f"{folder} leads nowhere: give a folder that is empty, or does not exist")
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder / UNFINISHED).is_dir()
    ):
        raise _not_empty(folder)


def _not_empty(folder: Path) -> UsageError:
    what = "not empty" if folder.is_dir() else "no folder"
    return UsageError(f"{folder} is {what}: give a folder that is empty, or does not exist")


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A folder to write into; when the block ends, `folder` holds just what is in it. After an error it holds nothing,
    and is gone where it was not there before.

    Raises:
        UsageError: it is not empty, or somebody else fills it at this moment.
        OSError: it cannot be written.
    """
    refuse(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    lock = _begin(folder, unfinished)
    try:
        try:
            _empty(folder)
            yield unfinished
            fsync(unfinished)
            for path in unfinished.iterdir():
                path.rename(folder / path.name)
            fsync(folder)
            unfinished.rmdir()
            fsync(folder)
        except BaseException:  # also of somebody who does not wait for it
            with contextlib.suppress(OSError):
                _empty(folder)
                unfinished.rmdir()
                if made:
                    folder.rmdir()
            raise
    finally:
        os.close(lock)


def _begin(folder: Path, unfinished: Path) -> int:
    """Make `unfinished`, or take over what an interrupted run has left; locked until this is closed.

    Raises:
        UsageError: another process is at it, or has just completed the folder.
    """
    try:
        unfinished.mkdir()
        if list(folder.iterdir()) != [unfinished]:
            unfinished.rmdir()
            raise _not_empty(folder)
    except FileExistsError:
        pass
    try:
        lock = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _not_empty(folder) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:
            raise _not_empty(folder)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UsageError(f"{folder} is being written by another process: give another folder") from error
        raise
    return lock


def _empty(folder: Path) -> None:
    """Of everything but UNFINISHED itself, which holds the lock."""
    for path in folder.iterdir():
        if path.name == UNFINISHED:
            _empty(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
