"""Serving comes first: between two layers, a trainer thread stands aside while the server has something to do.

The policies, `[governor] policy`:

    off      never
    strict   for as long as anybody waits for an answer: training takes what is left over
    share    for so much of the time that tokens take `added_latency` longer than without training, and no more

Nothing is asked of the server: it says on the control page what it has to do. Training goes on when it has said nothing
for a while, so a server that was killed holds nobody up. A step that has to end (a stop, a rollback) is not held up
either: `hurry`.
"""

import os
import threading
import time
from collections.abc import Callable, MutableMapping

from hogwild import log as logs
from hogwild import pulse
from hogwild.arena.control import ControlPage, Load
from hogwild.settings import GovernorConfig, TrainingConfig

log = logs.get(__name__)

LINGER_S = 0.05
"""After the last answer: whoever asks one question after the other is about to ask the next."""
_NAP_S, _SHORTEST_NAP_S = 0.005, 0.0005
_DEBT_S = 0.002  # shorter pauses than a nap is exact for are saved up


class Share:
    """How much of the time trainers may work while the server is busy, so that a token takes so much longer.

    Measured on the live server, in turns: for a few tokens nobody trains, for some more trainers work for a part of
    the time, `duty`. How much longer a token took, over `duty`, is the slowdown of undivided training, and sets the
    next `duty`.

    Attributes:
        duty: share of the time that trainers work, 0 to 1.
        quiet: it is the turn in which nobody trains.
        slowdown: how much longer a token takes under undivided training, estimated; 1: twice as long.
    """

    MIN_DUTY = 0.02
    QUIET_TOKENS, WORK_TOKENS = 4, 12  # of each running request
    TURN_S = 3.0  # no turn is longer, whatever comes: the first token of a long prompt may take a minute

    def __init__(self, added_latency: float) -> None:
        self.added_latency, self.slowdown, self.quiet = added_latency, 1.0, False
        self._quiet_s: float | None = None  # seconds a token, as of the last quiet turn
        self._began_at = 0.0
        self._begun: Load | None = None  # the load when the turn began
        self._from: Load | None = None  # and at the first token that lies wholly in it

    @property
    def duty(self) -> float:
        if self.quiet:
            return 0.0
        return min(max(self.added_latency / max(self.slowdown, 1e-3), self.MIN_DUTY), 1.0)

    def begin(self, load: Load, now: float) -> None:
        """The server has become busy."""
        self._measure(load, self.QUIET_TOKENS)  # its last turn ended with its last answer
        self._quiet_s = None  # another load than before, perhaps
        self._turn(load, now, quiet=True)

    def look(self, load: Load, now: float) -> None:
        """Called every few milliseconds while the server is busy."""
        if self._begun is None:
            self._begun = load
        if self._from is None:
            if load.tokens - self._begun.tokens >= max(load.running, 1):  # those were on their way before
                self._from = load
        elif self._measure(load, self.QUIET_TOKENS if self.quiet else self.WORK_TOKENS):
            self._turn(load, now, quiet=not self.quiet)
            return
        if now - self._began_at > self.TURN_S:  # without tokens there is nothing to be measured
            self._turn(load, now, quiet=not self.quiet and load.tokens > self._begun.tokens)

    def _measure(self, load: Load, tokens: int) -> bool:
        """Take in what this turn says, if it has so many tokens of each request."""
        if self._from is None or load.tokens - self._from.tokens < tokens * max(self._from.running, 1):
            return False
        token_s = (load.waited_s - self._from.waited_s) / (load.tokens - self._from.tokens)
        if self.quiet:
            self._quiet_s = token_s
        elif self._quiet_s:
            found = max(token_s / self._quiet_s - 1, 0.0) / self.duty
            self.slowdown += 0.3 * (min(found, 10.0) - self.slowdown)
        return True

    def _turn(self, load: Load, now: float, *, quiet: bool) -> None:
        self.quiet, self._began_at, self._begun, self._from = quiet, now, load, None


class Governor:
    """Decides how long trainer threads stand aside. Any number of threads call `between_layers`.

    Attributes:
        yields: times that a thread stood aside.
        yielded_s: seconds, of all threads together.
        share: what `share` has found out about this server.
    """

    def __init__(
        self,
        settings: GovernorConfig,
        control: ControlPage,
        settle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`settle` waits until what the calling thread has queued on a GPU is done."""
        self._settings, self._control, self._settle = settings, control, settle
        self._clock, self._sleep = clock, sleep
        self.share = Share(settings.added_latency)
        self.yields, self.yielded_s = 0, 0.0
        self._hurry = False
        self._busy_until = 0.0
        self._local = threading.local()
        self._lock = threading.Lock()  # around the counters and the turns of `share`

    def configure(self, settings: GovernorConfig) -> None:
        """Take over other settings, at once."""
        self._settings = settings
        self.share.added_latency = settings.added_latency

    def hurry(self, now: bool = True) -> None:
        """While set, nobody is held up: a step under way has to end."""
        self._hurry = now

    def between_layers(self) -> None:
        """A trainer thread is between two layers, and stands aside if it should."""
        policy = self._settings.policy
        if policy == "off" or self._hurry or not self._busy():
            self._local.since = None
            return
        self._settle()  # what a GPU has left to do is work, and would run on into the pause
        now, since = self._clock(), getattr(self._local, "since", None)
        if policy == "strict":
            self._wait(None)
        else:
            self._share(0.0 if since is None else now - since)  # None: the server has just become busy
        self._local.since = self._clock()

    def _share(self, worked_s: float) -> None:
        """A thread has worked for so long beside the server, and owes it as much as the share says."""
        self._look()
        debt, duty = getattr(self._local, "debt", 0.0) if worked_s else 0.0, self.share.duty
        if duty:
            debt += worked_s * (1 - duty) / duty
        if not duty or debt >= _DEBT_S:
            # Naps are inexact, which evens out; a quiet turn is no credit: it would be spent on a few tokens.
            debt = max(debt - self._wait(debt), -_NAP_S)
        self._local.debt = debt

    def _busy(self) -> bool:
        now = self._clock()
        if self._control.busy:
            if now > self._busy_until:
                with self._lock:
                    self.share.begin(self._control.load, now)
            self._busy_until = now + LINGER_S
        return now <= self._busy_until

    def _wait(self, seconds: float | None) -> float:
        """Stand aside for `seconds` and through quiet turns, or until nobody waits. Returns how long that was."""
        began, policy = self._clock(), self._settings.policy
        while True:
            waited = self._clock() - began
            if self._hurry or self._settings.policy != policy or not self._busy():
                break
            if seconds is not None:
                self._look()
                if waited >= seconds and not self.share.quiet:
                    break
            left = _NAP_S if seconds is None or self.share.quiet else seconds - waited
            pulse.beat()  # it waits on purpose, however long: no hang
            self._sleep(min(max(left, _SHORTEST_NAP_S), _NAP_S))
        if waited:
            with self._lock:
                self.yields += 1
                self.yielded_s += waited
        return waited

    def _look(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self.share.look(self._control.load, self._clock())
            finally:
                self._lock.release()


def lower_priority() -> None:
    """Let the rest of this process have a processor before the calling thread: SCHED_IDLE.

    It does not reach far: where the kernel groups processes by session (autogroup), neither niceness nor the class of a
    thread decides what sessions get of a processor (measured: docs/serving.md). Standing aside does.

    Raises:
        OSError: it is not allowed here.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def stand_back(settings: TrainingConfig) -> None:
    """The calling thread takes a processor only when the server does not want it, if that is allowed and wished for."""
    if not settings.low_priority:
        return
    try:
        lower_priority()
    except OSError as error:
        log.warning("priority.unchanged", error=str(error))


def prepare_gpu(settings: TrainingConfig, environment: MutableMapping[str, str]) -> None:
    """What CUDA and torch read from the environment once, as they start. What the operator has set himself stays.

    Memory that torch has cached is kept in few pieces, so that a long pass finds room where short ones were. Under MPS,
    kernels of training are of the lower of two priorities: streams of two processes are compared there alone.
    """
    limit_gpu(settings, environment)
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name of the same
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if settings.low_priority:
        environment.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")


def limit_gpu(settings: TrainingConfig, environment: MutableMapping[str, str]) -> None:
    """Under CUDA's Multi-Process Service, give this process a part of the GPU's processors only.

    To be called before CUDA is initialised, which reads it once. What the operator has set himself stays.
    """
    if settings.mps_percent:
        environment.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(settings.mps_percent))
