"""One lock-free trainer: a skeleton of views, and a loop of take, forward, backward-and-update, record."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from hogwild.apollo import Optimizer
from hogwild.arena.control import ControlPage
from hogwild.backward import train_in_backward
from hogwild_kernels import UpdateResult


class Encoded(Protocol):
    """An example as tokens: what `examples.encode` makes."""

    @property
    def ids(self) -> Sequence[int]: ...  # (L,) token ids
    @property
    def trained(self) -> Sequence[bool]: ...  # (L,) is this token's prediction trained?


class Progress:
    """The one step counter of all trainer threads, mirrored to the control page for the server to see."""

    def __init__(self, control: ControlPage, updates_per_epoch: int) -> None:
        self._control, self._updates_per_epoch = control, updates_per_epoch
        self._lock = threading.Lock()  # around a counter, not around weights
        self.steps = control.steps

    def resume(self, steps: int, epoch: int) -> None:
        """Other weights are in place, of a checkpoint with this step and epoch: both counters only grow."""
        with self._lock:
            self.steps = self._control.steps = max(self.steps, steps)
            self._control.epoch = max(self._control.epoch, epoch) + 1

    def new_epoch(self) -> None:
        """The weights are about to be replaced: answers from now on are of neither the old nor the new ones."""
        with self._lock:
            self._control.epoch += 1

    @property
    def epoch(self) -> int:
        """The weight epoch as it is now."""
        return self._control.epoch

    def advance(self) -> int:
        """Count one finished step and return its number, from 1."""
        with self._lock:
            self.steps += 1
            self._control.steps = self.steps
            if (self.steps - 1) % self._updates_per_epoch == 0:
                self._control.epoch += 1
            return self.steps


@dataclass
class StepResult:
    """What one training step did.

    Attributes:
        loss: mean negative log-likelihood of the trained tokens before the update, nats.
        tokens: trained tokens.
        step: number of this step among all threads.
        staleness: steps that other threads finished between this step's first read of the weights and its last write.
        update_norm: root of the summed squares of all weights' updates.
        updates: weights updated.
        skipped: weights left alone because something was not finite.
        seconds: wall time.
    """

    loss: float
    tokens: int
    step: int
    staleness: int
    update_norm: float
    updates: int
    skipped: int
    seconds: float


class Trainer:
    """Trains on one example at a time, in the calling thread.

    Args:
        model: this trainer's own skeleton; changed so that its backward pass updates the weights.
        context: "frozen" runs tokens before the first trained one without gradient.
        seed: varies the rounding between threads.
        between_layers: called after each weight's update; the place to yield to the server, or to stop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        progress: Progress,
        trainable: set[str],
        context: Literal["frozen", "full"],
        seed: int,
        between_layers: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.progress, self.context = model, progress, context
        self._between_layers = between_layers
        self._squares, self._updates, self._skipped = 0.0, 0, 0
        self.frozen = train_in_backward(model, optimizer, trainable, seed, self._count)

    def step(self, example: Encoded, weight: float) -> StepResult:
        """Forward, backward and update on one example; its loss counts `weight` times (negative: unlearn)."""
        began, steps_before = time.perf_counter(), self.progress.steps
        self._squares, self._updates, self._skipped = 0.0, 0, 0
        loss, tokens = self._loss(example, self.context)
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        step = self.progress.advance()
        return StepResult(
            loss=float(loss.detach()),
            tokens=tokens,
            step=step,
            staleness=step - 1 - steps_before,
            update_norm=self._squares**0.5,
            updates=self._updates,
            skipped=self._skipped,
            seconds=time.perf_counter() - began,
        )

    @torch.no_grad()
    def loss(self, example: Encoded) -> float:
        """The loss with the weights as they are now, nats a trained token."""
        return float(self._loss(example, "full")[0])

    def _loss(self, example: Encoded, context: Literal["frozen", "full"]) -> tuple[torch.Tensor, int]:
        ids = torch.tensor([example.ids])  # (1, L)
        first = list(example.trained).index(True)
        start = (
            max(first - 1, 0) if context == "frozen" else 0
        )  # the token that predicts the first trained one
        cache = None
        if start > 0:
            with torch.no_grad():
                cache = DynamicCache(config=self.model.config)
                self.model(ids[:, :start], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = self.model(ids[:, start:-1], past_key_values=cache, use_cache=cache is not None).logits[0]
        mask = torch.tensor(example.trained[start + 1 :])  # (L - start - 1,)
        targets = ids[0, start + 1 :][mask]
        loss = torch.nn.functional.cross_entropy(logits[mask].float(), targets)
        return loss, int(targets.numel())

    def _count(self, _name: str, result: UpdateResult) -> None:
        self._updates += 1
        self._skipped += int(result.skipped)
        self._squares += float(result.norm) ** 2
        self._between_layers()
