"""Who works in a state folder: a lock that goes with its process, in a file that names the process. Imports no torch.

A process id alone proves nothing, because the kernel gives it to others later; the lock does, because it is gone the
moment its holder is.
"""

import fcntl
import os
import time
from pathlib import Path

from hogwild.errors import ConfigError, HogwildError

NAME = "daemon.lock"
_PATIENCE_S = 1.0  # `holder` takes the lock for a moment: that must not keep a daemon from starting


def take(state_dir: Path) -> int:
    """Take the state folder for this process; returns the descriptor that holds the lock.

    Raises:
        ConfigError: the folder cannot be made or used.
        HogwildError: another daemon has it.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(state_dir / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir} cannot be used by user {os.geteuid()}: {error}") from error
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(fd)
                raise HogwildError(
                    f"another daemon works in {state_dir}: stop it, or give another state_dir"
                ) from error
            time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def holder(state_dir: Path) -> int | None:
    """Process id of the daemon that works in `state_dir` now, or None.

    Raises:
        HogwildError: the lock cannot be looked at.
    """
    try:
        fd = os.open(state_dir / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HogwildError(f"{state_dir / NAME} cannot be read by user {os.geteuid()}: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(fd, 32, 0)
        return int(text) if text.strip().isdigit() else None  # it is being written: a daemon that just starts
    finally:
        os.close(fd)
