"""What a model's code can do, judged by what it computes in a few short passes.

Can it go on from a state? It may take a cache and make nothing of it. Does it call its linear layers? It may read their
weights and multiply by itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from hogwild.context import Layers, Pack, Segment, fixed_cache, read_one
from hogwild.skeleton import FrozenLinear
from hogwild.streams import put

_CONTEXT, _PIECE, _TOKENS = 13, 6, 24
"""Tokens that are read beforehand, in pieces of so many (the last is a single token), and all tokens."""
_TF32 = 2.0**-10
"""The precision with which a GPU may multiply fp32 numbers."""


@dataclass(frozen=True)
class Verdict:
    """What holds for every trainer of one model.

    Attributes:
        packs: several texts may share a row of tokens, each after its own context.
        continues: a text may go on from a context that was read beforehand.
        calls: of the model's linear layers.
    """

    packs: bool
    continues: bool
    calls: "Calls"


@dataclass(frozen=True)
class Calls:
    """What a model's code does with its linear layers.

    Attributes:
        uncalled: names of those that it does not call.
        rows: name -> inputs for each token of a pass, of those that it does; of an expert on average, of others rounded
            up.
    """

    uncalled: frozenset[str]
    rows: Mapping[str, float]


def judge(model: PreTrainedModel, layers: Layers, dtype: torch.dtype, found: Calls) -> Verdict:
    """`model`: a skeleton, as it will be trained but for its updates; `dtype`: of its activations."""
    packs = packs_exactly(model, layers, dtype)
    return Verdict(packs, packs or continues_exactly(model, layers), found)


@torch.no_grad()
def calls(model: PreTrainedModel) -> Calls:
    """Of a skeleton. A layer whose weight the model's code reads without ever calling it, as Mamba's for its time
    steps, cannot update itself. One that no token reaches, as an expert, is not even read."""
    called, read = Counter[int](), set[int]()

    class Watched(FrozenLinear):
        def forward(self, x: Tensor) -> Tensor:
            called[id(self)] += x.shape[:-1].numel()
            return super().forward(x)

        def __getattr__(self, name: str) -> Any:
            if name == "weight":
                read.add(id(self))
            return super().__getattr__(name)

    linears = {name: one for name, one in model.named_modules() if isinstance(one, FrozenLinear)}
    for linear in linears.values():
        linear.__class__ = Watched
    try:
        _read_a_few(model)
    except Exception:
        if model.device.type != "meta":
            raise
        # Code that looks at numbers where there are none: what came before it has been seen.
    finally:
        for linear in linears.values():
            linear.__class__ = FrozenLinear
    uncalled = frozenset(name for name, one in linears.items() if id(one) in read - called.keys())
    rows = {name: float(-(-called[id(one)] // _TOKENS)) for name, one in linears.items() if id(one) in called}
    stacks = dict[str, list[str]]()
    for name, one in linears.items():
        if hasattr(one, "stack"):
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    for names in stacks.values():  # a token reaches a few of them
        each = sum(called[id(linears[name])] for name in names) / (_TOKENS * len(names))
        rows |= dict.fromkeys(names, each)
    return Calls(uncalled, rows)


@torch.no_grad()
def kept(model: PreTrainedModel, layers: Layers) -> list[dict[str, tuple[int, ...]]] | None:
    """What each layer of a skeleton on the meta device keeps of a text: name -> shape, as "keys" or "recurrent_states".
    None: its code looks at numbers, or keeps it otherwise."""
    try:
        out = _read_a_few(model, use_cache=True)
        cache = getattr(out, layers.cache_name or "")
        found = []
        for layer in cache.layers:
            # Of recurrent ones there is a mapping, for layers that have several.
            parts = {
                k: next(iter(v.values()), None) if isinstance(v, dict) else v for k, v in vars(layer).items()
            }
            found.append({name: tuple(one.shape) for name, one in parts.items() if isinstance(one, Tensor)})
    except Exception:
        return None
    return found


def _read_a_few(model: PreTrainedModel, *, use_cache: bool = False) -> Any:
    """One pass; of a model on the meta device with tensors that have shapes and no numbers."""
    if model.device.type != "meta":
        return model(put(_ids(model), model.device)[None], use_cache=use_cache)
    with FakeTensorMode():
        parts = [*model.named_parameters(), *model.named_buffers()]
        shapes = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in parts}
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
        return torch.func.functional_call(model, shapes, (ids,), {"use_cache": use_cache})


def packs_exactly(model: PreTrainedModel, layers: Layers, dtype: torch.dtype) -> bool:
    """Does a text come out the same beside another one in a row of tokens, its context read beforehand?"""

    def go_on(ids: list[int]) -> Tensor:
        device, other = model.device, ids[::-1]
        context, after = ids[:_CONTEXT], ids[_CONTEXT:]
        reading = Pack([Segment(other[:_PIECE]), Segment(context)], layers, dtype, device, keep=True)
        model.base_model(reading.ids, **reading.arguments)
        beside, state = reading.states()
        pack = Pack([Segment(other[:_PIECE], beside), Segment(after, state)], layers, dtype, device)
        return _logits(model, pack.ids, len(after), pack.arguments)

    return layers.windows is not None and _is_exact(model, go_on)


def continues_exactly(model: PreTrainedModel, layers: Layers) -> bool:
    """Does a text come out the same if its context is read beforehand, in pieces?"""

    def go_on(ids: list[int]) -> Tensor:
        state = read_one(model, layers, Segment(ids[:_CONTEXT]), _PIECE)
        after = put(ids[_CONTEXT:], model.device)[None]
        return _logits(model, after, after.shape[1], layers.arguments(fixed_cache(state)))

    return layers.known and _is_exact(model, go_on)


@torch.no_grad()
def _is_exact(model: PreTrainedModel, go_on: Callable[[list[int]], Tensor]) -> bool:
    """Are the logits after a context, which `go_on` takes from its state, those of one pass over the whole text?

    A difference is measured against what leaving the context out would do: that shows a context that is lost or
    garbled, however much or little the model makes of it. Where it makes next to nothing of it, rounding alone would be
    as large; so a context counts for an eighth of the logits at least. Three quarters of the tokens have to agree, for
    rounding may send one of them to other experts.

    Half of the digits have to agree. Rounding takes the last ones, in deep models too; what is computed otherwise
    differs in the first. Over all architectures of the tests the exact ones differ by up to 0.03 in bf16 and 4e-6 in
    fp32, where 0.09 and 3e-4 are allowed, and the others by 0.12 to 0.8 in both.
    """
    ids = _ids(model)
    whole, after = (put(part, model.device)[None] for part in (ids, ids[_CONTEXT:]))
    try:
        wanted = _logits(model, whole, after.shape[1], {"use_cache": False})
        without = _logits(model, after, after.shape[1], {"use_cache": False})
        found = go_on(ids)
    except Exception:  # a cache of its own kind, other masks: whatever it is, it cannot be done
        return False
    precision = max(torch.finfo(model.dtype).eps, _TF32 if model.device.type == "cuda" else 0.0)
    effect = torch.maximum((without - wanted).norm(dim=-1), wanted.norm(dim=-1) / 8)
    agree = (found - wanted).norm(dim=-1) <= precision**0.5 * effect  # what is not finite does not
    return bool(agree.float().mean() >= 0.75)


def _logits(model: PreTrainedModel, ids: Tensor, last: int, arguments: dict[str, object]) -> Tensor:
    """(last, vocabulary) fp32, less what all tokens of the vocabulary have in common."""
    places = torch.arange(ids.shape[1] - last, ids.shape[1], device=ids.device)
    logits = model(ids, logits_to_keep=places, **arguments).logits[0].float()
    return cast(Tensor, logits - logits.mean(-1, keepdim=True))


def _ids(model: PreTrainedModel) -> list[int]:
    """Tokens from all over the vocabulary, but none with a meaning to the model's code (padding, a place for a
    picture)."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    special = [value for config in configs for name, value in vars(config).items() if "token_i" in name]
    vocabulary = configs[1].vocab_size
    plain = [token for token in range(vocabulary) if token not in special]
    return [plain[number * 7919 % len(plain)] for number in range(_TOKENS)]
