"""File events as hints. They may be lost, late or silent without harm; `ensure` revives what died."""

from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from hogwild import log

# Not "opened" and "closed without writing": our own scans cause those.
HINTS = [FileCreatedEvent, FileMovedEvent, FileClosedEvent]

logger = log.get(__name__)


class Watch:
    """Calls `wake` when something happens in a folder, for as long as `ensure` is called now and then."""

    def __init__(self, folder: Path, wake: Callable[[], None]) -> None:
        self._folder = folder
        self._handler = _Wake(wake)
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self._complained = False

    def ensure(self) -> None:
        """Starts watching, or starts again if the observer died or the folder is another one by now."""
        stat = self._folder.stat()
        identity = (stat.st_dev, stat.st_ino)
        if self._observer is not None:
            alive = self._observer.is_alive() and all(
                emitter.is_alive() for emitter in self._observer.emitters
            )
            if alive and self._watched == identity:
                return
            logger.warning("spool.watch_restarted", reason="folder replaced" if alive else "observer died")
            self.close()
        observer = Observer()
        try:
            observer.schedule(self._handler, str(self._folder), event_filter=HINTS)
            observer.start()
        except OSError as error:  # out of inotify watches, or a file system without them
            if not self._complained:
                logger.warning("spool.unwatched", error=str(error), hint="files are found by rescans only")
                self._complained = True
            return
        self._observer, self._watched, self._complained = observer, identity, False

    def close(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            if self._observer.is_alive():
                self._observer.join(timeout=5)
            self._observer = None


class _Wake(FileSystemEventHandler):
    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:  # noqa: ARG002
        self._wake()
