"""A small server in place of vLLM: it holds the weights in an arena, offers them to the daemon as vLLM's loader does,
and decodes with a Hugging Face model over them, one CUDA graph a token."""

# mypy: disable-error-code="misc"
# transformers is untyped, and a layer of its caches is subclassed here.

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

import gpu_models
from gpu_timing import Clock
from hogwild import skeleton
from hogwild.arena.client import Arena, Offer
from hogwild.context import Layers
from hogwild.weights import Weights

_BEAT_S = 1.0
_ROOM = 4 << 30  # beside the weights and what training takes: keys and values, two CUDA contexts

Choice = tuple[str, Path, int]
"""Name of a model, its folder, bytes of its weights."""


def serve(
    pipe: Any, sock: Path, choices: Sequence[Choice], device: torch.device, batch: int, length: int
) -> None:
    """The process: serves the first of `choices` that there is room for, and does what it is told.

    Args:
        pipe: takes (what, *arguments), gives (what, answer).
        batch: sequences that are decoded at once.
        length: tokens of each, after which it begins anew.
    """
    for name in ("CUDA_MPS_CLIENT_PRIORITY", "PYTORCH_ALLOC_CONF"):  # the trainer's, if it is a child of one
        os.environ.pop(name, None)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    fitting = [one for one in choices if free is None or one[2] * 1.25 + _ROOM < free]
    if not fitting:
        pipe.send(("nothing fits", free))
        return
    name, folder, _ = fitting[0]
    arena = gpu_models.make_arena(folder, device)
    server = _Server(skeleton.build(folder, Weights(arena)), batch, length)
    gauge = arena.control.new_gauge()
    Offer(sock, arena, {"url": ""}).start()
    pipe.send(("ready", (name, server.why_not)))
    obey(pipe, arena, lambda seconds: server.measure(seconds, gauge), server.loss)


def obey(
    pipe: Any,
    arena: Arena,
    measure: Callable[[float], dict[str, Any]],
    loss: Callable[[list[int]], float],
) -> NoReturn:
    """What a server is told, until it is killed."""
    answers: dict[str, Callable[..., Any]] = {
        "measure": measure,
        "loss": loss,
        "bits": lambda: gpu_models.bits(arena),
        "steps": lambda: arena.control.steps,
    }
    while True:
        what, *given = pipe.recv()
        pipe.send((what, answers[what](*given)))


class _Server:
    """Decodes greedily, a token of every sequence at a time.

    Attributes:
        why_not: why it does without a CUDA graph; "": it has one.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self._model, self._batch, self._length = model, batch, length
        self._clock = Clock(model.device)
        self._ids = torch.arange(3, 3 + batch, device=model.device)[:, None] % model.config.vocab_size
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._mask = torch.full((1, 1, 1, length), -torch.inf, dtype=model.dtype, device=model.device)
        layers = [_Slots(self._position, length) for _ in range(model.config.num_hidden_layers)]
        self._cached = Layers(model).arguments(Cache(layers=cast(Any, layers)))
        self.why_not = "" if self._clock.cuda else "there are none on a CPU"
        self._step()  # makes the cache
        try:
            self._replay = self._clock.captured(self._step)
        except RuntimeError as error:
            self._replay, self.why_not = self._step, str(error)
        self._restart()

    @torch.no_grad()
    def _step(self) -> None:
        self._mask.index_fill_(3, self._position, 0.0)
        logits = self._model(
            self._ids, position_ids=self._position[None], attention_mask=self._mask, **self._cached
        ).logits  # fmt: skip
        self._ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position.add_(1)

    def _restart(self) -> None:
        self._position.zero_()
        self._mask.fill_(-torch.inf)
        self._done = 0

    def measure(self, seconds: float, gauge: Any) -> dict[str, Any]:
        """Decode for so long.

        Returns {tokens, seconds, token_s: from token to token, out_of_range: tokens that are none}.
        """
        token_s: list[float] = []
        wrong, beat = 0, -_BEAT_S
        began = last = time.perf_counter()
        while last - began < seconds:
            if last - beat >= _BEAT_S:
                gauge.set_in_flight(self._batch)
                beat = last
            if self._done == self._length:
                self._restart()
            self._replay()
            tokens = self._ids.flatten().tolist()  # as an engine does, to send them
            self._done += 1
            wrong += sum(not 0 <= token < self._model.config.vocab_size for token in tokens)
            now = time.perf_counter()
            token_s.append(now - last)
            gauge.set_engine(self._batch, 0)
            gauge.add_tokens(self._batch, self._batch * token_s[-1])
            last = now
        gauge.set_engine(0, 0)
        gauge.set_in_flight(0)
        return {
            "tokens": self._batch * len(token_s), "seconds": last - began, "token_s": token_s, "out_of_range": wrong
        }  # fmt: skip

    @torch.no_grad()
    def loss(self, ids: list[int]) -> float:
        """Mean negative log-likelihood of the tokens after the first, nats, by the weights as they are now."""
        row = torch.tensor([ids], device=self._model.device)
        logits = self._model(row[:, :-1], use_cache=False).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits, row[0, 1:]))


class _Slots(CacheLayerMixin):
    """Keys and values of one layer in memory that stays where it is: (batch, heads, length, width)."""

    def __init__(self, position: Tensor, length: int) -> None:
        super().__init__()
        self._position, self._length = position, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            one.new_zeros(*one.shape[:2], self._length, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self._position, key_states)
        self.values.index_copy_(2, self._position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        del query_length
        return self._length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._length
