"""Signs of life of the threads that must not hang. Imports no torch.

A thread is `watched`; deep inside its work, whatever gets on calls `beat`, which costs a few hundred nanoseconds and
does nothing in a thread that is not watched. Who waits on purpose says for how long at most. A thread that has been
silent for longer hangs, and `silent` names it.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

_mine = threading.local()
_all: "dict[int, Pulse]" = {}


class Pulse:
    """One watched thread.

    Attributes:
        name: of the thread.
    """

    def __init__(self, name: str, patience_s: float) -> None:
        self.name, self._patience_s, self._ident = name, patience_s, threading.get_ident()
        self._native = threading.get_native_id()
        self._seen_due, self._seen_wait_s, self._starved_s = 0.0, 0.0, 0.0
        self.away = 0  # of how many blocks it is inside
        self.beat(0.0)

    def beat(self, within_s: float) -> None:
        self._due = time.monotonic() + within_s + self._patience_s

    @property
    def silent_s(self) -> float:
        """Seconds for which it has said nothing, beyond what it announced and what it spent waiting for a processor.

        Trainers have the lowest priority: on a machine that is busy with something else they may get next to nothing,
        and to start them again would not help. Asked for again and again, because that is when the waiting is counted.
        """
        if self.away:
            return 0.0
        due, waited_s = self._due, runqueue_wait_s(self._native)
        self._starved_s = self._starved_s + waited_s - self._seen_wait_s if due == self._seen_due else 0.0
        self._seen_due, self._seen_wait_s = due, waited_s
        return max(time.monotonic() - due - self._starved_s, 0.0)

    def stack(self) -> list[str]:
        """Where it is now, innermost call last: "file:line function"."""
        frame = sys._current_frames().get(self._ident)
        return [f"{one.filename}:{one.lineno} {one.name}" for one in traceback.extract_stack(frame)]


@contextlib.contextmanager
def watched(name: str, patience_s: float = 0.0) -> Iterator[Pulse]:
    """Inside, this thread has to beat; `patience_s` is what one piece of its work may take beyond the usual."""
    outer = getattr(_mine, "pulse", None)
    if outer is None and threading.current_thread() is not threading.main_thread():
        _name_for_top(name)
    _mine.pulse = pulse = Pulse(name, patience_s)
    _all[id(pulse)] = pulse
    try:
        yield pulse
    finally:
        _mine.pulse = outer
        del _all[id(pulse)]


def runqueue_wait_s(native_id: int) -> float:
    """Seconds for which a thread of ours was ready to run and had no processor; 0 where the kernel does not say."""
    try:
        fields = Path(f"/proc/self/task/{native_id}/schedstat").read_text().split()
        return int(fields[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _name_for_top(name: str) -> None:
    """So that `top -H` and a debugger tell threads apart; Python itself names them only from 3.14 on."""
    try:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
    except OSError:
        pass  # it is only a name


def beat(within_s: float = 0.0) -> None:
    """This thread gets on.

    Args:
        within_s: it is about to wait, on purpose, for so many seconds at most.
    """
    if (pulse := getattr(_mine, "pulse", None)) is not None:
        pulse.beat(within_s)


@contextlib.contextmanager
def away() -> Iterator[None]:
    """Inside, this thread waits for something that has limits of its own, or is watched itself; however it beats."""
    if (pulse := getattr(_mine, "pulse", None)) is None:
        yield
        return
    pulse.away += 1
    try:
        yield
    finally:
        pulse.beat(0.0)
        pulse.away -= 1


def silent(for_s: float) -> list[Pulse]:
    """Watched threads that have been silent for longer than that, the longest first."""
    found = [(pulse.silent_s, pulse) for pulse in list(_all.values())]
    return [pulse for seconds, pulse in sorted(found, key=lambda one: -one[0]) if seconds > for_s]
