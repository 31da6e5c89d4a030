"""What comes next, for several trainer threads: which new example, and which learned ones beside it.

New examples go in the ledger's order: fewest passes first, then priority, then arrival. So the passes of one example
lie as far apart as there are others. Where there are too few others, steps of replay alone come in between; only an
example with nothing to replay beside it, neither learned examples nor texts of the model's own, gets its passes back
to back. The order is read in chunks, so that memory does not grow with the backlog. One thread always gets the same
order for the same files, restarted or not: everything follows from the ledger, the seed and the number of the step.
"""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hogwild.ledger import Ledger
from hogwild.ledger_records import Pending
from hogwild.replay import Replay
from hogwild.settings import ReplayConfig

if TYPE_CHECKING:  # torch takes seconds to import, and the intake does without
    from hogwild.selfreplay import Sample

CHUNK = 256
BYTES_PER_TOKEN = 4  # of a line of JSON, roughly: how long an example is before it is tokenised


@dataclass
class Batch:
    """What goes into one training step: new examples first, then learned ones, then texts of the model's own."""

    new: list[Pending] = field(default_factory=list)
    replayed: list[Pending] = field(default_factory=list)
    own: "list[Sample]" = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.new) + len(self.replayed) + len(self.own)

    @property
    def examples(self) -> list[Pending]:
        """Those that are in the ledger."""
        return [*self.new, *self.replayed]

    def __iter__(self) -> "Iterator[Pending | Sample]":
        yield from self.new
        yield from self.replayed
        yield from self.own


class Curriculum:
    """Hands out batches; never one new example to two threads at once.

    Args:
        config: how much is replayed, and how it is chosen.
        seed: of the choice.
        step_tokens: new examples are put into one step up to about so many tokens; 0: one example a step.
    """

    def __init__(
        self,
        ledger: Ledger,
        config: ReplayConfig | None = None,
        *,
        seed: int = 0,
        step_tokens: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        self._ledger, self._config = ledger, config or ReplayConfig()
        self._chunk, self._step_tokens = chunk, step_tokens
        self.replay = Replay(ledger.pool, self._config, seed)
        self._queue: deque[Pending] = deque()
        self._taken: set[int] = set()
        self._out: dict[int, Batch] = {}  # handed out and not done, by identity: steps that are on their way
        self._changed = threading.Condition()
        self._closed = False

    def take(self, timeout: float | None = None, *, step: int = 0) -> Batch | None:
        """The next step's examples; the caller owns the new ones until `done` or `give_back`.

        Args:
            timeout: seconds to wait for a new example; None: until there is one.
            step: training steps finished so far.

        Returns:
            None after the timeout, or once the curriculum is closed. Without a new example only where the next one
            has just been trained and something else should come in between.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._may_begin(), timeout) or self._closed:
                return None
            step += len(self._out)
            head = self._queue[0]
            back_to_back = head.last_step is not None and 0 <= step - head.last_step < self._config.spacing
            if back_to_back and self._config.ratio > 0:
                between = Batch([], *self.replay.choose(step, [], max(self.replay.due(step, 1), 1)))
                if len(between):
                    self._out[id(between)] = between
                    return between
            new = self._pop()
            try:
                due = 0 if new[0].crashes else self.replay.due(step, len(new))
                batch = Batch(new, *self.replay.choose(step, new, due))
            except BaseException:
                self._queue.extendleft(reversed(new))
                raise
            self._taken.update(one.example_id for one in new)
            self._out[id(batch)] = batch
            return batch

    def done(self, batch: Batch) -> None:
        """The passes are recorded in the ledger, or the examples were set aside there."""
        with self._changed:
            self._out.pop(id(batch), None)
            self._taken.difference_update(one.example_id for one in batch.new)
            self._changed.notify_all()

    def give_back(self, batch: Batch) -> None:
        """Not trained after all: the order is read anew, for what held it up may have changed its examples."""
        self.done(batch)
        self.wake()

    def wake(self) -> None:
        """The ledger changed: new examples, or passes undone. The order is read anew."""
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """`take` returns None from now on, also to those who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def forgotten(self, one: Pending, loss: float) -> bool:
        """A replayed example was measured: if it was to be trained until a loss and is clearly above it again, it is
        opened again for a few passes. At most `replay.max_reopened` times, so that what does not fit beside the rest
        cannot keep the trainers busy for ever."""
        config = self._config
        if one.until_loss is None or loss <= one.until_loss * config.reopen_factor:
            return False
        if not self._ledger.pool.reopen(
            one.example_id, passes=config.reopen_passes, at_most=config.max_reopened
        ):
            return False
        self.wake()
        return True

    @property
    def in_flight(self) -> int:
        """Batches that are being trained right now."""
        with self._changed:
            return len(self._out)

    def under_way(self) -> list[Pending]:
        """The examples of these batches."""
        with self._changed:
            return [one for batch in self._out.values() for one in batch.examples]

    def _may_begin(self) -> bool:
        """Is there a step to make now? What the daemon has ended with is tried alone, beside no other step either: if
        it happens again, it is known who was in it."""
        if not self._refill():
            return False
        if self._queue[0].crashes:
            return not self._out
        return not any(one.crashes for batch in self._out.values() for one in batch.new)

    def _pop(self) -> list[Pending]:
        """One new example, or several under the budget of tokens. They have as many passes behind them."""
        new = [self._queue.popleft()]
        tokens = _tokens(new[0])
        if new[0].crashes:
            return new
        while (
            self._queue
            and not self._queue[0].crashes
            and tokens + _tokens(self._queue[0]) <= self._step_tokens
        ):
            if self._queue[0].passes_done != new[0].passes_done:
                break
            tokens += _tokens(self._queue[0])
            new.append(self._queue.popleft())
        return new

    def _refill(self) -> bool:
        if not self._queue:
            self._queue.extend(self._ledger.pending(self._chunk, self._taken))
        return bool(self._queue)


def _tokens(one: Pending) -> int:
    return len(one.line) // BYTES_PER_TOKEN + 1
