"""One training step of the daemon, from the batch that the curriculum hands out to what the ledger keeps of it."""

import contextlib
from collections.abc import Sequence

import torch

from hogwild import log as logs
from hogwild import metrics, step_report
from hogwild.arena.control import ControlPage
from hogwild.curriculum import Batch, Curriculum
from hogwild.drift import Drift
from hogwild.encoder import Encoder
from hogwild.errors import ArenaError, LedgerError, LossError
from hogwild.groups import Group, flat, regroup
from hogwild.guard import Guard
from hogwild.ledger import Ledger, Pass, Pending
from hogwild.trainer import Item, Trainer

log = logs.get(__name__)

_RECENT = 4  # trained examples among the probes of `served equals trained`


class Turn:
    """Called by all trainer threads at once, each with its own trainer.

    Args:
        self_weight: of a text that the model wrote itself.

    Attributes:
        recent: token ids of the examples that were trained last, the newest first.
    """

    def __init__(
        self,
        ledger: Ledger,
        curriculum: Curriculum,
        encoder: Encoder,
        guard: Guard,
        drift: Drift,
        control: ControlPage,
        self_weight: float,
    ) -> None:
        self._ledger, self._curriculum, self._encoder = ledger, curriculum, encoder
        self._guard, self._drift, self._control = guard, drift, control
        self._self_weight = self_weight
        self.recent: list[list[int]] = []

    def take(self, trainer: Trainer, index: int, batch: Batch) -> None:
        """Forward, backward and update, record: one step on new examples and on what is replayed beside them.

        Args:
            index: of the thread.
        """
        self._guard.trying(batch.examples)
        try:
            self._take(trainer, index, batch)
        except (ArenaError, LedgerError):  # the server's fault, or the disk's, and no example's
            with contextlib.suppress(LedgerError):
                self._guard.tried(batch.examples)
            raise
        except Exception as error:
            with contextlib.suppress(LedgerError):
                self._guard.died(batch.examples, error)
            raise

    def _take(self, trainer: Trainer, index: int, batch: Batch) -> None:
        new = [(one, group) for one in batch.new if (group := self._encoder.pending(one, sets_aside=True))]
        old = [
            (one, group) for one in batch.replayed if (group := self._encoder.pending(one, sets_aside=False))
        ]
        own = [Group((Item(sample, self._self_weight, likeliest=sample.likeliest),)) for sample in batch.own]
        if (batch.new and not new) or not (new or old or own):
            if not batch.new:
                # What was to be replayed fits no longer: a step all the same, or it is drawn for ever.
                self._guard.judge.progress.advance()
                self._ledger.count_step_without_pass()
            self._done(batch)  # nothing new is left, and replay was there for its sake
            return
        groups = [*(group for _, group in new), *(group for _, group in old), *own]
        try:
            result = trainer.step(flat(groups))
        except LossError as error:  # nothing was written
            self._guard.refused(trainer, new, str(error))
            self._done(batch)
            self._curriculum.wake()
            return
        except torch.OutOfMemoryError as error:
            self._too_large(new, old, error)
            raise
        with trainer.stream.current():
            self._drift.after(result.step)
        step_report.observe(result, new, old)
        measured = regroup(groups, result)
        passes = []
        for number, (one, group) in enumerate([*new, *old]):
            is_new = number < len(new)
            loss, tokens = measured[number]
            passes.append(
                Pass(
                    one.example_id,
                    loss_before=loss,
                    loss_after=group.loss(trainer) if is_new and _wants_loss_after(one) else None,
                    tokens=tokens,
                    step=result.step,
                    thread=index,
                    arena_id=self._control.arena_id,
                    replay=not is_new,
                )
            )
        outcomes = self._ledger.record_passes(passes)
        if not passes:  # a restart counts the steps that the ledger knows of
            self._ledger.count_step_without_pass()
        self._done(batch)
        if new:
            self.recent = [new[0][1].ids, *self.recent[: _RECENT - 1]]
        for (one, group), passed, outcome in zip(new, passes, outcomes, strict=False):
            metrics.observe_loss(passed.loss_before)
            step_report.say(one, passed, result, len(old), len(own), finished=outcome.state != "accepted")
            if outcome.state == "accepted":
                self._guard.watch(one, group, passed, result)
        for (one, _), (loss, _) in zip(old, measured[len(new) :], strict=False):
            log.debug("example.replayed", **one.who, loss=round(loss, 4), step=result.step, thread=index)
            if self._curriculum.forgotten(one, loss):
                log.info("example.reopened", **one.who, loss=round(loss, 4), until_loss=one.until_loss)

    def _done(self, batch: Batch) -> None:
        self._guard.tried(batch.examples)
        self._curriculum.done(batch)

    def _too_large(
        self,
        new: Sequence[tuple[Pending, Group]],
        old: Sequence[tuple[Pending, Group]],
        error: Exception,
    ) -> None:
        """The service is about to end, and must not come back to the very same step.

        Unless something that was learned before is longer than what is new: that is drawn anew, and where it is drawn
        again and again, its deaths set it aside (`guard.py`)."""
        longest = max([*new, *old], key=lambda pair: len(pair[1].ids), default=None)
        if longest is not None and longest in new:
            one, _ = longest
            reason = (
                "the GPU's memory did not suffice for a step with it; less training.batch_tokens or "
                f"training.max_tokens, or more training.gpu_memory_gib, makes room ({str(error).splitlines()[0]:.200})"
            )
            self._ledger.set_failed(one.example_id, reason, None)
            log.error("example.failed", **one.who, reason=reason, field=None)


def _wants_loss_after(pending: Pending) -> bool:
    """A forward pass more: after the last pass, and wherever a target loss decides how many passes there are."""
    return pending.until_loss is not None or pending.passes_done + 1 >= pending.passes
