"""Text that is read and not trained: run once, without gradient, and constant from then on.

What a model keeps of the tokens before is a `State`: keys and values of its attention layers, the recurrent and the
convolution state of its Gated-DeltaNet or Mamba layers. A `State` never changes, so several texts may go on from one,
and a layer may be computed twice from it (activation checkpointing).

Two ways to go on from states:

- `Pack`: several texts in one row of tokens, each seeing its own state and itself alone, for models that have nothing
  but attention layers. Every other part of such a model works on single tokens, so nothing crosses from text to text.
- `fixed_cache`: one text. Recurrent states have no mask that would keep neighbours apart.

Whether a model can do either is judged by what it computes (`trial.py`).
"""

# mypy: disable-error-code="misc"
# transformers is untyped, and layers of its caches are subclassed here.

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from hogwild.streams import put

ATTENTION = {"full_attention", "sliding_attention"}
DISTANCE_FROM_MASK = {"bloom", "mpt"}
"""Models that bias attention by distance, counted from a mask of whole texts: no row of several."""
_CACHE_NAMES = ("past_key_values", "cache_params")
"""What models of transformers call the cache. Most swallow any other name, and read without a cache."""
_MASK_PIECE = 1 << 20
"""Elements of a mask that are made at once: what one is made of takes ten times what it ends up as."""
SHORTEST = 2
"""Tokens that may go on from a recurrent state with gradient. A single one takes the way of decoding, which writes into
the state that others go on from, and which autograd cannot go back through."""


@dataclass(frozen=True)
class State:
    """What the layers keep of the first `length` tokens of a text. Shared: nobody writes to it."""

    length: int
    layers: list[Any]  # of the model's cache, one a layer


@dataclass(frozen=True)
class Segment:
    """Tokens of one text, and the state of those before them (None: they are the first)."""

    ids: Sequence[int]
    after: State | None = None

    @property
    def start(self) -> int:
        return 0 if self.after is None else self.after.length

    @property
    def context_nbytes(self) -> int:
        """Bytes of the keys and values of the tokens before it."""
        layers = [] if self.after is None else self.after.layers
        held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(one.nbytes for one in held if isinstance(one, Tensor))


def repeats(text: PreTrainedConfig) -> int:
    """How often attention writes out a key and a value: once for each of the query heads that share it."""
    queries = getattr(text, "num_attention_heads", None) or 1
    return max(queries // (getattr(text, "num_key_value_heads", None) or queries), 1)


class Layers:
    """Which kinds of layers a model keeps states for.

    Attributes:
        windows: of each layer, how far it looks back, itself included (None: to the first token), for models that
            have attention layers alone; else None.
        cache_name: what the model calls its cache; None: it takes none that is known here.
        known: can a state be made constant at all?
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config(decoder=True)
        self.types = get_layer_types_and_kwargs(self.config)[0]
        fresh = DynamicCache(config=self.config).layers
        shared = bool(getattr(self.config, "num_kv_shared_layers", None))
        accepted = inspect.signature(model.base_model.forward).parameters
        self.cache_name = next((name for name in _CACHE_NAMES if name in accepted), None)
        self.known = (
            not shared and self.cache_name is not None and all(type(layer) in _CONSTANT for layer in fresh)
        )
        self.windows: list[int | None] | None = None
        by_mask = bool(getattr(self.config, "alibi", self.config.model_type in DISTANCE_FROM_MASK))
        if (
            not shared
            and not by_mask
            and self.cache_name == "past_key_values"
            and set(self.types) <= ATTENTION
        ):
            self.windows = [getattr(layer, "sliding_window", None) for layer in fresh]

    @property
    def recurrent(self) -> bool:
        """Is there a layer that is no attention to each token before, or no layer of such kinds at all?"""
        return any("attention" not in kind or kind.startswith("linear") for kind in self.types)

    def arguments(self, cache: Cache | None) -> dict[str, Any]:
        """What the model takes besides tokens, to go on from a cache."""
        if cache is None:
            return {"use_cache": False}
        assert self.cache_name is not None
        return {self.cache_name: cache, "use_cache": True}

    def fresh(self, after: State | None) -> DynamicCache:
        """A cache that goes on from a state and leaves it as it is."""
        cache = DynamicCache(config=self.config)
        if after is not None:
            cache.layers = [_copy(layer) for layer in after.layers]
        return cache


def read_one(model: PreTrainedModel, layers: Layers, segment: Segment, chunk: int) -> State:
    """The state after a segment, `chunk` tokens at a time, which bounds the memory of a long one."""
    cache, ids = layers.fresh(segment.after), put(list(segment.ids), model.device)[None]
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            model.base_model(ids[:, start : start + chunk], **layers.arguments(cache))
    return State(segment.start + len(segment.ids), cache.layers)


def fixed_cache(after: State | None) -> Cache | None:
    """A cache for a pass with gradient: the state is constant, and what the pass adds is not kept.

    Not for a single token after a recurrent state: the code for one writes into the state (see `SHORTEST`).
    """
    if after is None:
        return None
    layers = []
    for layer in after.layers:
        fixed: Any = object.__new__(_CONSTANT[type(layer)])
        fixed.__dict__.update(layer.__dict__)
        fixed.record_past = True  # or a single token would be written into the convolution state in place
        layers.append(fixed)
    return Cache(layers=layers)


class Pack:
    """Several segments in one row of tokens, for a model with attention layers alone.

    Attributes:
        ids: (1, L) all tokens, one segment after the other.
        arguments: what the model takes besides them: positions, masks and the states as a cache.
    """

    def __init__(
        self, segments: Sequence[Segment], layers: Layers, dtype: torch.dtype, device: torch.device,
        constant: Tensor | None = None, keep: bool = False,
    ) -> None:  # fmt: skip
        """`constant` (L,) bool: tokens whose keys and values pass no gradient back. `keep`: `states` will be asked."""
        assert layers.windows is not None
        self.segments, self._windows = segments, layers.windows
        self.ids = put([token for segment in segments for token in segment.ids], device)[None]
        self.starts = [0]
        for segment in segments:
            self.starts.append(self.starts[-1] + len(segment.ids))
        self.arguments: dict[str, Any] = {"use_cache": False}
        if len(segments) == 1 and segments[0].after is None and constant is None and not keep:
            return  # the plainest case: the model's own causal mask does
        spans = [range(s.start, s.start + len(s.ids)) for s in segments]
        positions = put([place for span in spans for place in span], device)
        owner = put([number for number, span in enumerate(spans) for _ in span], device)
        masks: dict[str, Tensor] = {}
        for kind, window in zip(layers.types, layers.windows, strict=True):
            if kind not in masks:
                masks[kind] = self._mask(positions, owner, window, dtype)
        self.cache = _PackCache(segments, layers.windows, constant, keep)
        self.arguments = {
            "position_ids": positions[None],
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _mask(self, positions: Tensor, owner: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, L, K): 0 where a token may look, -inf where not; the K keys are all states, then all new tokens."""
        places, owners = [], []
        for number, segment in enumerate(self.segments):
            kept = _kept(segment.start, window)
            places.append(torch.arange(segment.start - kept, segment.start, device=positions.device))
            owners.append(torch.full((kept,), number, device=positions.device))
        key_positions, key_owners = torch.cat([*places, positions]), torch.cat([*owners, owner])
        mask = torch.zeros(len(positions), len(key_positions), dtype=dtype, device=positions.device)
        piece = max(_MASK_PIECE // len(key_positions), 1)
        for start in range(0, len(positions), piece):
            rows = slice(start, start + piece)
            sees = self._sees(positions[rows], owner[rows], key_positions, key_owners, window)
            mask[rows].masked_fill_(~sees, -torch.inf)
            del sees  # before the next piece is made
        return mask[None, None]

    @staticmethod
    def _sees(
        positions: Tensor, owner: Tensor, key_positions: Tensor, key_owners: Tensor, window: int | None
    ) -> Tensor:
        """(rows, K) bool: of the same text, not later and not beyond the window."""
        distance = positions[:, None] - key_positions[None]
        sees = (owner[:, None] == key_owners[None]) & (distance >= 0)
        return sees if window is None else sees & (distance < window)

    def states(self) -> list[State]:
        """Of each segment, after a pass over a pack made with `keep`."""
        found = []
        for number, segment in enumerate(self.segments):
            layers = [
                layer.state(number, self.starts[number], self.starts[number + 1])
                for layer in cast(list[_PackLayer], self.cache.layers)
            ]
            found.append(State(segment.start + len(segment.ids), layers))
        return found


class _Attention:
    """Keys and values (1, heads, kept, width) of one attention layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class _PackLayer(CacheLayerMixin):
    """The states of all segments, then the pass's own keys and values."""

    def __init__(
        self, before: list[_Attention | None], window: int | None, constant: Tensor | None, keep: bool
    ) -> None:
        super().__init__()
        self._before, self._window, self._keep = before, window, keep
        self._constant = None if constant is None else constant[:, None]  # (L, 1)
        there = [one for one in before if one is not None]
        self._joined: tuple[Tensor, Tensor] | None = None
        if there:
            self._joined = torch.cat([o.keys for o in there], 2), torch.cat([o.values for o in there], 2)
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._keep:
            self._new = key_states, value_states
        if self._constant is not None and torch.is_grad_enabled():
            key_states = torch.where(self._constant, key_states.detach(), key_states)
            value_states = torch.where(self._constant, value_states.detach(), value_states)
        if self._joined is None:
            return key_states, value_states
        keys, values = self._joined
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def state(self, number: int, start: int, stop: int) -> _Attention:
        """What segment `number`, tokens start to stop of the row, leaves behind."""
        assert self._new is not None
        parts = [part[:, :, start:stop] for part in self._new]
        before = self._before[number]
        if before is not None:
            joined = zip((before.keys, before.values), parts, strict=True)
            parts = [torch.cat(pair, dim=2) for pair in joined]
        kept = _kept(parts[0].shape[2], self._window)
        # A copy, so that the row of all segments is not held for the sake of one.
        keys, values = (part[:, :, part.shape[2] - kept :].clone() for part in parts)
        return _Attention(keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        joined = 0 if self._joined is None else self._joined[0].shape[2]
        return joined + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._joined is None else self._joined[0].shape[2]

    def get_max_length(self) -> int:
        return -1


class _PackCache(Cache):
    def __init__(
        self, segments: Sequence[Segment], windows: list[int | None], constant: Tensor | None, keep: bool
    ) -> None:
        before = [
            [None if segment.after is None else segment.after.layers[i] for segment in segments]
            for i in range(len(windows))
        ]
        layers = [_PackLayer(b, w, constant, keep) for b, w in zip(before, windows, strict=True)]
        super().__init__(layers=cast(Any, layers))


def _kept(length: int, window: int | None) -> int:
    return length if window is None else min(length, window - 1)


def _copy(layer: Any) -> Any:
    """A cache layer whose updates leave the original as it is. Keys and values are joined into new tensors by every
    update; recurrent and convolution states are written in place, so they are copied."""
    twin = copy.copy(layer)
    for name, value in layer.__dict__.items():
        if isinstance(value, dict):
            twin.__dict__[name] = {
                key: one.clone() if isinstance(one, Tensor) else one for key, one in value.items()
            }
    return twin


class _FixedKeys:
    """Update without keeping: keys and values so far, then the new ones."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _FixedState:
    """The same for convolution and recurrent states."""

    conv_states: dict[int, Tensor]

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        return torch.cat([self.conv_states[state_idx], conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        del state_idx
        return recurrent_states


class _FixedAttention(_FixedKeys, DynamicLayer): ...


class _FixedSliding(_FixedKeys, DynamicSlidingWindowLayer): ...


class _FixedLinear(_FixedState, LinearAttentionLayer): ...


class _FixedHybrid(_FixedState, _FixedKeys, LinearAttentionAndFullAttentionLayer): ...


class _FixedHybridSliding(_FixedState, _FixedKeys, LinearAttentionAndSlidingWindowAttentionLayer): ...


_CONSTANT: dict[type, type] = {
    DynamicLayer: _FixedAttention,
    DynamicSlidingWindowLayer: _FixedSliding,
    LinearAttentionLayer: _FixedLinear,
    LinearAttentionAndFullAttentionLayer: _FixedHybrid,
    LinearAttentionAndSlidingWindowAttentionLayer: _FixedHybridSliding,
}
