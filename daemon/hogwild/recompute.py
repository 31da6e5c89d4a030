"""Activation checkpointing: a layer's activations are not kept, but computed again in its backward pass.

Sound together with updates inside the backward pass: a layer is computed again before its own backward pass, and only
layers above it have been updated by then. With other trainer threads the second pass may see newer weights than the
first, as every backward pass here may.

A weight that several layers share is updated at the end of the step (backward.py), so that the second passes of all of
them see it as it was.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_FIRST_TOKENS = 256
"""Tokens of the longest pass that keeps activations before it is known how large they are."""


class Recompute:
    """Lets the layers of a model keep their activations, or compute them a second time.

    Args:
        model: its layers are wrapped in place.
        budget: bytes of activations that one pass may keep; 0: it keeps each layer's input alone.
    """

    def __init__(self, model: PreTrainedModel, budget: int) -> None:
        self._budget, self._room, self._on = budget, budget, False
        self._bytes_per_token: float | None = None
        self._layers = 0
        self._saved: dict[int, int] | None = None  # during the first pass that keeps any: storage -> bytes
        self._seen = 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        for layer in _outermost(model):
            self._wrap(layer)
            self._layers += 1

    @contextmanager
    def within_budget(self, tokens: int, taken: int = 0, beside: int = 0) -> Iterator[None]:
        """Around a forward pass over `tokens` tokens; `taken` bytes of the budget are held by earlier ones, and
        `beside` bytes more are what attention keeps of their contexts."""
        known = self._bytes_per_token
        self._room = max(self._budget - taken, 0)
        kept = beside + (known or 0.0) * tokens
        self._on = self._room == 0 or kept > self._room or (known is None and tokens > _FIRST_TOKENS)
        try:
            if self._on or known is not None or not torch.is_grad_enabled():
                yield
            else:
                self._saved, self._seen = {}, 0
                with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
                    yield
                if (own := self._whole() - beside) > beside:  # or hardly any of it is the tokens'
                    self._bytes_per_token = own / tokens
        finally:
            self._on, self._saved = False, None

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Once layers are computed twice, what is saved says nothing about one that keeps its activations.
        if self._saved is not None and not self._on and storage.data_ptr() not in self._weights:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _whole(self) -> float:
        """Bytes of the activations of all layers, after those of the first few."""
        assert self._saved is not None
        return sum(self._saved.values()) * (self._layers / self._seen if self._on else 1.0)

    def _after_one(self) -> None:
        """In the first pass: as soon as the layers so far say that all will be too much, the others keep none."""
        if self._saved is not None and not self._on:
            self._seen += 1
            kept = sum(self._saved.values())
            self._on = kept * self._layers / self._seen > self._room

    def _wrap(self, layer: torch.nn.Module) -> None:
        plain = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._on or not torch.is_grad_enabled():
                out = plain(*args, **kwargs)
                self._after_one()
                return out
            return _Pass(plain, args, kwargs).recomputed(kwargs)

        layer.forward = forward


class _Pass:
    """One pass of a layer as a function of the tensors that it takes with a gradient.

    Those are its hidden states, and whatever else lies in its arguments: inputs of each layer, the keys and values of
    another. A mapping that layers hand on is an argument as it was, and what a layer adds to it is an output. It is not
    kept: autograd keeps the pass, and outputs in the mapping lead back to it by a way that Python's collector does not
    see, so that all of them would stay for ever.
    """

    def __init__(self, layer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._layer = layer
        handed = {name: one for name, one in kwargs.items() if isinstance(one, MutableMapping)}
        self._kinds: dict[str, Any] = {name: type(one) for name, one in handed.items()}
        before = {name: dict(one) for name, one in handed.items()}
        plain = {name: one for name, one in kwargs.items() if name not in before}
        self._leaves, self._inside = tree_flatten((args, plain, before))
        self._places = [
            n for n, one in enumerate(self._leaves) if isinstance(one, Tensor) and one.requires_grad
        ]

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Any], TreeSpec]:
        """Its outputs and what it adds to mappings, flat, and how they belong together."""
        leaves = list(self._leaves)
        for place, one in zip(self._places, inputs, strict=True):
            leaves[place] = one
        args, kwargs, before = tree_unflatten(leaves, self._inside)
        handed = {name: kind(before[name]) for name, kind in self._kinds.items()}
        out = self._layer(*args, **kwargs, **handed)
        added = {
            name: {key: one for key, one in now.items() if one is not before[name].get(key)}
            for name, now in handed.items()
        }
        return tree_flatten((out, added))

    def recomputed(self, kwargs: dict[str, Any]) -> Any:
        """What the layer returns; the mappings of `kwargs` get what it adds. Nothing is kept but the inputs."""
        shapes: list[TreeSpec] = []
        inputs = [self._leaves[place] for place in self._places]
        for place in self._places:
            self._leaves[place] = None  # autograd keeps them, for as long as they are needed
        outs = _Recomputed.apply(self, shapes, *inputs)  # type: ignore[no-untyped-call]
        out, added = tree_unflatten(outs, shapes[0])
        for name, new in added.items():
            kwargs[name].update(new)
        return out


class _Recomputed(torch.autograd.Function):
    """Runs a pass without gradient; in the backward pass, again with it."""

    @staticmethod
    def forward(ctx: Any, one: _Pass, shapes: list[TreeSpec], *inputs: Tensor) -> tuple[Any, ...]:
        ctx.save_for_backward(*inputs)
        ctx.one = one
        outs, shape = one.run(inputs)  # autograd runs this without gradient
        shapes.append(shape)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [one.detach().requires_grad_() for one in ctx.saved_tensors]
        with torch.enable_grad():
            outs, _ = ctx.one.run(inputs)
        pairs = [
            (o, g)
            for o, g in zip(outs, gradients, strict=True)
            if isinstance(o, Tensor) and o.requires_grad and g is not None
        ]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return None, None, *(one.grad for one in inputs)


def _outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Layers that lie in no other layer."""
    if isinstance(module, GradientCheckpointingLayer):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)
