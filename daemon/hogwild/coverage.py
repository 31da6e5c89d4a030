"""Of a model and a layout: what a trainer would train, and what stays as it is, and why.

python -m hogwild.coverage MODEL LAYOUT.json [--embeddings] [--protected]

prints {"model": class, "trained": {name: elements}, "frozen": ...}; --embeddings: as `training.embeddings` says,
--protected: where `replay.protected_rank` keeps general text as it was.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from hogwild import gpu_memory, naming, skeleton, trial
from hogwild.apollo import Optimizer
from hogwild.backward import PROTECTED, train_in_backward
from hogwild.context import Layers, repeats
from hogwild.errors import HogwildError
from hogwild.layout import Layout

_CHUNKS = ("chunk_size", "mamba_chunk_size")
"""What configurations call the tokens of a chunk of a scan."""
_CHUNK = 64
"""Of those that do not say: the default of transformers' gated delta rule."""


@dataclass(frozen=True)
class Coverage:
    """What is trained of a model.

    Attributes:
        model: class of transformers.
        trained: parameter -> its elements.
        frozen: parameter, or checkpoint tensor that the language model has no use for -> (its elements, why). A tied
            head has none: they are the embedding's.
        sizes: what its memory is reckoned from.
    """

    model: str
    trained: dict[str, int]
    frozen: dict[str, tuple[int, str]]
    sizes: gpu_memory.Model


def examine(
    folder: Path, layout: Layout, *, embeddings: bool = False, experts: bool = False, protected: bool = False
) -> Coverage:
    """Build the skeleton on the meta device and ask it what it would train.

    Args:
        embeddings, experts: as `training.embeddings` and `training.experts` say.
        protected: updates leave general text alone (`Trainer.protect`).

    Raises:
        HogwildError: parameters of the model are in no file.
    """
    model = skeleton.empty(folder)
    found = naming.recipes(model, [*layout.tensors, *layout.frozen])
    regions, private = skeleton.place(model, found, layout.tensors)
    buffers = naming.buffers(model)
    sizes = {name: one.numel() for name, one in [*model.named_parameters(), *buffers.items()]}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    text, itemsize = model.config.get_text_config(), model.dtype.itemsize
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if missing := sorted(sizes.keys() - buffers.keys() - found.keys() - tied):
        raise HogwildError(
            f"{type(model).__name__} needs {', '.join(missing)}, which the checkpoint does not have"
        )
    model.tie_weights()
    for name in tied & regions.keys():
        skeleton.assign(model, name, torch.empty(regions[name].shape, device="meta"))
    skeleton.linearise(model, {})
    if experts:
        for name in skeleton.take_apart(model, regions, dict(found)):
            shapes[name], sizes[name] = regions[name].shape, math.prod(regions[name].shape)
    once = {name for name, _ in model.named_parameters()}  # a tied head is counted where it is the embedding
    model.arena_twins = skeleton.twins(model, found, regions)
    reasons = {
        recipe.parameter: next(
            (layout.frozen[n] for n in recipe.names if n in layout.frozen), "no one strided view"
        )
        for recipe in private
    }
    unused = cast(Optimizer, None)  # nothing is updated: no backward pass runs
    layers = Layers(model)
    called, kept = trial.calls(model), trial.kept(model, layers)
    attends = kept is None or any("keys" in parts for parts in kept)
    skeleton.set_apart(model, called.uncalled)
    gather = train_in_backward(model, unused, set(regions), 0, lambda *_: None, {}, embeddings, called.rows)
    gather.itemsize = itemsize
    asked = dict(gather.frozen)
    if protected:
        biases = [f"{linear.name}.bias" for linear in gather.linears if linear.trains_bias]
        asked |= dict.fromkeys([*gather.small, *biases], PROTECTED)
    frozen = {
        name: (sizes[name] if name in once | buffers.keys() else 0, reasons.get(name, why))
        for name, why in asked.items()
        if name in sizes
    }
    used = {name for recipe in found.values() for name in recipe.names}
    beside = {
        name: (0, f"not of the language model: {why}")
        for name, why in layout.frozen.items()
        if name not in used
    }
    trained = {name: size for name, size in sizes.items() if name not in frozen and name in once}
    return Coverage(
        type(model).__name__,
        trained,
        {**frozen, **beside},
        gpu_memory.Model(
            trained={name: shapes[name] for name in trained},
            copied=sum(sizes.get(recipe.parameter, 0) for recipe in private) * itemsize,
            vocabulary=text.vocab_size,
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            itemsize=itemsize,
            state=_state(text) if attends else 0,
            repeats=repeats(text),
            softcaps=bool(getattr(text, "final_logit_softcapping", None)),
            waits=sum(linear.row_nbytes for linear in gather.linears if linear.waits),
            scans=layers.recurrent,
            scan=max(
                (
                    _scan(text, parts["recurrent_states"])
                    for parts in kept or []
                    if "recurrent_states" in parts
                ),
                default=0,
            ),
            scores=text.num_attention_heads
            if attends and model.config._attn_implementation == "eager"
            else 0,
            uses={
                f"{linear.name}.weight": times
                for linear in gather.linears
                if (times := math.ceil(linear.rows) or linear.uses) > 1
            },
        ),
    )


def _state(text: PreTrainedConfig) -> int:
    """Numbers in the keys and values of one token, if every layer has them."""
    queries = getattr(text, "num_attention_heads", 0)  # not a model that only has recurrent layers
    heads = getattr(text, "num_key_value_heads", None) or queries
    given = [getattr(text, name, None) or 0 for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    width = max(given) or text.hidden_size // max(queries, 1)
    return int(2 * heads * width * text.num_hidden_layers)


def _scan(text: PreTrainedConfig, state: tuple[int, ...]) -> int:
    """Numbers of one token that the scan of a recurrent layer makes at once, and the gradients of them, at most.

    The code of transformers works in chunks: for each head and token it makes some rows as long as a chunk, some as
    wide as the state is either way, and for each chunk some states. How many was measured, over sizes and families
    (tests/test_gpu_memory.py).

    Args:
        state: (1, heads, width, width) that it hands on, scanned in chunks; (1, channels, width): token by token.
    """
    chunk = next((size for name in _CHUNKS if (size := getattr(text, name, None))), _CHUNK)
    heads, *widths = state[1:]
    rows, columns = widths if len(widths) > 1 else (*widths, 1)
    length = chunk if len(widths) > 1 else 1
    return int(heads * (5 * length + 10 * (rows + columns) + 5 * rows * columns / length))


def by_reason(frozen: Mapping[str, tuple[int, str]]) -> Iterable[tuple[str, list[str]]]:
    """(why, names), the most names first."""
    groups: dict[str, list[str]] = {}
    for name, (_, why) in frozen.items():
        groups.setdefault(why, []).append(name)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def main(folder: Path, layout: Any, **options: bool) -> dict[str, Any]:
    """What is printed. The options are those of `examine`."""
    placed = Layout.from_json(layout)
    coverage = examine(folder, placed, **options)
    on_gpu = placed.device != "cpu" and torch.cuda.is_available()
    return {
        "device": placed.device,
        "weights_nbytes": placed.nbytes,
        "gpu_nbytes": torch.cuda.mem_get_info()[1] if on_gpu else 0,
        "sizes": asdict(coverage.sizes),
        "model": coverage.model,
        "trained": len(coverage.trained),
        "trained_elements": sum(coverage.trained.values()),
        "elements": sum(coverage.trained.values()) + sum(size for size, _ in coverage.frozen.values()),
        "frozen": [[why, names] for why, names in by_reason(coverage.frozen)],
    }


if __name__ == "__main__":
    try:
        layout = json.loads(Path(sys.argv[2]).read_text())["layout"]
        options = {name: f"--{name}" in sys.argv[3:] for name in ("embeddings", "experts", "protected")}
        print(json.dumps(main(Path(sys.argv[1]), layout, **options)))
    except HogwildError as error:
        sys.exit(str(error))
