"""How much of a GPU training takes beside the weights, reckoned from shapes and settings before anything runs.

An upper bound: for an example of `training.max_tokens` tokens in every thread at
once, as many of them trained as may be (`TrainingConfig.most_trained`).
docs/gpu-results.md compares it with an H200, but for what the CUDA context and libraries take, which is assumed.
Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from hogwild.settings import Config

Shape = tuple[int, ...]

_CONTEXT = 768 << 20
"""Bytes of the CUDA context, the libraries' workspaces and the compiled kernels of one process: assumed."""
_PARTS = 528 * 256 * 64
"""Elements of the parts of a product that cuda.py makes at once, where the product itself is no larger."""
_TUNING = 384 << 20
"""Bytes of the first updates, which look for the fastest kernels: what empties the cache between two runs, and some
rows of a weight (cuda.py)."""
_LOSS = 3 * 4 << 24
"""Bytes of the fp32 copies of a piece of the logits (loss.py)."""
_MASK = 20 << 20
"""Bytes of what a piece of a mask is made of (context.py)."""
CONTEXTS = 4
"""Times `training.batch_tokens`: tokens of context that are read at once, and whose keys and values are kept, unless a
single example has more."""
MERGED_CONTEXT = 64
"""Tokens of the longest context that goes through together with the trained tokens, as constants, where that gives the
same gradients: one pass over few tokens costs less than two."""
_SCORE = 16
"""Bytes of one of them: as the model makes it, bounded and normalised in fp32, and gradients of both."""
_DRIFT = 160 << 20
"""Bytes of a thread that takes back drift: ten blocks of drift.py."""
VLLM_SHARE = 0.92
"""Of the GPU, what vLLM takes unless it is told (vllm/config/cache.py, vLLM 0.32)."""


@dataclass(frozen=True)
class Model:
    """What of a model counts.

    Attributes:
        trained: name of a trained tensor -> its shape.
        copied: bytes of what the server has no plain copy of, and each trainer's model therefore has its own.
        vocabulary, hidden, layers: sizes of its language model.
        itemsize: bytes of a weight.
        state: numbers that its attention keeps of one token, in all layers.
        repeats: how often attention writes each of them out, for query heads that share it.
        softcaps: bounds its logits, which keeps them in more than one form.
        waits: bytes of one token that layers with a weight in common keep until the end of a step.
        uses: of weights that get several inputs for each token, such as those that layers share: how many.
        scans: has recurrent layers.
        scan: numbers in fp32 that the scan of one of them makes of one token, at most; 0: it has none, or none whose
            sizes could be seen.
        scores: heads of an attention that makes all its scores at once (`as_served.py`); 0: none does.
    """

    trained: Mapping[str, Shape]
    copied: int
    vocabulary: int
    hidden: int
    layers: int
    itemsize: int = 2
    state: int = 0
    repeats: int = 1
    softcaps: bool = False
    waits: int = 0
    scans: bool = False
    scan: int = 0
    scores: int = 0
    uses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """Bytes beside the weights, at most.

    Attributes:
        moments: of the optimizer.
        directions: that updates leave alone.
        activations: of all threads' passes, and what earlier passes of a step keep for its update.
        contexts: keys and values of what is read and not trained, and masks that say which text sees which.
        logits: of all threads' passes and what their loss makes of them, beyond a layer that is computed twice: they
            are gone by then.
        update: of all threads, for one layer at a time.
        copies: frozen tensors that each trainer's model has for itself.
        context: of CUDA.
    """

    moments: int
    directions: int
    activations: int
    contexts: int
    logits: int
    update: int
    copies: int
    context: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [f"{gib(size)} {name}" for name, size in asdict(self).items() if size]
        return f"{gib(self.total)} GiB ({', '.join(parts)})"


def predict(model: Model, config: Config) -> Needs:
    """What training of this model takes with these settings."""
    training, replay, rank = config.training, config.replay, config.optimizer.rank
    threads, tokens = training.threads, _tokens(config)
    linears = [shape for shape in model.trained.values() if len(shape) == 2]
    small = sum(math.prod(shape) for shape in model.trained.values() if len(shape) != 2)
    protects = bool(replay.protected_rank and replay.self_texts and replay.ratio)
    row = model.itemsize * sum(m + n for m, n in linears)  # of one token, in all layers
    inner = model.itemsize * sum(m + n for m, n in linears if model.vocabulary not in (m, n))
    budget = training.activation_mib << 20
    inputs = tokens * model.hidden * model.layers * model.itemsize  # of layers that are computed twice
    context = max(CONTEXTS * training.batch_tokens, training.max_tokens)
    scores = _SCORE * model.scores * context**2  # contexts that are read in one row, or one long example
    # Of a layer, the keys and values of a context, joined to those of a pass and written out for all query heads.
    keys = context * model.state * (1 + model.repeats) * model.itemsize
    again = (2 * tokens * inner + keys) // max(model.layers, 1) + scores + scan(model, config)  # one of them
    read = min(CONTEXTS * training.batch_tokens, context)  # in one row
    seen = max(tokens * (context + tokens), read * context)  # elements of a mask
    # As it is made, as the kernel wants it, and what a piece is made of.
    masks = 2 * seen * model.itemsize + min(_MASK, 20 * seen)
    elements = tokens * model.vocabulary
    logits = elements * model.itemsize * (5 if model.softcaps else 2) + min(_LOSS, 12 * elements)
    rows = tokens + budget // max(row, 1)  # of one update
    return Needs(
        moments=sum(8 * min(rank, m, n) * max(m, n) for m, n in linears) + 8 * small,
        directions=sum(min(replay.protected_rank, n // 2) * n for _, n in linears)
        * model.itemsize
        * protects,
        activations=threads * (max(budget, inputs) + tokens * model.waits + again),
        # as the states of each context, and side by side
        contexts=threads * (2 * context * model.state * model.itemsize + masks),
        logits=threads * max(logits - again, 0),
        update=threads
        * (
            max(
                (
                    _update(*shape, rows * model.uses.get(name, 1), rank, model.itemsize)
                    for name, shape in model.trained.items()
                    if len(shape) == 2
                ),
                default=0,
            )
            + _TUNING
            + _DRIFT * bool(protects and replay.protected_every)
        ),
        copies=(threads + 1) * model.copied,
        context=_CONTEXT,
    )


def scan(model: Model, config: Config) -> int:
    """Bytes of the scan of a recurrent layer, in one thread."""
    return 4 * model.scan * _tokens(config)


def _tokens(config: Config) -> int:
    """Of the longest pass with gradient."""
    training = config.training
    longest = min(training.most_trained + MERGED_CONTEXT, training.max_tokens)
    return max(training.batch_tokens, longest)


def _update(m: int, n: int, tokens: int, rank: int, itemsize: int) -> int:
    """Bytes that one update of an (m, n) weight makes for a moment (hogwild_kernels/cuda.py, products.without)."""
    both = tokens * (min(rank, m, n) + tokens)  # [Y P^T | Y Y^T]
    parts = max(_PARTS, 2 * both)  # of it, and its sum
    small = min(rank, m, n) * max(m, n) + 2 * max(m, n)  # R, scales, sums
    factors = tokens * (3 * n + m)  # of several passes side by side, and X without its protected part
    return 4 * (parts + both + small) + itemsize * factors


def left(total: int, arguments: Sequence[str]) -> int:
    """Bytes of a GPU that vLLM leaves to others, the weights being in its part, with these arguments."""
    share = VLLM_SHARE
    for position, argument in enumerate(arguments):
        name, _, given = argument.partition("=")
        if name.replace("_", "-") == "--gpu-memory-utilization":  # vLLM takes either
            given = given or next(iter(arguments[position + 1 :]), "")
            try:
                share = float(given)
            except ValueError:
                pass  # vLLM will say so
    return int(total * (1 - share))


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f}"
