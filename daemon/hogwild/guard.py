"""What never reaches the weights, and which examples are set aside for trying.

Three things stand between a bad line and the weights, in this order:

    loss      a step whose loss is not finite, or far above what a model has that knows nothing (`guard.max_loss`),
              ends before its backward pass, or comes to nothing (step_losses.py): nothing is written
    update    the kernels leave a weight alone when anything about its update is not finite. A finite one is bounded
              however large the gradient is: it is normalised by its own moments, and may grow by
              `optimizer.gamma` from one step to the next
    growth    an example whose own loss grows from pass to pass although it is trained

An example that does this again and again (`guard.strikes`) is quarantined, with what was measured. So is one in whose
steps the daemon ends again and again (`crash`), however it ends: before every step the ledger notes who is in it.
Strikes are in the ledger, so no restart forgets them. What gets past all of them is the probes' business (`probes.py`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hogwild import log as logs
from hogwild import metrics
from hogwild.errors import ArenaError
from hogwild.groups import Group
from hogwild.judge import Judge
from hogwild.ledger import GuardName, Ledger, Pass, Pending, Trip
from hogwild.settings import GuardConfig
from hogwild.trainer import StepResult, Trainer

log = logs.get(__name__)

_DEATHS = 3
"""Deaths of the daemon that count as one strike: a signal may have come from anywhere, and a step is where a trainer
mostly is. Which one it was would not tell: whoever ends it for the memory that an example takes (the kernel,
systemd-oomd, a container's limit) sends SIGKILL, as an operator does. To excuse that would have such an example come
first for ever; to count it can cost an example that `hogwild quarantine --retrain` brings back."""


@dataclass(frozen=True)
class Strike:
    """One time that an example hurt.

    Attributes:
        guard: which one noticed.
        loss: of the example alone, nats a trained token; None: not finite.
        update_norm: of the step; 0: there was none.
        skipped: weights that the kernels left alone.
        step: training steps done by then.
    """

    guard: Literal["loss", "update", "growth"]
    loss: float | None
    update_norm: float
    skipped: int
    step: int


def largest_loss(config: GuardConfig, vocabulary: int) -> float:
    """Nats a trained token, mean of an example, above which it is not trained."""
    return config.max_loss * math.log(vocabulary)


@dataclass
class Guard:
    """Counts strikes, and sets aside. Called by the thread that trains the example.

    Args:
        vocabulary: of the model.
        wake: called after the ledger has changed.
    """

    config: GuardConfig
    ledger: Ledger
    vocabulary: int
    judge: Judge
    wake: Callable[[], None]

    def trying(self, examples: Iterable[Pending]) -> None:
        """A step with these begins. If the process ends before `tried`, that speaks against each of them."""
        ids = [one.example_id for one in examples]
        self.ledger.guards.strike("crash", {"step": self.judge.progress.steps}, ids)

    def tried(self, examples: Iterable[Pending]) -> None:
        """It has come to its end, or ends now for another reason. Before anybody else takes an example, who may end
        the process."""
        self.ledger.guards.survived([one.example_id for one in examples])

    def died(self, examples: Iterable[Pending], error: BaseException) -> None:
        """A step with these has ended with an error of its own: nobody outside has done that, so it counts as often as
        a death that may be anybody's doing has to come. Unless its weights were gone: a GPU calls that an error."""
        try:
            self.judge.ensure_alive()
        except ArenaError:
            self.tried(examples)
            return
        ids = [one.example_id for one in examples]
        about = {"step": self.judge.progress.steps, "error": f"{error!r:.200}"}
        self.ledger.guards.strike("crash", about, ids, times=_DEATHS - 1)  # `trying` has noted the first

    def after_crash(self) -> None:
        """Set aside what the daemon has ended with too often. Before anything is trained."""
        for example_id, who in self.ledger.guards.deadly(_DEATHS * self.config.strikes):
            strikes = [one for one in self.ledger.guards.strikes(example_id) if one["guard"] == "crash"]
            error = strikes[-1].get("error")
            reason = "the daemon ended again and again in a step with it" + (f": {error}" if error else "")
            self._quarantine(example_id, who, "crash", reason, [], strikes)

    def refused(self, trainer: Trainer, new: Sequence[tuple[Pending, Group]], reason: str) -> None:
        """A step was refused before anything was written. Which example was it? Each is measured alone."""
        bad = []
        for one, group in new:
            loss = group.loss(trainer)
            if not trainer.trainable(loss, group.items[0].weight):
                bad.append((one, loss))
        step = self.judge.progress.steps
        log.warning(
            "guard.refused",
            reason=reason,
            step=step,
            examples=[{**one.who, "loss": number(loss)} for one, loss in bad],
        )
        if (
            not bad
        ):  # what was replayed, or one that is bad only beside others: it must not come round for ever
            self.judge.progress.advance()
            self.ledger.count_step_without_pass()
        for one, loss in bad or [(one, math.nan) for one, _ in new]:
            self._strike(one, Strike("loss", number(loss), 0.0, 0, step))

    def watch(self, one: Pending, group: Group, passed: Pass, result: StepResult) -> None:
        """An example that has been trained and wants more passes: has it hurt?"""
        if result.skipped:
            loss, norm = number(passed.loss_before), number(result.update_norm) or 0.0
            self._strike(one, Strike("update", loss, norm, result.skipped, result.step))
        elif group.items[0].weight > 0 and (losses := self._growing(one.example_id)):
            loss, norm = number(passed.loss_before), number(result.update_norm) or 0.0
            self._note(one, Strike("growth", loss, norm, 0, result.step))
            self._set_aside(one, losses)

    def _strike(self, one: Pending, strike: Strike) -> None:
        metrics.strikes.labels(guard=strike.guard).inc()
        self._note(one, strike)
        if len(self._strikes(one)) >= self.config.strikes:
            self._set_aside(one)

    def _note(self, one: Pending, strike: Strike) -> None:
        self.judge.ensure_alive()  # or it is no example that is at fault, but weights that are gone
        self.ledger.guards.strike(strike.guard, asdict(strike), [one.example_id])

    def _strikes(self, one: Pending) -> list[dict[str, Any]]:
        """Without those for the step that it is in just now, or that did not come to its end."""
        return [strike for strike in self.ledger.guards.strikes(one.example_id) if strike["guard"] != "crash"]

    def _growing(self, example_id: int) -> list[float] | None:
        losses = [math.inf if loss is None else loss for loss in self.ledger.guards.losses(example_id)]
        return losses if growing(losses, self.config.max_rise) else None

    def _set_aside(self, one: Pending, losses: Sequence[float] = ()) -> None:
        """Quarantine; unless it is the weights that are at fault, and not the example."""
        self.judge.judge()
        if self.judge.tripped is not None:
            return
        strikes = self._strikes(one)
        guard = strikes[-1]["guard"]
        reason = {
            "loss": f"its loss is not finite, or above {largest_loss(self.config, self.vocabulary):.1f} nats a token",
            "update": "the update that it asks for is not finite",
            "growth": f"its own loss grew over its passes: {', '.join(f'{loss:.2f}' for loss in losses)}",
        }[guard]
        self._quarantine(one.example_id, one.who, guard, reason, [number(loss) for loss in losses], strikes)

    def _quarantine(
        self,
        example_id: int,
        who: Mapping[str, Any],
        guard: GuardName,
        reason: str,
        losses: Sequence[float | None],
        strikes: Sequence[Mapping[str, Any]],
    ) -> None:
        evidence = {"losses": losses, "strikes": strikes}
        trip = Trip(guard, strikes[-1]["step"], {"reason": reason})
        self.ledger.guards.set_aside(example_id, trip, reason, evidence)
        metrics.trips.labels(guard=guard).inc()
        log.error("example.quarantined", **who, guard=guard, reason=reason, evidence=evidence)
        self.wake()


def growing(losses: Sequence[float], rise: float) -> bool:
    """Does the loss grow before each of the last three passes, and exceed the first one by more than `rise`?"""
    if len(losses) < 3:
        return False
    a, b, c = losses[-3:]
    return a < b < c and c - losses[0] > rise


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(value, 5) if math.isfinite(value) else None
