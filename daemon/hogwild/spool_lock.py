"""Which daemon takes files from a spool: of two, with state folders of their own, each would learn what it finds first.

The lock lies beside incoming/, where nobody else has to write, and no scan looks. An open file keeps its disk from
being unmounted (docs/spool.md).
"""

import errno
import os
from pathlib import Path

from hogwild import log, state_lock
from hogwild.errors import SpoolError, SpoolTakenError
from hogwild.spool_files import user

logger = log.get(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Of some network file systems, where people drop files all the same."""
NAME = ".daemon.lock"  # not the state folder's name: the two folders may be one


class SpoolLock:
    """One daemon's lock on one spool folder, held from the first `hold` until `let_go`, or the end of the process."""

    def __init__(self, spool: Path) -> None:
        self._path = spool / NAME
        self._fd: int | None = None
        self._warned = False

    def hold(self) -> None:
        """Take the lock; again, where the folder has been mounted or replaced since. Cheap while it is held. Where the
        file system knows no locks, a warning has to do.

        Raises:
            SpoolTakenError: another daemon has it.
            SpoolError: the folder is not there, or cannot be written or locked.
        """
        try:
            if self._is_held():
                return
            fd = state_lock.lock(self._path)
        except state_lock.HeldError as error:
            raise SpoolTakenError(
                f"another daemon takes files from {self._path.parent} ({error.who}): stop it, or give another spool.dir"
            ) from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._go_without(error)
                return
            raise SpoolError(
                f"{self._path}: user {user()} cannot lock it: {error.strerror}; check its owner and mode"
            ) from error
        self.let_go()
        self._fd = fd

    def let_go(self) -> None:
        """As the end of the process would: a disk that was unmounted lazily is free then."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _go_without(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("spool.unlocked", folder=str(self._path.parent), error=str(error))

    def _is_held(self) -> bool:
        try:
            return self._fd is not None and os.path.samestat(os.fstat(self._fd), self._path.lstat())
        except FileNotFoundError:
            return False
