"""Trains the input embedding inside the backward pass, and the head where that is the same weight.

The gradient of an embedding has a row for each token that was looked up and gets a gradient, and nothing else: torch's
own sparse gradient, token ids and rows, which also knows what a model does to the rows afterwards (Gemma scales them).
It is the last gradient of a backward pass. A head that is tied to the embedding hands over what it was given, and one
update takes both: G = D^T X + sum over tokens of one-hot(token) row.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hogwild import pulse
from hogwild.apollo import Optimizer
from hogwild_kernels import UpdateResult, products, tied_factors


class Head(Protocol):
    """A linear layer whose weight is the embedding's."""

    protected: Tensor | None

    def take(self, factor: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """X (T, n) without its protected part and D (T, V), times `factor`, of every forward pass since the last."""

    def update_bias(self, d: Tensor) -> None:
        """As every linear layer does with D."""


class Waits(Protocol):
    """More backward passes come before anything is updated; gradients are so many times too large; and what all of them
    are multiplied by, see `Gather.finish`."""

    more: bool
    scale: float
    factor: Tensor | None


class TrainedEmbedding:
    """The input embedding (V, n) of a trainer's skeleton.

    Attributes:
        layer: name of the module.
        name: of its weight.
        heads: layers with the same weight; empty where head and embedding are two weights.
        protected: (k,) int64 tokens whose rows no update touches (protection.py).
    """

    def __init__(
        self,
        layer: str,
        name: str,
        module: torch.nn.Embedding,
        optimizer: Optimizer,
        seed: int,
        on_update: Callable[[str, UpdateResult], None],
        gather: Waits,
    ) -> None:
        """Changes `module`: its weight gets a sparse gradient, which is dropped once it has been used."""
        self.layer, self.name = layer, name
        self.heads: Sequence[Head] = ()
        self.protected: Tensor | None = None
        self._weight, self._optimizer, self._seed, self._on_update = module.weight, optimizer, seed, on_update
        self._gather = weakref.ref(gather)
        module.sparse = True
        module.weight.requires_grad_(True)

        alive, whole = weakref.ref(self), self._gather  # see `backward._train_small`

        def accumulated(_parameter: Tensor) -> None:
            pulse.beat()
            here, there = alive(), whole()
            if here is not None and there is not None and not there.more:
                here.update()

        module.weight.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]  # untyped in torch

    def update(self, factor: Tensor | None = None) -> None:
        """One update from every backward pass since the last one; none if nothing reached the weight.

        `factor`: of what the heads have kept, see `Gather.finish`.
        """
        grad, self._weight.grad = self._weight.grad, None
        tokens, rows = self._touched(grad)
        taken = [one for head in self.heads if (one := head.take(factor)) is not None]
        weight = self._weight.data
        whole = self._gather()
        scale = 1.0 if whole is None else whole.scale
        if whole is not None and whole.factor is not None:
            # Of the last pass there may be rows of protected tokens alone, which are left out.
            rows = rows * whole.factor
        if not taken:
            if len(tokens):
                rows = rows if scale == 1.0 else rows.float() / scale
                done = self._optimizer.update_embedding(self.name, weight, tokens, rows, self._seed)
                self._on_update(self.name, done)
            return
        x, d = taken[0] if len(taken) == 1 else (torch.cat(part) for part in zip(*taken, strict=True))
        head = self.heads[0]
        if head.protected is not None:
            rows = products.without(rows, head.protected)  # as rows of the head, they act on its inputs too
        rows = rows if scale == 1.0 else rows.float() / scale
        biased = d
        if self.protected is not None:
            d = d.index_fill(1, self.protected, 0.0)  # as rows of the embedding, they stay as they are
        x, d = tied_factors(x, d, tokens, rows)
        protects = head.protected is not None
        self._on_update(
            self.name,
            self._optimizer.update_linear(self.name, weight, x, d, self._seed, one_scale=protects),
        )
        head.update_bias(biased)

    def forget(self) -> None:
        """Drop what a step that was given up has left."""
        self._weight.grad = None

    def _touched(self, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (S,) int64, repeats allowed, and the gradient (S, n) of the row that each looked up.

        Left out: what gets no gradient, as context that is constant, and what is protected.
        """
        if grad is None:
            empty = torch.empty(0, dtype=torch.int64, device=self._weight.device)
            return empty, self._weight.data.new_empty(0, self._weight.shape[1])
        if not grad.is_sparse:  # the model uses its weight for something else too
            grad = grad.to_sparse(1)
        tokens, rows = grad._indices()[0], grad._values()
        reached = rows.any(dim=1)  # NaN counts: the kernels stop it and say so
        if self.protected is not None:
            reached &= ~torch.isin(tokens, self.protected)
        return tokens[reached], rows[reached]
