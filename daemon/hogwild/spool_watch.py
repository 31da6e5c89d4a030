"""File events as hints: they may be lost, late or silent without harm, because scans find everything.

inotify is read by the thread that scans, between two scans. So there is no observer thread that could die, no
queue of events in this process, and what the kernel says about the watch itself is heard: events that were
dropped, a folder that was removed, renamed or unmounted.
"""

import ctypes
import errno
import os
import select
import struct
from pathlib import Path

from hogwild import log

# <sys/inotify.h>
IN_CLOSE_WRITE, IN_MOVED_TO, IN_CREATE = 0x8, 0x80, 0x100
IN_DELETE_SELF, IN_MOVE_SELF, IN_UNMOUNT = 0x400, 0x800, 0x2000
IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR = 0x4000, 0x8000, 0x1000000
_HINTS = (
    IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE
)  # a hard link is only created; our own reading is none of these
_GONE = {
    IN_UNMOUNT: "the file system was unmounted",
    IN_MOVE_SELF: "the folder was renamed",
    IN_DELETE_SELF: "the folder was removed",
    IN_IGNORED: "the kernel ended the watch",
}
_HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_READ_BYTES = 256 * 1024

logger = log.get(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Waits until something happens in a folder, or `wake` is called, or time is up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._inotify: int | None = None
        self._watched: tuple[int, int] | None = None
        self._unwatched = False

    def __del__(self) -> None:
        self.close()
        os.close(self._wake)

    def wake(self) -> None:
        """Ends `wait`, the present one or the next. From any thread."""
        os.eventfd_write(self._wake, 1)

    def ensure(self) -> None:
        """Watches the folder that is at the path now; says what it heals. Call it before a scan.

        Raises:
            OSError: there is no such folder.
        """
        stat = self._folder.stat()
        identity = (stat.st_dev, stat.st_ino)
        if self._inotify is not None and self._watched != identity:
            self._restart("another folder is at its place")
        if self._inotify is not None:
            return
        try:
            self._inotify = _call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
            mask = _HINTS | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
            _call("inotify_add_watch", self._inotify, os.fsencode(self._folder), mask)
        except OSError as error:  # out of watches or instances, or a file system without events
            self.close()
            if not self._unwatched:
                hint = {
                    errno.ENOSPC: "raise fs.inotify.max_user_watches",
                    errno.EMFILE: "raise fs.inotify.max_user_instances",
                }.get(error.errno or 0, "this file system may have no events")
                logger.warning(
                    "spool.unwatched",
                    error=str(error),
                    hint=f"{hint}; until then files are found by rescans only",
                )
            self._unwatched = True
            return
        self._watched = identity
        if self._unwatched:
            self._unwatched = False
            logger.info("spool.watched", folder=str(self._folder))

    def wait(self, timeout_s: float, *, events: bool = True) -> None:
        """Returns at the first event, at a `wake`, or after the time.

        Args:
            events: False: do not listen to the folder, to scan less often while much is arriving.
        """
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if events and self._inotify is not None:
            poll.register(self._inotify, select.POLLIN)
        for fd, _ in poll.poll(timeout_s * 1000):
            if fd == self._wake:
                try:
                    os.eventfd_read(self._wake)
                except BlockingIOError:
                    pass  # somebody else has read it; we are awake all the same
            else:
                self._drain()

    def close(self) -> None:
        """Stops watching. `ensure` starts again."""
        if self._inotify is not None:
            try:
                os.close(self._inotify)
            except OSError:
                pass  # closed by somebody else: that is why we are here
            self._inotify = self._watched = None

    def _drain(self) -> None:
        assert self._inotify is not None
        masks = 0
        try:
            while data := os.read(self._inotify, _READ_BYTES):
                at = 0
                while at < len(data):
                    _, mask, _, length = _HEADER.unpack_from(data, at)
                    masks |= mask
                    at += _HEADER.size + length
        except BlockingIOError:
            pass
        except OSError as error:
            self._restart(f"it cannot be read: {error}")
            return
        if masks & IN_Q_OVERFLOW:
            logger.warning(
                "spool.overflow", hint="the kernel dropped file events; the scan that follows finds the files"
            )
        for bit, reason in _GONE.items():
            if masks & bit:
                self._restart(reason)
                return

    def _restart(self, reason: str) -> None:
        logger.warning("spool.watch_restarted", reason=reason)
        self.close()


def _call(function: str, *arguments: object) -> int:
    result = int(getattr(_libc, function)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result
