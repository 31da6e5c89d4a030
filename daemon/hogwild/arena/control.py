"""The control page: what daemon and server tell each other without any call.

One 4 KiB page of shared memory beside the weights. Every field is one aligned 8-byte word (or a byte string that is
written once, before the page changes hands), has exactly one writer, and is read without a lock: a reader sees the
old value or the new one.
"""

import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hogwild.arena.memory import Segment
from hogwild.errors import ArenaError

MAGIC = b"HOGWILD\x01"
NBYTES = 4096

# offset, written once by the process that makes the arena
_MAGIC, _ARENA_ID, _FINGERPRINT = 0, 8, 24  # 8, 16 and 32 bytes
# offset, written by the daemon
_STEPS, _EPOCH, _TRAINED, _GENERATION, _DAEMON_BEAT, _RESTORING = 64, 72, 80, 88, 96, 104
# offset, written by the server's engine
_GAUGES = 128
# offset of the first gauge; each has one writer, an API server process
_GAUGE, _GAUGE_NBYTES, MAX_GAUGES = 192, 64, 32
# offset within a gauge
_IN_FLIGHT, _BEAT, _RUNNING, _WAITING, _STATS_BEAT, _TOKENS, _WAITED_NS = 0, 8, 16, 24, 32, 40, 48

DAEMON_ALIVE_S = 10.0
"""A daemon beats once a second; one that has not for this long is gone, or stopped."""
SERVER_ALIVE_S = 5.0
"""What a server has said counts for this long; one that is killed does not take its requests back."""


@dataclass(frozen=True)
class Load:
    """What the server has to do.

    Attributes:
        in_flight: requests over HTTP from their arrival to the end of their answers.
        running, waiting: requests in the engine, as of its last step.
        tokens: tokens that came after another one of the same answer, since the server started.
        waited_s: seconds between each of them and the one before, in all.
    """

    in_flight: int
    running: int
    waiting: int
    tokens: int
    waited_s: float


class ControlPage:
    """Typed access to a mapped control page."""

    def __init__(self, segment: Segment) -> None:
        if segment.nbytes != NBYTES:
            raise ArenaError(f"a control page has {NBYTES} bytes, this one has {segment.nbytes}")
        self.segment = segment
        if self._read(_MAGIC, 8) != MAGIC:
            raise ArenaError(
                f"the control page starts with {self._read(_MAGIC, 8)!r}, not {MAGIC!r}: daemon and server run "
                "different versions of hogwild. Install the same version for both and restart both."
            )

    @classmethod
    def create(cls, fingerprint: bytes) -> "ControlPage":
        """Make the page of a new arena. `fingerprint`: 32 bytes, of its layout."""
        segment = Segment.allocate(NBYTES, "hogwild-control")
        segment.mapping[_MAGIC : _MAGIC + 8] = MAGIC
        segment.mapping[_ARENA_ID : _ARENA_ID + 16] = uuid.uuid4().bytes
        segment.mapping[_FINGERPRINT : _FINGERPRINT + 32] = fingerprint
        return cls(segment)

    @property
    def arena_id(self) -> str:
        """Names this allocation; a new one is made whenever weights are loaded from disk."""
        return self._read(_ARENA_ID, 16).hex()

    @property
    def fingerprint(self) -> bytes:
        """Digest of the layout, 32 bytes."""
        return self._read(_FINGERPRINT, 32)

    @property
    def steps(self) -> int:
        """Optimizer steps applied to these weights."""
        return self._word(_STEPS)

    @steps.setter
    def steps(self, value: int) -> None:
        self._set_word(_STEPS, value)

    @property
    def epoch(self) -> int:
        """Weight epoch: grows whenever the weights have moved enough for answers to differ, and never shrinks."""
        return self._word(_EPOCH)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._set_word(_EPOCH, value)

    @property
    def trained(self) -> bool:
        """Has the daemon written to these weights? Set before the first write, never cleared."""
        return bool(self._word(_TRAINED))

    def mark_trained(self) -> None:
        self._set_word(_TRAINED, 1)

    @property
    def restoring(self) -> bool:
        """Is another version being written over these weights? Found set after a crash, they are worth nothing."""
        return bool(self._word(_RESTORING))

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Around writing a checkpoint into the arena: a crash (or an error) inside leaves `restoring` set.

        Whoever finds it set writes a whole checkpoint again, and trusts nothing that lies there.
        """
        self._set_word(_RESTORING, 1)
        self.mark_trained()
        yield
        self._set_word(_RESTORING, 0)

    @property
    def generation(self) -> int:
        """Number of the checkpoint that these weights descend from; 0 is the model as it came."""
        return self._word(_GENERATION)

    @generation.setter
    def generation(self, value: int) -> None:
        self._set_word(_GENERATION, value)

    def beat_daemon(self) -> None:
        """Say that the daemon is alive, now."""
        self._set_word(_DAEMON_BEAT, time.monotonic_ns())

    @property
    def daemon_age_s(self) -> float | None:
        """Seconds since the daemon last said that it is alive; None if it never did."""
        return self._age(_DAEMON_BEAT)

    @property
    def daemon_alive(self) -> bool:
        """Does a daemon work on these weights?"""
        age = self.daemon_age_s
        return age is not None and age < DAEMON_ALIVE_S

    def new_gauge(self) -> "Gauge":
        """Engine: one more API server process will say what it has to do; more than MAX_GAUGES share the last one."""
        number = self._word(_GAUGES)
        if number < MAX_GAUGES:
            self._set_word(_GAUGES, number + 1)
        return self.gauge(min(number, MAX_GAUGES - 1))

    def gauge(self, number: int) -> "Gauge":
        """API server: where it says what it has to do."""
        return Gauge(self, number)

    @property
    def busy(self) -> bool:
        """Does anybody wait for an answer? Cheap enough to be asked between two layers."""
        return any(in_flight or running + waiting for in_flight, running, waiting, *_ in self._said())

    @property
    def load(self) -> Load:
        """What all API server processes have said last."""
        said = list(self._said())
        in_flight, running, waiting, tokens, waited_ns = (
            map(sum, zip(*said, strict=True)) if said else (0,) * 5
        )
        return Load(in_flight, running, waiting, tokens, waited_ns / 1e9)

    def _said(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each API server process: requests in flight, running and waiting, as far as that still counts; tokens, and
        nanoseconds that they took."""
        now = time.monotonic_ns()
        for number in range(min(self._word(_GAUGES), MAX_GAUGES)):
            in_flight, beat, running, waiting, stats_beat, tokens, waited_ns = struct.unpack_from(
                "<7Q", self.segment.mapping, _GAUGE + number * _GAUGE_NBYTES
            )
            if now - beat >= SERVER_ALIVE_S * 1e9:
                in_flight = 0
            if now - stats_beat >= SERVER_ALIVE_S * 1e9:
                running = waiting = 0
            yield in_flight, running, waiting, tokens, waited_ns

    def _age(self, offset: int) -> float | None:
        beat = self._word(offset)
        return (time.monotonic_ns() - beat) / 1e9 if beat else None

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self.segment.mapping[offset : offset + length])

    def _word(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.segment.mapping, offset)[0])

    def _set_word(self, offset: int, value: int) -> None:
        # Not struct.pack_into, which clears the place first: a reader must see the old value or the new one.
        with memoryview(self.segment.mapping) as view, view.cast("Q") as words:
            words[offset // 8] = value


class Gauge:
    """What one API server process says on a control page. It alone writes there."""

    def __init__(self, page: ControlPage, number: int) -> None:
        self.number, self._page, self._offset = number, page, _GAUGE + number * _GAUGE_NBYTES

    def word(self, offset: int) -> int:
        return self._page._word(self._offset + offset)

    def set_in_flight(self, requests: int) -> None:
        """Requests whose answers are not complete. To be said again within SERVER_ALIVE_S while there are any."""
        self._set(_IN_FLIGHT, requests)
        self._set(_BEAT, time.monotonic_ns())

    def set_engine(self, running: int, waiting: int) -> None:
        """Requests in the engine, after one of its steps."""
        self._set(_RUNNING, running)
        self._set(_WAITING, waiting)
        self._set(_STATS_BEAT, time.monotonic_ns())

    def add_tokens(self, tokens: int, waited_s: float) -> None:
        """So many more tokens came, each after one of the same answer; and how long that took, in all."""
        self._set(_TOKENS, self.word(_TOKENS) + tokens)
        self._set(_WAITED_NS, self.word(_WAITED_NS) + round(max(waited_s, 0.0) * 1e9))

    def _set(self, offset: int, value: int) -> None:
        self._page._set_word(self._offset + offset, value)
