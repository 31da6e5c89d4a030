"""Activation checkpointing: a layer's activations are not kept, but computed again in its backward pass.

Sound together with updates inside the backward pass: a layer is computed again before its own backward pass, and only
layers above it have been updated by then. With other trainer threads the second pass may see newer weights than the
first, as every backward pass here may.

The gradient of a layer's first argument, its hidden states, is all that a second pass gives. So a layer that takes
anything else with a gradient keeps its activations, however many they are. No layer is computed again where two of them
share a weight, which the upper one would have updated before the lower one's second pass, nor where a layer takes the
keys and values of another, which that one would have left without a gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
        if _apart(model):
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    self._wrap(module)
                    self._layers += 1

    @contextmanager
    def within_budget(self, tokens: int, taken: int = 0) -> Iterator[None]:
        """Around a forward pass over `tokens` tokens; `taken` bytes of the budget are held by earlier ones."""
        known = self._bytes_per_token
        self._room = max(self._budget - taken, 0)
        self._on = self._room == 0 or (
            tokens > _FIRST_TOKENS if known is None else known * tokens > self._room
        )
        try:
            if self._on or known is not None or not torch.is_grad_enabled():
                yield
            else:
                self._saved, self._seen = {}, 0
                with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
                    yield
                self._bytes_per_token = self._whole() / tokens
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

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._on or not torch.is_grad_enabled() or _has_gradient((args, kwargs)):
                out = plain(hidden, *args, **kwargs)
                self._after_one()
                return out
            return _Recomputed.apply(hidden, lambda h: plain(h, *args, **kwargs))  # type: ignore[no-untyped-call]

        layer.forward = forward


def _apart(model: PreTrainedModel) -> bool:
    """Has each layer weights, keys and values of its own?"""
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        return False  # handed on in a dictionary, not as an argument with a gradient
    seen = set[int]()
    for layer in _layers(model):
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            return False
        seen |= own
    return True


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Those that lie in no other layer; one that lies in two places twice."""
    if isinstance(module, GradientCheckpointingLayer):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


def _has_gradient(value: Any) -> bool:
    """Is there a tensor in it that requires a gradient?"""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return False
    return any(_has_gradient(one) for one in value)


class _Recomputed(torch.autograd.Function):
    """hidden -> layer(hidden); everything else that the layer takes (positions, masks, states) is constant."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: Callable[[Tensor], Any]) -> Any:
        ctx.save_for_backward(hidden)
        ctx.layer = layer
        return layer(hidden)  # autograd runs this without gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.layer(hidden)
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [
            (o, g)
            for o, g in zip(outs, gradients, strict=True)
            if isinstance(o, Tensor) and o.requires_grad and g is not None
        ]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return hidden.grad, None
