"""What the daemon is doing, as one JSON object: `status.json`, for `hogwild status`, and the gauges for Prometheus."""

import json
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from hogwild import generation as generations
from hogwild import log as logs
from hogwild import metrics
from hogwild.arena.control import Load
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.lines import SUFFIXES
from hogwild.plural import counted
from hogwild.probes import Score
from hogwild.settings import Config
from hogwild.spool_files import Incoming, look_into
from hogwild.spool_names import ERRORS, list_errors

log = logs.get(__name__)

_WRITE_S = 5.0  # counting a million examples takes 0.4 s
_RETRY_S = 60.0
_WINDOW_S = 60.0  # over which speed is measured
_SERIES_S = 60.0  # between two notes of how the server does
_FILES = 8


@dataclass(frozen=True)
class Troubles:
    """What is wrong.

    Attributes:
        spool: why the folder for files cannot be used; empty: it can.
        unwritten: why the newest checkpoint could not be written; empty: it could, or there was none.
        unrecorded: why generations could not be put into history, or old ones removed; empty: they could.
        stuck: the probes have fallen, and no generation could be gone back to.
        unasked: why the server could not be asked what it serves; empty: it could, or has not been.
        refused: why the weights that a server brought last were refused; empty: they were not.
        prompts_differ: chats are trained behind other prompts than the server makes.
    """

    spool: str = ""
    unwritten: str = ""
    unrecorded: str = ""
    stuck: bool = False
    unasked: str = ""
    refused: str = ""
    prompts_differ: bool = False


class Status:
    """Collects. One for the life of a daemon.

    Attributes:
        newest: what was last written to `status.json`, or would have been; empty until a server has come.
    """

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self._config, self._ledger = config, ledger
        self.newest: dict[str, Any] = {}
        self._wrote_at = 0.0
        self._started = time.monotonic()  # clocks are set, and set back
        self._points: deque[tuple[float, float, float]] = deque()  # (when, tokens, updates)
        self._noted_at = 0.0
        self._loads: deque[tuple[float, int, float]] = deque()  # (when, tokens, seconds waited for them)
        self._yielded = (0, 0.0)
        self._bad: tuple[tuple[int, ...], str] = (), ""  # what `_bad_lines` saw, and what it said of it
        metrics.started.set(time.time())
        metrics.watch_process()
        metrics.incoming_files.set_function(lambda: self._incoming().files)
        metrics.incoming_age.set_function(lambda: self._incoming().oldest_s)
        metrics.checkpoint_age.set_function(self._checkpoint_age_s)

    def write(self, learner: Learner, server: dict[str, Any], saved_step: int, troubles: Troubles) -> None:
        """For `hogwild status` and for Prometheus, if it is time."""
        if self._due() or not self.newest:  # what was written before said that there is no server
            self.newest = self.of(learner, server, saved_step, troubles)
            self._put(self.newest)

    def write_waiting(self, why: str, troubles: Troubles) -> None:
        """The same, before a server has brought its weights.

        Args:
            why: what is waited for.
        """
        if not self._due():
            return
        counts, incoming = asdict(self._ledger.counts()), self._incoming()
        self._count(counts, self._ledger.remaining()[0])
        self._put(
            {
                **self._signature(),
                "training": False,
                "waiting": why,
                "refused": troubles.refused,
                **counts,
                "spool": _spool(incoming),
                "warnings": self._lasting(counts, incoming, troubles),
            }
        )

    def expire(self) -> None:
        """Something was done that somebody may look for: it is written in the next turn."""
        self._wrote_at = -math.inf

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._wrote_at < _WRITE_S:
            return False
        self._wrote_at = now
        return True

    def _signature(self) -> dict[str, Any]:
        """Who says it, and when."""
        uptime_s = round(time.monotonic() - self._started)
        return {"pid": os.getpid(), "at": time.time(), "uptime_s": uptime_s}

    def _put(self, status: dict[str, Any]) -> None:
        path = self._config.state_dir / "status.json"
        fresh = path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(status) + "\n")
            fresh.rename(path)
        except OSError as error:  # a full disk is no reason to stop learning
            log.warning("status.unwritten", path=str(path), error=str(error))
            self._wrote_at = time.monotonic() + _RETRY_S - _WRITE_S

    def of(
        self, learner: Learner, server: dict[str, Any], saved_step: int, troubles: Troubles
    ) -> dict[str, Any]:
        """The status now. Cheap enough for every few seconds."""
        control, judge = learner.arena.control, learner.judge
        counts = asdict(self._ledger.counts())
        left, loss = self._ledger.remaining()
        attached = bool(server)
        load = control.load
        running, waiting = load.running, load.waiting
        latency = self._token_latency_s(load)
        self._gauges(learner, counts, left, attached=attached)
        metrics.running.set(running)
        metrics.waiting.set(waiting)
        metrics.token_latency.set(latency or 0.0)
        self._note(learner, server, running, waiting, latency)
        tokens_per_s, updates_per_s = self._speed()
        probes = judge.probes
        resident, private = metrics.own_memory()
        incoming = self._incoming()
        generation, saved_at = self._newest_checkpoint()
        return {
            **self._signature(),
            "model": str(learner.folder),
            "step": learner.progress.steps,
            "epoch": learner.progress.epoch,
            "training": learner.training,
            "server": server,
            "refused": "" if attached else troubles.refused,
            "saved_step": saved_step,
            "generation": control.generation,
            **counts,
            "learning": {
                "loss": None if loss is None else round(loss, 4),
                "tokens_per_s": tokens_per_s,
                "updates_per_s": updates_per_s,
                "passes_left": left,
                "eta_s": round(left / updates_per_s) if left and updates_per_s else None,
                "files": [
                    {**{k: v for k, v in asdict(file).items() if k in _OF_A_FILE}, "examples": file.examples}
                    for file in self._ledger.files(_FILES)
                ],
            },
            "spool": _spool(incoming),
            "serving": {"running": running, "waiting": waiting, "token_latency_s": latency},
            "probes": {
                "newest": _score(probes.newest),
                "good": None if probes.good is None else {**asdict(probes.good), "losses": dict(probes.good.losses)},
                "margin": self._config.probes.margin,
            },
            "checkpoint": {"generation": generation, "saved_at": saved_at, "age_s": self._checkpoint_age_s()},
            "guards": {"trips": self._ledger.guards.trips(), "newest": self._ledger.guards.newest_trips(3)},
            "memory": {"resident_bytes": resident, "private_bytes": private},
            "warnings": self._warnings(learner, counts, troubles, attached=attached, incoming=incoming),
        }  # fmt: skip

    def _warnings(
        self,
        learner: Learner,
        counts: dict[str, int],
        troubles: Troubles,
        *,
        attached: bool,
        incoming: Incoming,
    ) -> list[str]:
        found = []
        if troubles.stuck:
            found.append(
                "the probes have fallen and no generation could be gone back to: training has stopped"
            )
        elif learner.judge.tripped is not None:
            found.append("the probes have fallen: going back to the last good generation")
        if not attached and troubles.refused:
            found.append(f"no server is attached, the newest one's weights were refused: {troubles.refused}")
        elif not attached:
            found.append("no server is attached")
        elif troubles.unasked:
            found.append(
                f"the server could not be asked whether it serves what is trained: {troubles.unasked}"
            )
        elif not learner.training and learner.judge.tripped is None:
            found.append(
                "training waits: the server has not been verified, or does not serve what is trained"
            )
        if attached and troubles.prompts_differ:
            found.append(
                "the server makes other prompts of chats than are trained (prompts.differ in the log shows both): "
                f"give it no other tokenizer, tokenizer mode or content format than {learner.folder} has"
            )
        return found + self._lasting(counts, incoming, troubles)

    def _lasting(self, counts: dict[str, int], incoming: Incoming, troubles: Troubles) -> list[str]:
        """What is wrong with or without a server."""
        found = [troubles.unwritten] if troubles.unwritten else []
        if troubles.unrecorded:
            found.append(f"history is behind: {troubles.unrecorded}")
        if troubles.spool:
            found.append(f"no files are taken: {troubles.spool}")
        if counts["quarantined"]:
            are = counted(counts["quarantined"], "example is", "examples are")
            found.append(f"{are} in quarantine: hogwild quarantine")
        if bad := self._bad_lines(counts):
            found.append(bad)
        if incoming.oldest_s > max(60.0, 10 * self._config.spool.rescan_interval_s):
            found.append(f"a file has been in incoming/ for {incoming.oldest_s:.0f} s")
        if incoming.ignored:
            more = f" and {len(incoming.ignored) - 1} more" if len(incoming.ignored) > 1 else ""
            wanted = f"give a plain file named *{', *'.join(SUFFIXES)}"
            found.append(f"{incoming.ignored[0]}{more} in incoming/ is not taken: {wanted}")
        return found

    def _bad_lines(self, counts: dict[str, int]) -> str:
        """What to say of lines that cannot be trained, until somebody has dealt with them, and has taken away the file
        in failed/ that lists them. Looked up anew when a count or that folder has changed."""
        failed = self._config.spool.dir / "failed"
        try:
            state = (failed.stat().st_mtime_ns, counts["failed"], counts["rejected"])
            names = list_errors(failed) if state != self._bad[0] and any(state[1:]) else []
        except OSError:
            return ""  # what is wrong with the folder, the spool's thread says
        if state != self._bad[0]:
            found = self._ledger.bad_lines(names) if names else {}
            lines = counted(sum(found.values()), "line")
            said = f"{lines} of {len(found)} files cannot be trained: {failed}"
            if len(found) == 1:
                said = f"{lines} cannot be trained: {failed / next(iter(found))}{ERRORS}"
            self._bad = state, f"{said}; take away what is dealt with" if found else ""
        return self._bad[1]

    def _gauges(self, learner: Learner, counts: dict[str, int], left: int, *, attached: bool) -> None:
        yields, yielded_s = learner.governor.yields, learner.governor.yielded_s
        if yields < self._yielded[0]:  # another learner
            self._yielded = (0, 0.0)
        metrics.yields.inc(yields - self._yielded[0])
        metrics.yield_seconds.inc(max(yielded_s - self._yielded[1], 0.0))
        self._yielded = yields, yielded_s
        metrics.training.set(learner.training)
        metrics.server_up.set(attached)
        metrics.step.set(learner.progress.steps)
        metrics.epoch.set(learner.progress.epoch)
        metrics.generation.set(learner.arena.control.generation)
        self._count(counts, left)

    def _count(self, counts: dict[str, int], left: int) -> None:
        metrics.passes_left.set(left)
        metrics.files.set(counts["files"])
        metrics.rejected.set(counts["rejected"])
        for state in ("pending", "trained", "durable", "failed", "undone", "quarantined"):
            metrics.examples.labels(state=state).set(counts[state])

    def _note(
        self, learner: Learner, server: dict[str, Any], running: int, waiting: int, latency: float | None
    ) -> None:
        """Once a minute, into the ledger: how the server does, for the report."""
        now = time.monotonic()
        if not server or (self._noted_at and now - self._noted_at < _SERIES_S):
            return
        self._noted_at = now
        values = {"serving.running": float(running), "serving.waiting": float(waiting)}
        if latency is not None:
            values["serving.token_latency_s"] = latency
        values["training.tokens_per_s"] = self._speed()[0]
        self._ledger.guards.note(learner.progress.steps, values)

    def _token_latency_s(self, load: Load) -> float | None:
        """Mean time between two tokens of an answer, over the last minute; None: nothing was answered."""
        now = time.monotonic()
        if self._loads and load.tokens < self._loads[-1][1]:  # another server
            self._loads.clear()
        self._loads.append((now, load.tokens, load.waited_s))
        while len(self._loads) > 2 and now - self._loads[1][0] > _WINDOW_S:
            self._loads.popleft()
        (_, tokens, waited_s), (_, tokens_now, waited_now_s) = self._loads[0], self._loads[-1]
        return (waited_now_s - waited_s) / (tokens_now - tokens) if tokens_now > tokens else None

    def _speed(self) -> tuple[float, float]:
        """(trained tokens, training steps) a second, over the last minute."""
        now = time.monotonic()
        self._points.append((now, metrics.trained_tokens(), metrics.updates_done()))
        while len(self._points) > 2 and now - self._points[1][0] > _WINDOW_S:
            self._points.popleft()
        first, last = self._points[0], self._points[-1]
        seconds = last[0] - first[0]
        if seconds <= 0:
            return 0.0, 0.0
        return round((last[1] - first[1]) / seconds, 2), round((last[2] - first[2]) / seconds, 3)

    def _incoming(self) -> Incoming:
        return look_into(self._config.spool.dir / "incoming")

    def _newest_checkpoint(self) -> tuple[int | None, str | None]:
        try:
            state = json.loads(
                (self._config.state_dir / "checkpoints" / "current" / generations.STATE).read_bytes()
            )
            return int(state["generation"]), str(state["saved_at"])
        except (OSError, ValueError, KeyError):
            return None, None

    def _checkpoint_age_s(self) -> float:
        """Since the newest checkpoint; since the start, where there is none."""
        saved_at = self._newest_checkpoint()[1]
        try:
            at = datetime.fromisoformat(saved_at or "").replace(tzinfo=UTC).timestamp()
        except ValueError:
            # Not by the system clock: it may have been set since, by decades on a machine without one.
            return round(time.monotonic() - self._started, 1)
        return round(max(time.time() - at, 0.0), 1)


_OF_A_FILE = (
    "name",
    "accepted_at",
    "pending",
    "trained",
    "durable",
    "failed",
    "undone",
    "quarantined",
    "rejected",
)


def _spool(incoming: Incoming) -> dict[str, Any]:
    return {
        "files": incoming.files,
        "oldest_s": round(incoming.oldest_s, 1),
        "ignored": incoming.ignored[:_FILES],
    }


def _score(score: Score | None) -> dict[str, Any] | None:
    """For JSON, which has no NaN."""
    if score is None:
        return None
    losses = {name: round(loss, 5) if math.isfinite(loss) else None for name, loss in score.losses.items()}
    return {"step": score.step, "losses": losses, "right": score.right}
