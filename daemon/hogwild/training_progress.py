"""How far training is: the step counter of all trainer threads, and the weight epoch."""

import threading
import time

from hogwild.arena.control import ControlPage


class Progress:
    """The one step counter of all trainer threads and the weight epoch, mirrored to the control page for the server.

    An epoch is the time within which answers may share cached keys and values. It ends after the first step and every
    `updates_per_epoch` ones from there, `epoch_s` seconds after it began if weights have moved in it (`tick`), and when
    training comes to rest (`settle`).
    """

    def __init__(self, control: ControlPage, updates_per_epoch: int, epoch_s: float = 0.0) -> None:
        self._control, self._updates_per_epoch, self._epoch_s = control, updates_per_epoch, epoch_s
        self._lock = threading.Lock()  # around counters, not around weights
        self._moved = (
            control.trained
        )  # by a daemon before this one, which may have ended in the middle of an epoch
        self._began = time.monotonic()
        self.steps = control.steps

    def resume(self, steps: int, epoch: int) -> None:
        """Other weights are in place, of a checkpoint with this step and epoch: both counters only grow."""
        with self._lock:
            self.steps = self._control.steps = max(self.steps, steps)
            self._begin_epoch(max(self._control.epoch, epoch) + 1)

    def new_epoch(self) -> None:
        """The weights are about to be replaced: answers from now on are of neither the old nor the new ones."""
        with self._lock:
            self._begin_epoch(self._control.epoch + 1)

    @property
    def epoch(self) -> int:
        """The weight epoch as it is now."""
        return self._control.epoch

    def moved(self) -> None:
        """A weight has been written. From any thread, without a lock, as weights are."""
        self._moved = True

    def advance(self) -> int:
        """Count one finished step and return its number, from 1."""
        with self._lock:
            self.steps += 1
            self._control.steps = self.steps
            if (self.steps - 1) % self._updates_per_epoch == 0:
                self._begin_epoch(self._control.epoch + 1)
            return self.steps

    def tick(self) -> None:
        """Called every second or so: ends an epoch that has lasted long enough and in which weights have moved."""
        if self._epoch_s and time.monotonic() - self._began >= self._epoch_s:
            self.settle()

    def settle(self) -> None:
        """Nothing is left to train for now: what is answered from here on comes from the weights as they are."""
        with self._lock:
            if self._moved:
                self._begin_epoch(self._control.epoch + 1)

    def _begin_epoch(self, number: int) -> None:
        # In this order: a write that comes in between is noted again, and costs an epoch; it is never missed.
        self._moved = False
        self._began = time.monotonic()
        self._control.epoch = number
