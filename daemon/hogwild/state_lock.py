"""Who works in a folder: a lock that goes with its process, in a file that names the process. Imports no torch.

Of a state folder here; of a spool in `spool_lock.py`. A process id alone proves nothing, because the kernel gives it to
others later; the lock does, because it is gone the moment its holder is.
"""

import fcntl
import os
import time
from pathlib import Path

from hogwild.errors import ConfigError, HogwildError

NAME = "daemon.lock"
_PATIENCE_S = 1.0  # `holder` takes the lock for a moment: that must not keep a daemon from starting


class HeldError(HogwildError):
    """The lock is another process's.

    Attributes:
        who: that process, for a message.
    """

    def __init__(self, path: Path, pid: int | None) -> None:
        self.who = "another process" if pid is None else f"process {pid}"
        if pid is not None and not _exists(pid):  # a disk that several machines mount, or containers
            self.who += " of another machine or container"
        super().__init__(f"{path} is locked by {self.who}")


def take(state_dir: Path) -> int:
    """Take the state folder for this process; returns the descriptor that holds the lock.

    Raises:
        ConfigError: the folder cannot be made or used.
        HogwildError: another daemon has it.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        return lock(state_dir / NAME)
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir} cannot be used by user {os.geteuid()}: {error}") from error
    except HeldError as error:
        raise HogwildError(
            f"another daemon works in {state_dir} ({error.who}): stop it, or give another state_dir"
        ) from error


def lock(path: Path) -> int:
    """Lock this file, which is made if need be, for as long as this process lives; returns the descriptor that holds
    the lock.

    Raises:
        OSError: it cannot be made or locked.
        HeldError: another process has locked it.
    """
    # Its folder may be one that others write to: no link of theirs is followed, because what it leads to is emptied.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise HeldError(path, _read(fd)) from error
                time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def holder(folder: Path, name: str = NAME) -> int | None:
    """Process id of the daemon that works in `folder` now, or None.

    Args:
        name: of the lock in that folder.

    Raises:
        HogwildError: the lock cannot be looked at.
    """
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HogwildError(
            f"{folder / name} cannot be read by user {os.geteuid()}: {error.strerror}: run it as the owner of that, "
            "or as root"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> int | None:
    text = os.pread(fd, 32, 0)
    return int(text) if text.strip().isdigit() else None  # it is being written: a daemon that just starts


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
