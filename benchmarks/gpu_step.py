"""Section 4: a training step of the trainer's own, on models of random weights, and what it takes in memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gpu_models
from gpu_bench import Bench
from gpu_models import Sizes
from gpu_timing import Stopwatch
from hogwild import gpu_memory, skeleton
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.batch import Work
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights
from hogwild_kernels import UpdateResult

MODELS = ("Llama 8B", "Qwen3 32B")
CONTEXT, TRAINED, RANK = 448, 64, 64
_PROTECTED, _TINY_RANK = 256, 4
_AIM = 0.10
_ACTIVATIONS_MIB, _LEAN_MIB = 2048, 128
"""`training.activation_mib`: as it comes, and for those who have little room."""
_LR, _WIDTH = 2e-4, 512
_ROOM = 2 << 30  # beside what is predicted
_WARM_UP, _STEPS = 3, 5
_EXAMPLES = 8
"""Of a step with several, as `training.step_tokens` makes them: what the host does for a step is done once for all."""


class TimedOptimizer(Optimizer):
    """One that notes when the device is at its updates."""

    watch: Stopwatch

    def update_linear(self, *given: Any, **settings: Any) -> UpdateResult:
        with self.watch.part("update"):
            return super().update_linear(*given, **settings)

    def update_small(self, *given: Any, **settings: Any) -> UpdateResult:
        with self.watch.part("update"):
            return super().update_small(*given, **settings)


class TimedTrainer(Trainer):
    """One that notes when it reads contexts and when it is at its forward pass."""

    watch: Stopwatch

    def _read(self, work: Sequence[Work]) -> None:
        with self.watch.part("context"):
            super()._read(work)

    def _losses(self, group: Sequence[Work]) -> list[torch.Tensor]:
        with self.watch.part("forward"):
            return super()._losses(group)


def trainer_of(
    folder: Path,
    arena: Arena,
    optimizer: Optimizer,
    progress: Progress,
    seed: int = 0,
    kind: type[Trainer] = Trainer,
    between_layers: Callable[[], None] = lambda: None,
    activation_mib: int = _ACTIVATIONS_MIB,
) -> Trainer:
    """A trainer as the daemon makes them; `seed` of its rounding."""
    weights = Weights(arena)
    model = skeleton.build(folder, weights)
    names = set(weights.names)
    return kind(
        model, optimizer, progress, names, "frozen", seed, between_layers, activation_mib=activation_mib
    )


def optimizer_of(arena: Arena, tiny: bool, kind: type[Optimizer] = Optimizer) -> Optimizer:
    """The one that all trainers of an arena share. A wide model of random weights takes smaller steps."""
    width = next(one.shape[1] for name, one in arena.layout.tensors.items() if "embed" in name)
    config = OptimizerConfig(rank=_TINY_RANK if tiny else RANK, lr=_LR * min(1.0, _WIDTH / width))
    return kind(config, 0, arena.weights.device)


def run(bench: Bench) -> None:
    for name in MODELS:
        folder = gpu_models.folder_of(name, bench.tiny, bench.folder)
        sizes = gpu_models.sizes(folder)
        gc.collect()  # the model before
        if bench.cuda:
            torch.cuda.empty_cache()
        free = bench.free()
        needed = int(sizes.nbytes * (1 + _AIM)) + _ROOM
        if free is not None and free < needed:
            bench.out.leave_out(
                f"{name}: it takes {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
            )
            continue
        if bench.left_s() < 10 and not bench.tiny:
            bench.out.leave_out(f"{name}: no time was left")
            continue
        _model(bench, name, folder, sizes)


def _model(bench: Bench, name: str, folder: Path, sizes: Sizes) -> None:
    arena = gpu_models.make_arena(folder, bench.device)
    context, trained = (80, 8) if bench.tiny else (CONTEXT, TRAINED)
    protected = 8 if bench.tiny else _PROTECTED
    sample = Weights(arena).view("model.layers.0.mlp.down_proj.weight").clone()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(bench.device)
    optimizer = optimizer_of(arena, bench.tiny, TimedOptimizer)
    trainer = trainer_of(folder, arena, optimizer, Progress(arena.control, 8), kind=TimedTrainer)
    assert isinstance(optimizer, TimedOptimizer)
    assert isinstance(trainer, TimedTrainer)
    optimizer.watch = trainer.watch = watch
    vocabulary = trainer.model.config.vocab_size
    items = [
        Item(gpu_models.example(vocabulary, context, trained, seed=1 + number)) for number in range(_EXAMPLES)
    ]
    item, floors = items[0], _floors(bench, sizes, context, trained)
    losses, peaks = _steps(bench, name, trainer, [item], watch, floors, sizes)
    bench.out.check(
        f"{name}: the loss of the one example that is trained falls", losses[-1] < losses[0],
        f"{losses[0]:.2f} to {losses[-1]:.2f} nats a token in {len(losses)} steps",
    )  # fmt: skip
    moved = Weights(arena).view("model.layers.0.mlp.down_proj.weight")
    bench.out.check(f"{name}: the weights in the arena have moved", not torch.equal(sample, moved))
    state = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    for mib in (_ACTIVATIONS_MIB, _LEAN_MIB):
        if mib == _LEAN_MIB:
            lean = trainer_of(folder, arena, optimizer, Progress(arena.control, 8), activation_mib=mib)
            peaks = _peaks(bench, lean, item)
            del lean
        needs = gpu_models.predicted(arena, optimizer.config.rank, trained, vocabulary, mib)
        what = f"{name}, activation_mib {mib}"
        _memory(bench, what, sizes, state, [peak - before for peak in peaks], needs, mib == _LEAN_MIB)
    for what, given, directions in (
        (f"{_EXAMPLES} examples a step", items, 0), (f"{protected} directions protected", [item], protected),
    ):  # fmt: skip
        if bench.left_s() < 10 and not bench.tiny:
            bench.out.leave_out(f"{name}, {what}: no time was left")
            continue
        if directions:
            trainer.protect(_directions(trainer, directions))
        floors = _floors(bench, sizes, len(given) * context, len(given) * trained)
        _steps(bench, f"{name}, {what}", trainer, given, watch, floors, sizes)


def _steps(
    bench: Bench,
    name: str,
    trainer: Trainer,
    items: list[Item],
    watch: Stopwatch,
    floors: dict[str, float],
    sizes: Sizes,
) -> tuple[list[float], list[int]]:
    """Some steps that are not timed, and some that are: (loss before each, bytes allocated at the peak of either)."""
    losses, parts, seconds, peaks = list[float](), list[dict[str, float]](), list[float](), list[int]()
    for number in range(_WARM_UP + _STEPS):
        if number == _WARM_UP and bench.cuda:
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        result = trainer.step(items)
        took = watch.take()
        losses.append(result.losses[0])
        if result.skipped:
            bench.out.check(f"{name}: no update was skipped", False, f"{result.skipped} of {result.updates}")
        if number >= _WARM_UP:
            seconds.append(result.seconds)
            parts.append(took)
    step = statistics.median(seconds)
    took = {part: statistics.median(one.get(part, 0.0) for one in parts) for part in floors}
    took["backward"] = step - sum(took.values())  # all that the others are not
    for part, floor in floors.items():
        bench.out.row(
            "Time of a step by its parts",
            model=name, part=part, ms=1000 * took[part],
            **{"floor, ms": 1000 * floor, "share of floor": floor / took[part]},
        )  # fmt: skip
    bench.out.row(
        "Time of a step",
        model=name, updates=result.updates, ms=1000 * step,
        **{
            "floor, ms": 1000 * sum(floors.values()),
            "trained tokens/s": sum(result.tokens) / step,
            "elements updated/s": (sizes.layer * sizes.layers + sizes.head) / step,
        },
    )  # fmt: skip
    if bench.cuda:
        peaks.append(torch.cuda.max_memory_allocated())
    return losses, peaks


def _peaks(bench: Bench, trainer: Trainer, item: Item) -> list[int]:
    """Bytes allocated at the peak of its first step, and of two more; nothing on a CPU."""
    peaks = []
    for steps in (1, 2):
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            trainer.step([item])
        if bench.cuda:
            peaks.append(torch.cuda.max_memory_allocated())
    return peaks


def _floors(bench: Bench, sizes: Sizes, context: int, trained: int) -> dict[str, float]:
    """Seconds that each part takes at least: weights read (and, by the update, written) once, or its multiply-adds."""
    copy, matmul = bench.rates
    layers = sizes.layer * sizes.layers
    whole = layers + sizes.head

    def floor(elements: int, tokens: int, moves: int) -> float:
        return max(moves * elements / copy, tokens * elements / matmul)

    return {
        "context": floor(layers, context, 2),
        "forward": floor(whole, trained, 2),
        "backward": floor(whole, trained, 2),
        "update": floor(whole, trained, 4),
    }


def _memory(
    bench: Bench, name: str, sizes: Sizes, state: int, peaks: list[int], needs: gpu_memory.Needs, lean: bool
) -> None:
    """`peaks`: bytes beside the weights in the first steps, which time kernels too, and afterwards; empty on a CPU.
    `lean`: this is what the aim is about."""
    predicted = needs.total - needs.context
    first, later = peaks or (None, None)
    bench.out.row(
        "Memory beside the weights, at its peak",
        model=name,
        **{
            "weights, GiB": sizes.nbytes / 2**30,
            "moments, GiB": state / 2**30,
            "everything else, GiB": None if later is None else (later - state) / 2**30,
            "share of the weights": None if later is None else later / sizes.nbytes,
            "with the first steps, GiB": None if first is None else first / 2**30,
            "`hogwild doctor` says at most, GiB": predicted / 2**30,
        },
    )
    if first is None or later is None:
        bench.out.leave_out(f"{name}: peak of memory, which only a device's allocator says")
        return
    if lean:
        bench.out.aim(
            f"{name}: moments and all else stay under {_AIM:.0%} of the weights at r={RANK}, {TRAINED} trained tokens",
            later < _AIM * sizes.nbytes,
            f"{later / sizes.nbytes:.1%}",
        )
    most = max(first, later)
    bench.out.aim(
        f"{name}: and under what `hogwild doctor` says", most <= predicted, f"{most / predicted:.0%} of it"
    )


def _directions(trainer: Trainer, rank: int) -> dict[str, torch.Tensor]:
    """Random orthonormal directions, the same for all layers with inputs of one size."""
    found: dict[int, torch.Tensor] = {}
    names: dict[str, torch.Tensor] = {}
    for linear in trainer._gather.linears:
        n = linear.in_features
        if n not in found:
            columns = torch.randn(n, min(rank, n // 2), device=linear.weight.device)
            found[n] = torch.linalg.qr(columns)[0].t().contiguous().to(linear.weight.dtype)
        names[linear.name] = found[n]
    return names
