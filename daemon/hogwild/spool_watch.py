"""File events as hints: they may be lost, late or silent without harm, because scans find everything.

Every scan begins with a new observer, and an observer's first event ends its watch. So whatever became of the folder
or of the observer, the next scan has one that hears; a storm costs a few events a scan instead of one a file, in
this process as in the kernel; and a full kernel queue needs no notice, since the first event in it, which is never the
one that was dropped, causes a scan, and that begins with an empty queue.
"""

import errno
import logging
import threading
from pathlib import Path

from watchdog.events import (
    DirDeletedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from hogwild import log

# A hard link is only created; a file that is moved away counts as deleted: our own moves must end the watch too, or
# there would be an event for each. Not "opened" and "closed without writing": every scan causes those.
HINTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileMovedEvent,
    FileClosedEvent,
    FileDeletedEvent,
    DirDeletedEvent,
]

logger = log.get(__name__)
# It says, as an error, that an event came after the watch had ended. Here that is how it is meant.
logging.getLogger("watchdog.observers.inotify").setLevel(logging.CRITICAL)


class Watch:
    """Waits until something happens in a folder, or `wake` is called, or time is up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._woken = self._hinted = self._removed = False
        self._observer: BaseObserver | None = None
        self._threads: list[BaseThread] = []
        self._watched: tuple[int, int] | None = None
        self._unwatched = False

    def wake(self) -> None:
        """Ends `wait`, the present one or the next. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def ensure(self) -> None:
        """Watches the folder that is at the path now; says what it heals. Call it before every scan.

        Raises:
            OSError: there is no such folder.
        """
        stat = self._folder.stat()
        identity = (stat.st_dev, stat.st_ino)
        if self._observer is not None and (reason := self._broken(identity)):
            logger.warning("spool.watch_restarted", reason=reason)
        self._retire()
        self._removed = self._hinted = False  # the scan that follows sees what they were about
        try:
            self._start()
        except (OSError, RuntimeError) as error:  # out of watches, instances or threads, or no events here
            self._retire()
            if not self._unwatched:
                hint = {
                    errno.ENOSPC: "raise fs.inotify.max_user_watches",
                    errno.EMFILE: "raise fs.inotify.max_user_instances",
                }.get(getattr(error, "errno", None) or 0, "this file system may have no events")
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

    def wait(self, timeout_s: float, *, events: bool = True) -> bool:
        """Returns at the first event since `ensure`, at a `wake`, or after the time.

        Args:
            events: False: events do not end it, to scan less often while much is arriving. They end the next wait.

        Returns:
            Whether it was ended before the time.
        """
        with self._changed:
            ended = self._changed.wait_for(lambda: self._woken or (events and self._hinted), timeout_s)
            self._woken = False
            if events:
                self._hinted = False
        return ended

    def close(self) -> None:
        """Stops watching. `ensure` starts again."""
        if (stopping := self._retire()) is not None:
            stopping.join(timeout=5)

    def hear(self, event: FileSystemEvent) -> None:
        """Called by an observer's thread."""
        with self._changed:
            self._hinted = True
            if isinstance(event, DirDeletedEvent) and event.src_path == str(self._folder):
                self._removed = True
            self._changed.notify_all()

    def _start(self) -> None:
        """Starts an observer, and notes the threads that it needs: one reads, one dispatches."""
        before = set(threading.enumerate())
        self._observer = observer = Observer()
        observer.schedule(_Once(self, observer), str(self._folder), event_filter=HINTS)
        observer.start()
        self._threads = [
            thread
            for thread in threading.enumerate()
            if isinstance(thread, BaseThread) and thread not in before
        ]

    def _retire(self) -> threading.Thread | None:
        """Stops the observer in a thread of its own: if one of its threads died holding a lock, that takes for ever."""
        observer, self._observer, self._threads = self._observer, None, []
        if observer is None:
            return None
        thread = threading.Thread(target=_stop, args=(observer,), name="watch-stop", daemon=True)
        thread.start()
        return thread

    def _broken(self, identity: tuple[int, int]) -> str | None:
        """Why the watch set by the last `ensure` may not have heard everything since."""
        assert self._observer is not None
        if self._removed:
            return "the folder was removed"
        if self._watched != identity:
            return "another folder is at its place"
        for thread in self._threads:
            if not thread.is_alive() and not thread.stopped_event.is_set():
                return f"its thread {thread.name} died"
        return None


class _Once(FileSystemEventHandler):
    """Passes on the first event and ends the watch, with what else was queued for it."""

    def __init__(self, watch: Watch, observer: BaseObserver) -> None:
        self._watch, self._observer = watch, observer

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._watch.hear(event)
        self._observer.unschedule_all()


def _stop(observer: BaseObserver) -> None:
    observer.stop()
    if observer.is_alive():
        observer.join()
