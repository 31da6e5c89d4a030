"""What is said of a training step: to Prometheus, and in the log."""

from collections.abc import Sequence

from hogwild import log as logs
from hogwild import metrics
from hogwild.groups import Group
from hogwild.ledger import Pass, Pending
from hogwild.trainer import StepResult

log = logs.get(__name__)


def observe(
    result: StepResult, new: Sequence[tuple[Pending, Group]], old: Sequence[tuple[Pending, Group]]
) -> None:
    """For Prometheus."""
    metrics.updates.inc()
    metrics.staleness.observe(result.staleness)
    metrics.step_seconds.observe(result.seconds)
    metrics.update_norm.set(result.update_norm)
    metrics.skipped.inc(result.skipped)
    fresh = sum(group.tokens for _, group in new)
    metrics.tokens.labels(kind="new").inc(fresh)
    metrics.tokens.labels(kind="replayed").inc(sum(result.tokens) - fresh)
    metrics.passes.labels(kind="new").inc(len(new))
    metrics.passes.labels(kind="replayed").inc(len(old))


def say(pending: Pending, passed: Pass, result: StepResult, replayed: int, own: int, finished: bool) -> None:
    """One line of the log for each pass of a new example."""
    log.info(
        "example.trained" if finished else "example.pass",
        **pending.who,
        **{"pass": pending.passes_done + 1},
        loss_before=round(passed.loss_before, 4),
        loss_after=None if passed.loss_after is None else round(passed.loss_after, 4),
        tokens=passed.tokens,
        replayed=replayed,
        self_replayed=own,
        step=result.step,
        thread=passed.thread,
        staleness=result.staleness,
        update_norm=round(result.update_norm, 5),
        updates=result.updates,
        skipped=result.skipped,
        ms=round(result.seconds * 1000),
    )
