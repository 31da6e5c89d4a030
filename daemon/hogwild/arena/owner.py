"""The life of another process, on which memory of legacy CUDA IPC depends. Only the daemon watches one.

Nothing holds such memory when its owner has ended, and what others then find at its addresses is undefined. So the
daemon ends with the owner, at once and without touching anything (fail-stop). That alone is too late by a few
milliseconds: Linux closes the files of a process that dies, and the driver frees what it holds for it, before the
process's pidfd fires. What was read meanwhile must not be kept: `Owner.alive` is to be asked after reading.
"""

import os
import select
import socket
import threading
from pathlib import Path

from hogwild import log as logs
from hogwild.arena import protocol
from hogwild.errors import ArenaError

log = logs.get(__name__)

_LOOK_S = 1.0
_LAST_WORDS_S = 1.0
_EXITING = 0x4  # PF_EXITING in include/linux/sched.h


class Owner:
    """The process at the other end of a connection. Until `close`, this process ends when that one does.

    Attributes:
        pid: its number.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Begin to watch.

        Raises:
            ArenaError: it cannot be watched, or has hung up.
        """
        self.pid = protocol.peer(sock)[0]
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise ArenaError(
                f"the server's memory is gone when it ends, and process {self.pid} cannot be watched: {error}. "
                "Run daemon and server in one PID namespace."
            ) from error
        # Only now: had it ended before, the number might be another process's.
        if _ready(sock.fileno(), select.POLLRDHUP) or not self.alive:
            os.close(self._pidfd)
            raise ArenaError(f"the server, process {self.pid}, has hung up, or is not to be seen in /proc")
        self._let_go = threading.Event()
        threading.Thread(target=self._watch, name="arena-owner", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Has it not even begun to end? A process that has says so in its flags before any file is closed."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return False
        flags = int(status.rpartition(b")")[2].split()[6])
        return not flags & _EXITING and not _ready(self._pidfd, select.POLLIN)

    def close(self) -> None:
        """Watch no longer: nobody here uses its memory any more."""
        self._let_go.set()

    def _watch(self) -> None:
        while not self._let_go.is_set():
            if _ready(self._pidfd, select.POLLIN, _LOOK_S) and not self._let_go.is_set():
                _end(self.pid)
                break
        os.close(self._pidfd)


def _ready(fd: int, event: int, wait_s: float = 0.0) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(fd, event)
    return bool(poll.poll(wait_s * 1000))


def _end(pid: int) -> None:
    """End this process as it is. A log that takes no line must not keep it."""
    words = threading.Thread(target=_last_words, args=(pid,), daemon=True)
    words.start()
    words.join(_LAST_WORDS_S)
    os._exit(1)


def _last_words(pid: int) -> None:
    log.critical(
        "arena.owner_died",
        pid=pid,
        follows="this daemon ends at once, for the weights were in that server's memory; the next server begins with "
        "the newest checkpoint, and what is in none is trained again",
    )
