"""What never reaches the weights, and which examples are set aside for trying.

Three things stand between a bad line and the weights, in this order:

    loss      a step whose loss is not finite, or far above what a model has that knows nothing (`guard.max_loss`),
              ends before its backward pass: nothing is written
    update    the kernels leave a weight alone when anything about its update is not finite. A finite one is bounded
              however large the gradient is: it is normalised by its own moments, and may grow by
              `optimizer.gamma` from one step to the next
    growth    an example whose own loss grows from pass to pass although it is trained

An example that does this again and again (`guard.strikes`) is quarantined, with what was measured. What gets past all
three is the probes' business (`probes.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from hogwild import log as logs
from hogwild import metrics
from hogwild.groups import Group
from hogwild.judge import Judge
from hogwild.ledger import Ledger, Pass, Pending, Trip
from hogwild.settings import GuardConfig
from hogwild.trainer import StepResult, Trainer

log = logs.get(__name__)

_REMEMBERED = 10_000  # examples with a strike that are remembered


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
    _strikes: dict[int, list[Strike]] = field(default_factory=dict)

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
            self._strikes.setdefault(one.example_id, []).append(
                Strike(
                    "growth", number(passed.loss_before), number(result.update_norm) or 0.0, 0, result.step
                )
            )
            self._set_aside(one, losses)

    def _strike(self, one: Pending, strike: Strike) -> None:
        metrics.strikes.labels(guard=strike.guard).inc()
        while len(self._strikes) >= _REMEMBERED:
            self._strikes.pop(next(iter(self._strikes)), None)
        found = self._strikes.setdefault(one.example_id, [])
        found.append(strike)
        if len(found) >= self.config.strikes:
            self._set_aside(one)

    def _growing(self, example_id: int) -> list[float] | None:
        losses = [math.inf if loss is None else loss for loss in self.ledger.guards.losses(example_id)]
        return losses if growing(losses, self.config.max_rise) else None

    def _set_aside(self, one: Pending, losses: Sequence[float] = ()) -> None:
        """Quarantine; unless it is the weights that are at fault, and not the example."""
        self.judge.judge()
        if self.judge.tripped is not None:
            return
        strikes = self._strikes.pop(one.example_id)
        last = strikes[-1]
        reason = {
            "loss": f"its loss is not finite, or above {largest_loss(self.config, self.vocabulary):.1f} nats a token",
            "update": "the update that it asks for is not finite",
            "growth": f"its own loss grew over its passes: {', '.join(f'{loss:.2f}' for loss in losses)}",
        }[last.guard]
        evidence = {
            "losses": [number(loss) for loss in losses],
            "strikes": [asdict(strike) for strike in strikes],
        }
        self.ledger.guards.set_aside(
            one.example_id, Trip(last.guard, last.step, {"reason": reason}), reason, evidence
        )
        metrics.trips.labels(guard=last.guard).inc()
        log.error("example.quarantined", **one.who, guard=last.guard, reason=reason, evidence=evidence)
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
