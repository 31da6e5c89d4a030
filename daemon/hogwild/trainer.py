"""One lock-free trainer: a skeleton of views, and a step of read context, forward, backward-and-update."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hogwild import norms, skeleton
from hogwild.apollo import Optimizer
from hogwild.backward import PROTECTED, train_in_backward
from hogwild.batch import Encoded, Item, Work, cut, packs, parts, runs
from hogwild.context import SHORTEST, Layers, Pack, Segment, State, fixed_cache, read_one, repeats
from hogwild.errors import LossError
from hogwild.gpu_memory import CONTEXTS
from hogwild.loss import bounded_loss, negative_log_likelihoods, unlearning_limit
from hogwild.precision import Wide
from hogwild.prefixes import plan
from hogwild.recompute import Recompute
from hogwild.step_losses import StepLosses, trainable
from hogwild.streams import Stream, put
from hogwild.training_progress import Progress
from hogwild.trial import Verdict, calls, judge
from hogwild_kernels import UpdateResult

__all__ = ["Encoded", "Item", "Progress", "StepResult", "Trainer"]


@dataclass
class StepResult:
    """What one training step did.

    Attributes:
        losses: of each item, in order: mean negative log-likelihood of its trained tokens before the update, nats
            (the mean divergence for an item with `likeliest`).
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

    Context is frozen unless told otherwise: tokens that predict nothing trained are constants. Those before the first
    trained token are read without gradient and enter as keys and values or recurrent state; those between trained
    ones (the user's later turns) go through with them, but no linear layer passes a gradient back through them or is
    updated from them. So the rows of every update are those of the trained tokens. (What is no matrix, such as the
    decay of a recurrent layer, still sees later turns.) With "full" context, gradients reach every token.

    Args:
        model: this trainer's own skeleton; changed so that its backward pass updates the weights.
        context: "frozen" or "full", for items that do not say.
        seed: varies the rounding between threads.
        between_layers: called before each layer of a forward pass and after each weight's update; the place to yield
            to the server.
        batch_tokens: trained tokens that go through the model at once. Items of one step share a pass up to that many;
            of contexts, which are read without gradient, CONTEXTS times as many.
        activation_mib: memory for activations; a pass that would need more computes them twice instead, and a step of
            several passes that would keep more for its update ends in several updates.
        unlearn_until_loss: nats; a token with a negative weight counts until its loss is that high.
        max_loss: nats a trained token; a step with an item above it is refused before its backward pass.
        embeddings: train the input embedding, and a head that is tied to it.
        verdict: what another trainer of the same model has found out about it; None: it is tried.

    Attributes:
        verdict: what holds for every trainer of this model.
        stream: where all of its work is queued, on a GPU.
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
        batch_tokens: int = 512,
        activation_mib: int = 2048,
        unlearn_until_loss: float = 5.0,
        max_loss: float = math.inf,
        embeddings: bool = False,
        verdict: Verdict | None = None,
    ) -> None:
        self.model, self.progress, self.context = model, progress, context
        self._between_layers, self._batch_tokens = between_layers, batch_tokens
        self._unlearning_limit = unlearning_limit(
            unlearn_until_loss, model.config.get_text_config().vocab_size
        )
        self._max_loss, self._context_tokens = max_loss, CONTEXTS * batch_tokens
        self.stream = Stream(model.device)
        self._results: list[tuple[str, UpdateResult]] = []
        self._moved: dict[str, float] = {}
        if self.stream.waits:
            norms.fuse(model)
        # Not in this trainer's stream: the model has just been built in the one that is current.
        called = calls(model) if verdict is None else verdict.calls
        skeleton.set_apart(model, called.uncalled)
        self._wide = Wide(model)
        self._layers = Layers(model)
        self.verdict = verdict or judge(model, self._layers, self._wide.dtype, called)
        self._packs = self.verdict.packs
        self._gather = train_in_backward(
            model, optimizer, trainable, seed, self._count, self._wide.sources, embeddings, called.rows
        )
        self._gather.itemsize = self._wide.dtype.itemsize
        self.frozen = self._gather.frozen
        # In a row that mixes trained tokens and constants, only linear layers and keys and values tell them apart.
        vectors = all(model.get_parameter(name).ndim == 1 for name in self._gather.small)
        self._merges = self._packs and vectors
        self._recompute = Recompute(model, activation_mib << 20)
        text = model.config.get_text_config(decoder=True)
        self._activations = activation_mib << 20
        self._input_nbytes = int(text.hidden_size * text.num_hidden_layers * self._wide.dtype.itemsize)
        self._repeats = repeats(text)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a layer
                module.register_forward_pre_hook(lambda *_: between_layers())

    @property
    def can_freeze(self) -> bool:
        """Can this model's context be read without gradient? Not where the text after it would come out otherwise."""
        return self.verdict.continues

    @property
    def trains_embeddings(self) -> bool:
        """Is the input embedding trained?"""
        return self._gather.embedding is not None

    def step(self, items: Sequence[Item]) -> StepResult:
        """Forward, backward and an update on all of `items`; several where `activation_mib` would not suffice.

        The loss of the step is the mean over the items of weight * mean negative log-likelihood of the item's trained
        tokens, so an item counts the same however long it is.

        Raises:
            LossError: an item's loss is not finite, or above `max_loss`; nothing has been written.
        """
        with self.stream.current():
            return self._step(items)

    def _step(self, items: Sequence[Item]) -> StepResult:
        began, steps_before = time.perf_counter(), self.progress.steps
        self._results = []
        self._wide.refresh()
        work = [self._cut(index, item, item.context or self.context) for index, item in enumerate(items)]
        noted = StepLosses(len(work), self._max_loss, self.stream.waits)
        try:
            self._train(work, noted)
            losses, norms, skipped = self._settle(noted)
        except LossError:
            self._gather.forget()
            raise
        step = self.progress.advance()
        return StepResult(
            losses=losses,
            tokens=[len(one.targets) for one in work],
            step=step,
            staleness=step - 1 - steps_before,
            update_norm=sum(norm**2 for norm in norms) ** 0.5,
            updates=len(norms),
            skipped=skipped,
            seconds=time.perf_counter() - began,
        )

    def _train(self, work: list[Work], losses: StepLosses) -> None:
        """Forward, backward and update; notes the loss of each."""
        passes = [[one] for one in work]
        if self._packs:
            limits = self._batch_tokens, self._context_tokens
            passes = packs(work, lambda one: (len(one.ids), len(one.context)), limits)
        split = parts(passes, self._may_wait)
        self._gather.begin(self._scale(work))
        if judged := len(split) > 1:  # all of it, before any of it is written
            with torch.no_grad():
                for group in self._with_contexts([one for part in split for one in part]):
                    losses.note(group, self._losses(group))
        for part in split:
            if judged:
                self._wide.refresh()  # of what the part before has moved
            for number, group in enumerate(self._with_contexts(part), 1):
                self._gather.more = number < len(part)
                self._pass(group, len(work), losses, noted=judged)
            self._gather.finish(losses.factor)

    def _pass(self, group: Sequence[Work], items: int, losses: StepLosses, *, noted: bool) -> None:
        """Forward and backward through what goes together, of a step with so many items, whose losses may have been
        noted before. Its graph, which keeps the contexts, is gone when it returns."""
        found = self._losses(group)
        if not noted:
            losses.note(group, found)
        pairs = zip(group, losses.gated(found), strict=True)
        self._gather.factor, share = losses.factor, self._gather.scale / items
        summands = [bounded_loss(nll, one.weight * share, self._unlearning_limit) for one, nll in pairs]
        torch.stack(summands).sum().backward()  # type: ignore[no-untyped-call]

    def _scale(self, work: Sequence[Work]) -> float:
        """By how much the gradients of a step are made larger: fp16 has no numbers small enough for a token's share of
        a mean. With it, no token counts more than 1."""
        if self._wide.dtype != torch.float16:
            return 1.0
        shares = [abs(one.weight) / len(work) / len(one.targets) for one in work]
        return 2.0 ** -math.ceil(math.log2(max(shares))) if any(shares) else 1.0

    def _may_wait(self, tokens: int) -> int:
        """Tokens whose rows may wait for an update beside a pass of so many that keeps no more than it must."""
        return (self._activations - tokens * self._input_nbytes) // max(self._gather.row_nbytes, 1)

    def trainable(self, loss: float, weight: float) -> bool:
        """Is the loss of an item with this weight one that may move weights?"""
        return trainable(loss, weight, self._max_loss)

    def take_moved(self) -> dict[str, float]:
        """weight -> sum of the norms of its updates since this was last asked."""
        moved, self._moved = self._moved, {}
        return moved

    def protect(self, directions: Mapping[str, Tensor]) -> None:
        """Keep updates out of these directions of the layers' inputs: name of a linear layer -> (k, n); that of the
        input embedding -> (k,) tokens.

        What is no linear layer (norms, biases, convolutions) acts on every text alike, and is left as it is.
        """
        for linear in self._gather.linears:
            linear.protected = directions.get(linear.name)
            if linear.trains_bias:
                linear.trains_bias = False
                self._gather.frozen[f"{linear.name}.bias"] = PROTECTED
        if (embedding := self._gather.embedding) is not None:
            embedding.protected = directions.get(embedding.layer)
        for name in self._gather.small:
            self.model.get_parameter(name).requires_grad_(False)
            self._gather.frozen[name] = PROTECTED

    @torch.no_grad()
    def loss(self, example: Encoded) -> float:
        """The loss with the weights as they are now, nats a trained token."""
        with self.stream.current():
            self._wide.refresh()
            return float(self._losses([cut(0, Item(example), "full", merge=False)])[0].mean())

    def _cut(self, index: int, item: Item, context: Literal["frozen", "full"]) -> Work:
        shortest = 1 if self._packs else SHORTEST
        return cut(index, item, context if self.can_freeze else "full", self._merges, shortest)

    def _with_contexts(self, passes: Sequence[list[Work]]) -> Iterator[list[Work]]:
        """Each pass, with its contexts read; not all of them at once where they are long."""
        for run in runs(passes, self._context_tokens):
            work = [one for group in run for one in group]
            self._read(work)
            yield from run
            for one in work:
                one.after = None

    def _read(self, work: Sequence[Work]) -> None:
        """Read the contexts; a beginning that several have in common once."""
        planned = plan([one.context for one in work])
        states: dict[int, State] = {}
        for level in planned.levels():
            segments = []
            for number in level:
                node = planned.nodes[number]
                segments.append(Segment(node.ids, None if node.parent is None else states[node.parent]))
            states.update(zip(level, self._states(segments), strict=True))
        for one, end in zip(work, planned.ends, strict=True):
            one.after = None if end is None else states[end]

    @torch.no_grad()
    def _states(self, segments: list[Segment]) -> list[State]:
        if not self._packs:
            return [read_one(self.model, self._layers, segment, self._batch_tokens) for segment in segments]
        most, found = self._context_tokens, dict[int, State]()
        for row in packs(segments, lambda one: (len(one.ids),), [most]):
            ends = self._pack_states([Segment(one.ids[:most], one.after) for one in row])
            for start in range(most, len(row[0].ids), most):  # one that has a row of its own
                ends = self._pack_states([Segment(row[0].ids[start : start + most], ends[0])])
            found.update(zip(map(id, row), ends, strict=True))
        return [found[id(one)] for one in segments]

    def _pack_states(self, segments: list[Segment]) -> list[State]:
        pack = Pack(segments, self._layers, self._wide.dtype, self.stream.device, keep=True)
        self.model.base_model(pack.ids, **pack.arguments)
        return pack.states()

    def _losses(self, group: Sequence[Work]) -> list[Tensor]:
        """Of each one (T,) fp32: the negative log-likelihoods of its trained tokens, or their divergences."""
        device = self.stream.device
        constant = [[False] * len(one.ids) if not one.constant else one.constant for one in group]
        mask = [flag for flags in constant for flag in flags]
        fixed = put(mask, device) if torch.is_grad_enabled() and any(mask) else None
        trained = [row for row, flag in enumerate(mask) if not flag]
        self._gather.rows = len(mask), None if fixed is None else put(trained, device)
        segments = [one.segment for one in group]
        self._gather.context = sum(segment.start for segment in segments)
        if self._packs:
            pack = Pack(segments, self._layers, self._wide.dtype, device, fixed)
            ids, arguments = pack.ids, pack.arguments
        else:
            ids = put(list(segments[0].ids), device)[None]
            arguments = self._layers.arguments(fixed_cache(segments[0].after))
        places, begun = [], 0
        for one in group:
            places += [begun + place for place in one.places]
            begun += len(one.ids)
        targets = put([target for one in group for target in one.targets], device)
        beside = self._repeats * sum(segment.context_nbytes for segment in segments)
        with self._recompute.within_budget(ids.numel(), self._gather.waiting_nbytes, beside):
            logits = self.model(ids, logits_to_keep=put(places, device), **arguments).logits
        losses = negative_log_likelihoods(logits[0], targets)
        found, begun = [], 0
        for one in group:
            here = slice(begun, begun + len(one.targets))
            if one.likeliest is None:
                found.append(losses[here])
            else:
                found.append(one.likeliest.divergence(logits[0, here]))
            begun += len(one.targets)
        return found

    def _count(self, name: str, result: UpdateResult) -> None:
        self.progress.moved()
        self._results.append((name, result))
        self._between_layers()

    def _settle(self, losses: StepLosses) -> tuple[list[float], list[float], int]:
        """The losses; the norm of each update, in order; how many were skipped. Of all at once, for on a GPU this
        waits.

        Raises:
            LossError: see `StepLosses.read`.
        """
        results, self._results = self._results, []
        numbers, waits = losses.numbers(), self.stream.waits
        count = len(numbers)
        if waits:
            numbers = torch.cat([numbers, *(one.to(self.stream.device) for _, one in results)])
        told = numbers.tolist()
        if waits:
            self.progress.moved()  # again: an epoch that began since the update was queued may have missed it
            found, skipped = told[count::2], int(sum(told[count + 1 :: 2]))
        else:
            found = [float(one.norm) for _, one in results]
            skipped = sum(int(one.skipped) for _, one in results)
        read = losses.read(told[:count])
        for (name, _), norm in zip(results, found, strict=True):
            self._moved[name] = self._moved.get(name, 0.0) + norm
        return read, found, skipped
