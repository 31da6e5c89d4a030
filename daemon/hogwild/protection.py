"""What updates leave alone: the directions in which a layer's inputs lie when the model reads texts of its own.

An update of W (m, n) is D^T X, so it changes what the layer makes of an input v by D^T (X v). Where the rows of X have
no part in the directions B (k, n) that general text takes, X B^T = 0, general text goes through the layer as before,
however long it is trained: x - (x B^T) B takes the place of x. APOLLO's scales per column (m < n) would mix the columns
again, so such a weight gets one scale for all of it; and what acts on every text alike (norms, biases) is not trained.

An embedding is a linear layer whose inputs are one-hot, so its principal directions are the tokens that these texts use
most: no update touches their rows. A weight that is embedding and head is protected on both sides.

The directions are the principal ones of the inputs of the model's own texts (selfreplay.py), found once, before the
first step, and kept as `protected.safetensors` in the state folder, so that a restart goes on with the very same.

Source: gradient projection memory (Saha et al., arXiv:2103.09762) and orthogonal weights modification (Zeng et al.,
arXiv:1810.01256), here on the factors of an update instead of on a gradient.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from hogwild import skeleton
from hogwild.errors import HogwildError
from hogwild.files import replace_file

ROUNDS = 3  # of subspace iteration: what the exact directions hold, to within a hundredth
VERSION = "2"


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    trainable: Collection[str],
    texts: Sequence[Sequence[int]],
    *,
    rank: int,
    budget_bytes: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
    embeddings: bool = False,
) -> dict[str, Tensor]:
    """The principal directions of every linear layer's inputs over `texts`.

    The texts are read as often as it takes to hold the inputs of only so many layers at a time.

    Args:
        model: for reading only.
        trainable: names of weights; the layers of others are left out.
        rank: directions of a layer, at most; never more than half of its inputs.
        budget_bytes: of inputs that are held at a time (one layer's at least).
        stopped: asked before each text; then {} is returned.
        embeddings: also of the input embedding, and of a head that is tied to it.

    Returns:
        Name of a linear layer -> (k, n) orthonormal rows, of the weight's type, one tensor for layers that share
        their input. Layers that share their weight go by the first one's name. Name of the input embedding -> (k,)
        int64 tokens, ascending.
    """
    table = model.get_input_embeddings().weight if embeddings else None
    linears = _by_weight(model, trainable, table)
    given = _given(model, linears, texts[0])
    first: dict[tuple[int, ...], str] = {}
    # Which layer stands for each: the first one that is given the very same. What the first text does not reach is
    # given what nobody knows yet.
    shared = {name: first.setdefault(tuple(given[name]), name) if given[name] else name for name in linears}
    waiting = [name for name in linears if shared[name] == name]
    rows = sum(map(len, texts))
    held_by = {name: rows * max(len(given[name]), 1) * _row_nbytes(linears[name][0]) for name in waiting}
    found: dict[str, Tensor] = {}
    while waiting:
        group = [waiting.pop(0)]
        held = held_by[group[0]]
        while waiting and held + held_by[waiting[0]] <= budget_bytes:
            held += held_by[waiting[0]]
            group.append(waiting.pop(0))
        inputs = _inputs(model, {name: linears[name] for name in group}, texts, stopped)
        if inputs is None:
            return {}
        for name, parts in inputs.items():
            x = torch.cat(parts).float()
            found[name] = principal(x, rank, seed).to(linears[name][0].weight.dtype)
            parts.clear()
    named = {name: found[one] for name, one in shared.items() if one in found}
    if table is not None:
        named[skeleton.table_name(model)] = commonest(texts, rank, len(table))
    return named


def experts(model: PreTrainedModel) -> list[str]:
    """Names of the layers that are experts, of which a text reaches a few."""
    return [name for name, module in model.named_modules() if hasattr(module, "stack")]


def _by_weight(
    model: PreTrainedModel, trainable: Collection[str], table: Tensor | None
) -> dict[str, list[torch.nn.Linear]]:
    """The first name of each weight that is trained, less ".weight" -> the linear layers that have it: what one of them
    is given moves it for all."""
    found: dict[str, list[torch.nn.Linear]] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if skeleton.is_linear(module):
            own = first.setdefault(id(module.weight), name)
            if f"{own}.weight" in trainable or module.weight is table:
                found.setdefault(own, []).append(module)
    return found


def commonest(texts: Sequence[Sequence[int]], rank: int, vocabulary: int) -> Tensor:
    """(k,) int64, k <= rank: the tokens that `texts` have most of, ascending; never more than half of all."""
    counts = torch.bincount(torch.tensor([token for text in texts for token in text]), minlength=vocabulary)
    k = max(min(rank, int(counts.count_nonzero()), vocabulary // 2), 1)
    return counts.sort(descending=True, stable=True).indices[:k].sort().values


def principal(
    x: Tensor,  # (N, n) fp32
    rank: int,
    seed: int,
) -> Tensor:
    """(k, n) orthonormal rows, k <= rank: where most of the rows of x lies. The same seed gives the same."""
    count, size = x.shape
    k = max(min(rank, count, size // 2), 1)
    basis = torch.randn(size, k, generator=torch.Generator().manual_seed(seed)).to(x.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(x.t() @ (x @ basis)).Q
    return basis.t().contiguous()


def _given(
    model: PreTrainedModel, linears: Mapping[str, Sequence[torch.nn.Linear]], text: Sequence[int]
) -> dict[str, list[int]]:
    """What each weight is given in a text, one number for each tensor, call after call."""
    found: dict[str, list[int]] = {name: [] for name in linears}
    last: list[Any] = [None, 0]

    def note(name: str) -> Callable[[Any, Any], None]:
        def hook(_module: Any, arguments: Any) -> None:
            if arguments[0] is not last[0]:
                last[:] = arguments[0], last[1] + 1
            found[name].append(last[1])

        return hook

    _read(model, linears, [text], note, lambda: False)
    return found


def _inputs(
    model: PreTrainedModel,
    linears: Mapping[str, Sequence[torch.nn.Linear]],
    texts: Sequence[Sequence[int]],
    stopped: Callable[[], bool],
) -> dict[str, list[Tensor]] | None:
    """Of each weight, what it is given (L, n) in every text, of its type. None if it was stopped."""
    found: dict[str, list[Tensor]] = {name: [] for name in linears}

    def note(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, arguments: Any) -> None:
            x = arguments[0]
            found[name].append(x.reshape(-1, x.shape[-1]).to(module.weight.dtype, copy=True))

        return hook

    if not _read(model, linears, texts, note, stopped):
        return None
    return {name: parts for name, parts in found.items() if parts}


def _row_nbytes(linear: torch.nn.Linear) -> int:
    """Bytes of what a layer is given for a token; of an expert, on average, if an eighth of them get each."""
    nbytes = linear.in_features * linear.weight.element_size()
    return -(-nbytes // 8) if hasattr(linear, "stack") else nbytes


def _read(
    model: PreTrainedModel,
    linears: Mapping[str, Sequence[torch.nn.Linear]],
    texts: Sequence[Sequence[int]],
    note: Callable[[str], Callable[[Any, Any], None]],
    stopped: Callable[[], bool],
) -> bool:
    layers = [(name, module) for name, modules in linears.items() for module in modules]
    head = model.get_output_embeddings()
    keep = 0 if any(module is head for _, module in layers) else 1  # 0: of every token
    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers]
    try:
        for text in texts:
            if stopped():
                return False
            model(torch.tensor([list(text)], device=model.device), use_cache=False, logits_to_keep=keep)
    finally:
        for handle in handles:
            handle.remove()
    return True


def write(path: Path, base: str, rank: int, bases: Mapping[str, Tensor]) -> None:
    """Write the file whole or not at all, fsynced.

    Args:
        base: digest of the model as it came.
        rank: that `measure` was asked for.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    unique: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, basis in bases.items():
        first[name] = next((other for other, known in unique.items() if known is basis), name)
        unique.setdefault(first[name], basis)
    about = {"version": VERSION, "base": base, "rank": str(rank), "same": json.dumps(first)}
    replace_file(path, save(dict(unique), about))


def load(path: Path, base: str, rank: int) -> dict[str, Tensor] | None:
    """The directions of the model with this digest; None where there are none, or were found with another rank.

    Raises:
        HogwildError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if (about.get("version"), about.get("base"), about.get("rank")) != (VERSION, base, str(rank)):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: tensors[first] for name, first in json.loads(about["same"]).items()}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise HogwildError(f"{path}: not readable ({error}); delete it, and it is made anew") from error
