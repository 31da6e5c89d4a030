"""Checkpoints and history together, on one thread that takes a small share of the machine: training and serving go
first.

A save is durable before anything is compressed: first the checkpoint, then its entry in history, then what is too old
goes. The checkpoint may take the larger share, because what it holds is the more of one moment the sooner it is
written. Nothing is held back while somebody waits for it.
"""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from hogwild import log as logs
from hogwild import pulse
from hogwild.checkpoint import Checkpoints
from hogwild.errors import CheckpointError
from hogwild.files import paced
from hogwild.history import History
from hogwild.history_write import PutOffError
from hogwild.learner import Learner, Saved
from hogwild.settings import CheckpointConfig, Config

log = logs.get(__name__)

T = TypeVar("T")

SAVING, TIDYING = 0.125, 0.03  # of all cores
FSYNC_S = 600.0
"""An fsync of a large model on a slow disk says nothing for minutes, and is no hang."""


class Keeper:
    """What is kept of the model on disk.

    Attributes:
        unrecorded: why `tidy` failed when it last had its turn; empty: it did not.

    Raises:
        CheckpointError: the folders cannot be made or written.
    """

    def __init__(self, config: Config) -> None:
        root = config.state_dir
        self.checkpoints = Checkpoints(root / "checkpoints", config.checkpoint.keep)
        self.history = History(root / "history", self.checkpoints, config.history)
        self.configure(config)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.hurry = threading.Event()
        self.unrecorded = ""
        self._saving: Future[Saved] | None = None
        self._choosing = threading.Lock()  # what `current` leads to: what it will, must stay

    def configure(self, config: Config) -> None:
        """Take over settings, also while a save is under way."""
        settings: CheckpointConfig = config.checkpoint
        self.checkpoints.keep = settings.keep
        self.checkpoints.max_age_s = settings.max_age_s
        self.checkpoints.max_bytes = int(settings.max_gib * 2**30)
        self.history.config = config.history

    def background(self, work: Callable[[], T], share: float = 1.0) -> Future[T]:
        """Have the thread do this after what it has to do already, in a share of all cores' time."""

        def run() -> T:
            with (
                paced(min(share * (os.cpu_count() or 1), 1.0), self.hurry),
                pulse.watched("checkpoint", FSYNC_S),
            ):
                return work()

        return self._thread.submit(run)

    @property
    def saving(self) -> bool:
        """Is a checkpoint being written?"""
        return self._saving is not None

    def start_saving(self, learner: Learner, about: Mapping[str, Any], *, urgent: bool = False) -> None:
        """Begin a checkpoint; `saved` will tell what became of it. `urgent`: somebody waits for it."""
        assert self._saving is None
        self._saving = self.background(
            lambda: learner.save(self.checkpoints, about), 1.0 if urgent else SAVING
        )

    def save(self, learner: Learner, about: Mapping[str, Any]) -> Saved | CheckpointError:
        """Write a checkpoint in the calling thread, at once; nothing else may be under way but tidying."""
        self.settle()
        try:
            with pulse.watched("checkpoint", FSYNC_S):
                return learner.save(self.checkpoints, about)
        except CheckpointError as error:
            return error

    def saved(self, *, wait: bool = False) -> Saved | CheckpointError | None:
        """What became of the checkpoint that was begun, once; None while it is under way, or if there is none.

        Raises:
            HogwildError: something else failed, such as the ledger.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return None
        future, self._saving = self._saving, None
        self.hurry.set()
        try:
            saved = future.result()
        except CheckpointError as error:
            return error
        finally:
            self.hurry.clear()
        self.start_tidying()
        return saved

    def start_tidying(self) -> None:
        """Bring history up to date in the background."""
        self.background(self.tidy, TIDYING)

    def tidy(self) -> None:
        """Bring history up to date, and let go of what is too old. Failures are logged: nothing depends on them."""
        self.unrecorded = self._tidy()

    def _tidy(self) -> str:
        """What went wrong; empty: nothing did."""
        try:
            for recorded in self.history.record():
                log.info(
                    "history.recorded",
                    generation=recorded.generation,
                    mib=round(recorded.nbytes / 2**20, 1),
                    of_mib=round(recorded.full_bytes / 2**20, 1),
                    base=recorded.base,
                    ms=round(recorded.seconds * 1000),
                )
            if self._choosing.acquire(blocking=False):  # or at the next chance
                try:
                    self._prune()
                finally:
                    self._choosing.release()
        except PutOffError:
            return self.unrecorded  # it is done at the next chance
        except CheckpointError as error:
            log.error("history.failed", error=str(error))
            return str(error)
        except Exception as error:  # nobody else looks at what this thread does
            log.exception("history.failed", error=repr(error))
            return repr(error)
        return ""

    def _prune(self) -> None:
        folders = self.checkpoints.prune(self.history.may_go)
        forgotten = self.history.prune()
        if folders or forgotten:
            log.info("checkpoint.pruned", folders=folders, forgotten=forgotten)

    def settle(self) -> None:
        """Wait until the thread has nothing to do. Tidying is put off, a checkpoint is finished."""
        self.history.interrupt.set()
        self.hurry.set()
        try:
            self.background(lambda: None).result()
        finally:
            self.history.interrupt.clear()
            self.hurry.clear()

    def close(self) -> None:
        """Put off what can wait, and end the thread."""
        self.history.interrupt.set()
        self.hurry.set()
        self._thread.shutdown(wait=True)

    def restore_current(self) -> Path | None:
        """The newest checkpoint, verified. One that is damaged is made anew from history; where that is impossible,
        the last good generation before it takes its place. Whatever the thread is at meanwhile.

        Raises:
            CheckpointError: it is damaged and no generation but the model as it came is whole.
        """
        with self._choosing:
            return self._restore_current()

    def _restore_current(self) -> Path | None:
        number = self.checkpoints.current_generation()
        if number is None:
            return None
        asked = number
        while True:
            try:
                folder = self.history.restore(number)
                break
            except CheckpointError as error:
                good = self.history.last_good(number)
                # None, or generation 0: all that was learned would be gone. The same one: the disk is to blame.
                if not good or good == number:
                    raise
                log.error("history.fell_back", generation=number, to=good, error=str(error))
                number = good
        if number != asked:
            self.checkpoints.point_current_at(number)
        return folder
