"""Which example comes next, for several trainer threads.

The order is the ledger's: fewest passes first, then priority, then arrival. It is read in chunks, so that
memory does not grow with the backlog. One thread always gets the same order for the same files.
"""

import threading
from collections import deque

from hogwild.ledger import Ledger
from hogwild.ledger_records import Pending

CHUNK = 256


class Curriculum:
    """Hands out pending examples; never one example to two threads at once."""

    def __init__(self, ledger: Ledger, *, chunk: int = CHUNK) -> None:
        self._ledger = ledger
        self._chunk = chunk
        self._queue: deque[Pending] = deque()
        self._taken: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False

    def take(self, timeout: float | None = None) -> Pending | None:
        """The next example, which the caller owns until `done` or `give_back`.

        Args:
            timeout: seconds to wait for one; None: until there is one.

        Returns:
            None after the timeout, or once the curriculum is closed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._refill(), timeout) or self._closed:
                return None
            pending = self._queue.popleft()
            self._taken.add(pending.example_id)
            return pending

    def done(self, pending: Pending) -> None:
        """The pass is recorded in the ledger, or the example was set aside there."""
        with self._changed:
            self._taken.discard(pending.example_id)
            self._changed.notify_all()

    def give_back(self, pending: Pending) -> None:
        """Not trained after all: it is the next one."""
        with self._changed:
            if pending.example_id in self._taken:
                self._taken.remove(pending.example_id)
                self._queue.appendleft(pending)
                self._changed.notify_all()

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

    @property
    def in_flight(self) -> int:
        """Examples that are being trained right now."""
        with self._changed:
            return len(self._taken)

    def _refill(self) -> bool:
        if not self._queue:
            self._queue.extend(self._ledger.pending(self._chunk, self._taken))
        return bool(self._queue)
