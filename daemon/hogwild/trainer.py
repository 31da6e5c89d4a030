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
from hogwild.likeliest import Likeliest
from hogwild_kernels import UpdateResult


class Encoded(Protocol):
    """An example as tokens: what `examples.encode` makes."""

    @property
    def ids(self) -> Sequence[int]: ...  # (L,) token ids
    @property
    def trained(self) -> Sequence[bool]: ...  # (L,) is this token's prediction trained?


@dataclass(frozen=True)
class Item:
    """One example of a training step.

    Attributes:
        encoded: its tokens, and which of them are trained.
        weight: how much its loss counts; negative: unlearn.
        context: "frozen" or "full" for this example alone; None: as the trainer is configured.
        likeliest: of its trained tokens: its loss is then the divergence from this, not the likelihood of the tokens.
    """

    encoded: Encoded
    weight: float = 1.0
    context: Literal["frozen", "full"] | None = None
    likeliest: Likeliest | None = None


class Progress:
    """The one step counter of all trainer threads, mirrored to the control page for the server to see."""

    def __init__(self, control: ControlPage, updates_per_epoch: int) -> None:
        self._control, self._updates_per_epoch = control, updates_per_epoch
        self._lock = threading.Lock()  # around a counter, not around weights
        self.steps = control.steps

    def resume(self, steps: int) -> None:
        """Go on counting from a checkpoint's step."""
        with self._lock:
            self.steps = self._control.steps = max(self.steps, steps)

    def advance(self) -> int:
        """Count one finished step and return its number, from 1."""
        with self._lock:
            self.steps += 1
            self._control.steps = self.steps
            self._control.epoch = -(-self.steps // self._updates_per_epoch)
            return self.steps


@dataclass
class StepResult:
    """What one training step did.

    Attributes:
        losses: of each item, in order: mean negative log-likelihood of its trained tokens before the update, nats.
        tokens: of each item, in order: trained tokens.
        step: number of this step among all threads.
        staleness: steps that other threads finished between this step's first read of the weights and its last write.
        update_norm: root of the summed squares of all weights' updates.
        updates: weights updated.
        skipped: weights left alone because something was not finite.
        seconds: wall time.
    """

    losses: list[float]
    tokens: list[int]
    step: int
    staleness: int
    update_norm: float
    updates: int
    skipped: int
    seconds: float


class Trainer:
    """Trains on one example or several at a time, in the calling thread.

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
        self._gather = train_in_backward(model, optimizer, trainable, seed, self._count)
        self.frozen = self._gather.frozen

    def step(self, items: Sequence[Item]) -> StepResult:
        """Forward, backward and one update on all of `items`.

        The loss of the step is the mean over the items of weight * mean negative log-likelihood of the item's trained
        tokens, so an item counts the same however long it is.
        """
        began, steps_before = time.perf_counter(), self.progress.steps
        self._squares, self._updates, self._skipped = 0.0, 0, 0
        losses, tokens = [], []
        self._gather.begin()
        for number, item in enumerate(items, 1):
            self._gather.more = number < len(items)
            loss, count = self._loss(item.encoded, item.context or self.context, item.likeliest)
            (item.weight / len(items) * loss).backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            tokens.append(count)
        self._gather.finish()
        step = self.progress.advance()
        return StepResult(
            losses=losses,
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

    def _loss(
        self, example: Encoded, context: Literal["frozen", "full"], likeliest: Likeliest | None = None
    ) -> tuple[torch.Tensor, int]:
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
        if likeliest is not None:
            loss = likeliest.divergence(logits[mask]).mean()
        else:
            loss = torch.nn.functional.cross_entropy(logits[mask].float(), targets)
        return loss, int(targets.numel())

    def _count(self, _name: str, result: UpdateResult) -> None:
        self._updates += 1
        self._skipped += int(result.skipped)
        self._squares += float(result.norm) ** 2
        self._between_layers()
