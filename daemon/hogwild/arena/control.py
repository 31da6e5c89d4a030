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

from hogwild.arena.memory import Segment
from hogwild.errors import ArenaError

MAGIC = b"HOGWILD\x01"
NBYTES = 4096

# offset, written once by the process that makes the arena
_MAGIC, _ARENA_ID, _FINGERPRINT = 0, 8, 24  # 8, 16 and 32 bytes
# offset, written by the daemon
_STEPS, _EPOCH, _TRAINED, _GENERATION, _DAEMON_BEAT, _RESTORING = 64, 72, 80, 88, 96, 104
# offset, written by the server
_RUNNING, _WAITING, _SERVER_BEAT = 128, 136, 144


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
        """Weight epoch: grows whenever the weights have moved enough for answers to differ."""
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
        """The newest generation that these weights descend from; 0 is the model as it came."""
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

    def publish_load(self, running: int, waiting: int) -> None:
        """Server side: requests running and waiting, now."""
        self._set_word(_RUNNING, running)
        self._set_word(_WAITING, waiting)
        self._set_word(_SERVER_BEAT, time.monotonic_ns())

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting) requests, as the server last published them."""
        return self._word(_RUNNING), self._word(_WAITING)

    def _age(self, offset: int) -> float | None:
        beat = self._word(offset)
        return (time.monotonic_ns() - beat) / 1e9 if beat else None

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self.segment.mapping[offset : offset + length])

    def _word(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.segment.mapping, offset)[0])

    def _set_word(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.segment.mapping, offset, value)
