"""Tells systemd that the daemon is starting, ready, alive or stopping; alive only while its threads are.

    starting   asks for more time, as long as nothing hangs: a server may come in an hour
    ready      once a server's weights are held and the spool was scanned; then the watchdog is fed while nothing hangs
    stopping   asks for more time while the checkpoint that is being written gets on

A hanging thread is named in the log, with the place where it hangs, before systemd ends the process for it.
"""

import threading
import time
from collections.abc import Callable

from hogwild import log as logs
from hogwild import pulse
from hogwild.notify import Notifier

log = logs.get(__name__)

LIMIT_S = 90.0
"""Seconds of silence that count as a hang, where systemd gives no period; else half the period."""
_TURN_S = 0.5
_EXTEND_S = 30
_STATUS_S = 2.0


class Watchdog:
    """Its own thread, so that it sees when another hangs.

    Args:
        ready: is everything there that the service is for?
        status: one line for `systemctl status`.
    """

    def __init__(self, notifier: Notifier, ready: Callable[[], bool], status: Callable[[], str]) -> None:
        self._notifier, self._ready, self._status = notifier, ready, status
        self.limit_s = LIMIT_S if notifier.watchdog_s is None else notifier.watchdog_s / 2
        self.is_ready = False
        self._stopping = False
        self._hanging: frozenset[str] = frozenset()
        self._said, self._said_at, self._extended_at, self._fed_at = "", 0.0, 0.0, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stopping(self) -> None:
        """The daemon ends from here on."""
        self._stopping = True
        self._notifier.send("STOPPING=1", f"STATUS={self._status()}")

    def end(self, status: str) -> None:
        """The last word."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._notifier.send(f"STATUS={status}")

    def _run(self) -> None:
        period = _TURN_S if self._notifier.watchdog_s is None else min(_TURN_S, self._notifier.watchdog_s / 8)
        while not self._ended.wait(period):
            self.turn()

    def turn(self) -> None:
        """One look at all threads, and what follows from it."""
        now = time.monotonic()
        hangs = pulse.silent(self.limit_s)
        self._report(hangs)
        lines = []
        if not hangs:
            if not self._stopping and not self.is_ready and self._ready():
                self.is_ready = True
                lines.append("READY=1")
            period = self._notifier.watchdog_s
            if period is not None and now - self._fed_at >= period / 4:
                self._fed_at = now
                lines.append("WATCHDOG=1")
            if (self._stopping or not self.is_ready) and now - self._extended_at >= _EXTEND_S / 6:
                self._extended_at = now
                lines.append(f"EXTEND_TIMEOUT_USEC={_EXTEND_S * 1_000_000}")
        if now - self._said_at >= _STATUS_S or "READY=1" in lines:
            said = f"{hangs[0].name} hangs; see the log" if hangs else self._status()
            if said != self._said or "READY=1" in lines:
                lines.append(f"STATUS={said}")
            self._said, self._said_at = said, now
        if lines:
            self._notifier.send(*lines)

    def _report(self, hangs: list[pulse.Pulse]) -> None:
        names = frozenset(one.name for one in hangs)
        for one in hangs:
            if one.name not in self._hanging:
                log.error(
                    "thread.hangs",
                    thread=one.name,
                    silent_s=round(one.silent_s, 1),
                    stack=one.stack()[-40:],
                    restart=self._notifier.watchdog_s is not None and not self._stopping,
                )
        for name in sorted(self._hanging - names):
            log.warning("thread.recovered", thread=name)
        self._hanging = names
