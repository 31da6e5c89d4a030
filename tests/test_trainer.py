"""The training step on tiny models: what is updated, by how much, and what is never made."""

import gc
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hogwild import skeleton
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.backward import TrainedLinear
from hogwild.errors import CheckpointError, LossError
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from hogwild_kernels import ApolloConfig, ApolloState, apollo_update
from tiny import llama, open_descriptors, qwen2

EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


@dataclass
class Example:
    ids: list[int]
    trained: list[bool]


EXAMPLE = Example([1, 7, 30, 12, 5, 44, 9, 2], [False] * 4 + [True, False, True, True])
OTHER = Example([1, 8, 31, 13, 6, 45, 2], [False] * 2 + [True] * 5)


class Setting:
    """An arena, its trainers, and what they share."""

    def __init__(
        self, folder: Path, threads: int = 1, context: str = "frozen", arena: Arena | None = None,
        between_layers: Callable[[], None] = lambda: None, embeddings: bool = False, **optimizer: Any,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.weights = Weights(arena or load_arena(folder))
        config = OptimizerConfig(**{"lr": 1e-3, "rank": 4, **optimizer})
        self.optimizer = Optimizer(config, seed=3, device=self.weights.arena.weights.device)
        self.progress = Progress(self.weights.arena.control, updates_per_epoch=4)
        self.trainers = [
            Trainer(
                skeleton.build(folder, self.weights), self.optimizer, self.progress, set(self.weights.names),
                context, seed=index, between_layers=between_layers, embeddings=embeddings,
            )
            for index in range(threads)
        ]  # fmt: skip

    @property
    def trainer(self) -> Trainer:
        return self.trainers[0]

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: self.weights.view(name).clone() for name in self.weights.names}


def autograd(
    folder: Path, example: Example
) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """Plain transformers and plain autograd, without any trick: (model with gradients, (X, D) of each linear, loss)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def forward(_module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            inputs[name] = arguments[0].detach()
            output.register_hook(lambda gradient: outputs.__setitem__(name, gradient))

        return forward

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook(name))
    ids = torch.tensor([example.ids])
    logits = model(ids[:, :-1]).logits[0]
    mask = torch.tensor(example.trained[1:])
    loss = nn.functional.cross_entropy(logits[mask].float(), ids[0, 1:][mask])
    loss.backward()
    factors = {
        f"{name}.weight": (inputs[name].flatten(0, 1), outputs[name].flatten(0, 1)) for name in outputs
    }
    return model, factors, float(loss.detach())


# --- the update ----------------------------------------------------------------------------------------------------


def test_each_linear_gets_the_kernels_update_of_its_true_gradient(tmp_path):
    """X and D from plain autograd, whose product is autograd's gradient; then the kernel on a copy of the weight."""
    folder = llama(tmp_path / "model")
    setting = Setting(folder, context="full")
    before = setting.snapshot()
    result = setting.trainer.step([Item(EXAMPLE)])
    model, factors, loss = autograd(folder, EXAMPLE)
    assert result.losses[0] == pytest.approx(loss, rel=1e-6)
    config = ApolloConfig(rank=4, lr=1e-3, seed=3)
    names = [name for name in factors if name not in EMBEDDINGS]
    assert len(names) == 14
    squares = 0.0
    for name in names:
        x, d = factors[name]
        assert torch.allclose(d.t() @ x, model.get_parameter(name).grad, rtol=1e-4, atol=1e-7), name
        expected = before[name].clone()
        squares += (
            float(apollo_update(expected, x, d, ApolloState(name, tuple(expected.shape), config)).norm) ** 2
        )
        moved, wanted = setting.weights.view(name) - before[name], expected - before[name]
        assert wanted.abs().max() > 1e-5
        assert torch.allclose(moved, wanted, rtol=1e-3, atol=1e-7), name
    assert result.update_norm >= squares**0.5


def test_small_weights_get_adams_update_of_their_true_gradient(tmp_path):
    """The first step of Adam moves each element by lr g / (|g| + eps)."""
    folder = qwen2(tmp_path / "model")
    setting = Setting(folder, context="full")
    before = setting.snapshot()
    setting.trainer.step([Item(EXAMPLE)])
    model, _, _ = autograd(folder, EXAMPLE)
    small = [name for name in setting.weights.names if before[name].ndim == 1]
    assert len(small) == 5 + 6
    for name in small:
        gradient = model.get_parameter(name).grad
        clear = gradient.abs() > 1e-5  # a gradient of a key's bias is zero but for rounding
        moved = setting.weights.view(name) - before[name]
        expected = -1e-3 * gradient / (gradient.abs() + 1e-6)
        assert torch.allclose(moved[clear], expected[clear], rtol=0.01), name
    assert any("q_proj.bias" in name for name in small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [llama, qwen2])
@pytest.mark.parametrize("tied", [True, False])
def test_everything_trainable_moves_and_embeddings_do_not(tmp_path, dtype, family, tied):
    folder = family(tmp_path / "model", dtype, tie_word_embeddings=tied)
    setting = Setting(folder)
    before = setting.snapshot()
    result = setting.trainer.step([Item(EXAMPLE)])
    moved = {name for name in before if not torch.equal(before[name], setting.weights.view(name))}
    still = {"model.embed_tokens.weight"}
    assert moved == set(before) - still
    frozen = still | ({"lm_head.weight"} if tied else set())
    assert set(setting.trainer.frozen) == frozen
    assert result.updates == len(moved)
    assert result.skipped == 0
    assert result.tokens[0] == 3


def test_no_gradient_outlives_the_step_and_no_linear_weight_ever_has_one(tmp_path):
    setting = Setting(qwen2(tmp_path / "model"))
    linears = [m for m in setting.trainer.model.modules() if isinstance(m, TrainedLinear)]
    assert len(linears) == 14
    for _ in range(2):
        setting.trainer.step([Item(EXAMPLE)])
        assert all(parameter.grad is None for parameter in setting.trainer.model.parameters())
        assert not any(m.weight.requires_grad for m in linears)


class Shapes(TorchDispatchMode):
    """Notes every operator that makes a tensor as large as a given weight, outside of the arena."""

    def __init__(self, arena: Arena, sizes: set[int]) -> None:
        super().__init__()
        self._inside = range(arena.weights.base, arena.weights.base + arena.weights.nbytes)
        self._sizes = sizes
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            large = isinstance(tensor, torch.Tensor) and tensor.numel() in self._sizes
            if large and tensor.data_ptr() not in self._inside:
                self.found.append(f"{func} {tuple(tensor.shape)}")
        return result


def test_no_matrix_of_a_weights_size_is_made(tmp_path):
    """Weights larger than a tile of the kernel, in the factored form: the product D^T X exists only in tiles."""
    folder = llama(tmp_path / "model", hidden_size=512, intermediate_size=1100, num_hidden_layers=1)
    setting = Setting(folder)
    setting.optimizer.apollo_config = replace(setting.optimizer.apollo_config, form="factored")
    with Shapes(setting.weights.arena, {512 * 1100}) as seen:
        setting.trainer.step([Item(EXAMPLE)])
    assert not seen.found
    with Shapes(setting.weights.arena, {512 * 1100}) as seen:  # the control experiment: autograd makes them
        autograd(folder, EXAMPLE)
    assert seen.found


def test_only_what_lies_in_the_arena_is_trained(tmp_path):
    """Weights and biases that the server keeps no plain copy of stay as they are, and are named."""
    folder = qwen2(tmp_path / "model")
    arena = load_arena(folder)
    gone = {
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
    }
    layout = replace(
        arena.layout,
        tensors={name: region for name, region in arena.layout.tensors.items() if name not in gone},
        frozen=dict.fromkeys(gone, "vLLM splits it"),
    )
    setting = Setting(folder, arena=Arena(arena.weights, arena.control, layout))
    private = {name: setting.trainer.model.get_parameter(name).clone() for name in gone}
    before = setting.snapshot()
    setting.trainer.step([Item(EXAMPLE)])
    for name, value in private.items():
        assert torch.equal(setting.trainer.model.get_parameter(name), value), name
    beside = "model.layers.1.self_attn.k_proj.bias"  # in the arena, but its weight is not
    still = {name for name in before if torch.equal(before[name], setting.weights.view(name))}
    assert still == {"model.embed_tokens.weight", beside}
    assert set(setting.trainer.frozen) == gone | EMBEDDINGS | {beside}


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example", [EXAMPLE, OTHER, Example([5, 6], [False, True])], ids=["mixed", "tail", "two"]
)
def test_frozen_context_gives_the_loss_of_the_whole_text(tmp_path, example):
    folder = qwen2(tmp_path / "model")
    _, _, expected = autograd(folder, example)
    for context in ("frozen", "full"):
        setting = Setting(folder, context=context)
        assert setting.trainer.loss(example) == pytest.approx(expected, rel=1e-5)
        result = setting.trainer.step([Item(example)])
        assert result.losses[0] == pytest.approx(expected, rel=1e-5)
        assert result.tokens[0] == sum(example.trained)


def test_frozen_context_gets_no_gradient(tmp_path):
    """Rows of X and D are the trained tokens, or all."""
    for context, expected in (("frozen", sum(EXAMPLE.trained)), ("full", len(EXAMPLE.ids) - 1)):
        setting = Setting(llama(tmp_path / context), context=context)
        rows: set[int] = set()
        update = setting.optimizer.update_linear

        def noted(name, weight, x, d, seed, rows=rows, update=update, **options):
            rows.update((len(x), len(d)))
            return update(name, weight, x, d, seed, **options)

        setting.optimizer.update_linear = noted
        setting.trainer.step([Item(EXAMPLE)])
        assert rows == {expected}


def test_asking_for_the_loss_changes_nothing(tmp_path):
    setting = Setting(llama(tmp_path / "model", torch.bfloat16))
    before = setting.snapshot()
    assert setting.trainer.loss(EXAMPLE) == setting.trainer.loss(EXAMPLE)
    assert all(torch.equal(before[name], setting.weights.view(name)) for name in before)
    assert setting.progress.steps == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_steps_teach_the_example(tmp_path, dtype):
    setting = Setting(llama(tmp_path / "model", dtype), lr=5e-3)
    first = setting.trainer.loss(EXAMPLE)
    for _ in range(15):
        setting.trainer.step([Item(EXAMPLE)])
    assert setting.trainer.loss(EXAMPLE) < 0.5 * first


def test_a_negative_weight_unlearns(tmp_path):
    setting = Setting(llama(tmp_path / "model"), lr=1e-3)
    first = setting.trainer.loss(EXAMPLE)
    losses = [setting.trainer.step([Item(EXAMPLE, weight=-1.0)]).losses[0] for _ in range(5)]
    assert losses[0] == pytest.approx(first, rel=1e-5), "what is reported is the loss, not the weighted loss"
    assert setting.trainer.loss(EXAMPLE) > first


def test_an_infinite_loss_ends_the_step_before_anything_is_written(tmp_path):
    folder = llama(tmp_path / "model")
    setting = Setting(folder)
    norm = setting.weights.view("model.norm.weight")
    kept, norm[3] = float(norm[3]), float("nan")
    before = setting.snapshot()
    with pytest.raises(LossError, match="nan nats"):
        setting.trainer.step([Item(EXAMPLE)])
    assert setting.progress.steps == 0
    assert all(
        torch.equal(before[n].view(torch.int32), setting.weights.view(n).view(torch.int32)) for n in before
    )
    norm[3] = kept  # and nothing of it is left behind
    result = setting.trainer.step([Item(EXAMPLE)])
    assert (result.skipped, result.step) == (0, 1)


def test_a_loss_far_above_ignorance_ends_the_step_after_passes_that_were_kept(tmp_path):
    """Two passes through the model make up one step; the second is refused, and the first leaves nothing behind."""
    setting = Setting(llama(tmp_path / "model"))
    setting.trainer._batch_tokens = 1
    mild, wild = sorted((Item(EXAMPLE), Item(OTHER)), key=lambda one: setting.trainer.loss(one.encoded))
    losses = [setting.trainer.loss(one.encoded) for one in (mild, wild)]
    before = setting.snapshot()
    setting.trainer._max_loss = min(losses) + 1e-3
    with pytest.raises(LossError):
        setting.trainer.step([mild, wild])
    assert all(torch.equal(before[n], setting.weights.view(n)) for n in before)
    setting.trainer._max_loss = max(losses) + 1
    together = setting.trainer.step([mild, wild])
    again = Setting(llama(tmp_path / "again"))
    again.trainer._batch_tokens = 1
    assert again.trainer.step([mild, wild]).update_norm == pytest.approx(together.update_norm)


@pytest.mark.parametrize("bad", [EXAMPLE, OTHER], ids=["example", "other"])
def test_a_refusal_reaches_what_its_pass_has_not(tmp_path, bad):
    """Losses are read late, as on a GPU. The refused pass does not get to a part of the model, as to an expert that no
    token of it chooses; the other pass does, before or after it."""
    setting = Setting(llama(tmp_path / "model"), context="full")
    trainer = setting.trainer
    trainer.stream.waits, trainer._batch_tokens = True, 1
    trainer.step([Item(EXAMPLE), Item(OTHER)])
    mlp = trainer.model.model.layers[0].mlp
    reached, forward = [], mlp.forward

    def some(x: torch.Tensor) -> torch.Tensor:
        reached.append(x.shape[1] != len(bad.ids) - 1)
        return forward(x) if reached[-1] else torch.zeros_like(x)

    mlp.forward = some
    before, trainer._max_loss = setting.snapshot(), 0.0
    with pytest.raises(LossError):
        trainer.step([Item(one, 1.0 if one is bad else -1.0) for one in (EXAMPLE, OTHER)])
    assert sorted(reached) == [False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.snapshot().items())


def overflow(trainer: Trainer) -> None:
    """From now on losses are finite, and their gradients are not."""

    def infinite(_module: nn.Module, _arguments: object, logits: torch.Tensor) -> None:
        logits.register_hook(lambda gradient: gradient * math.inf)

    trainer.model.lm_head.register_forward_hook(infinite)


def test_an_infinite_gradient_leaves_every_weight_alone(tmp_path):
    """The kernels' own guard, behind that of the loss."""
    folder = llama(tmp_path / "model")
    setting = Setting(folder)
    overflow(setting.trainer)
    before = setting.snapshot()
    result = setting.trainer.step([Item(EXAMPLE)])
    assert result.skipped == result.updates > 0
    assert all(
        torch.equal(before[n].view(torch.int32), setting.weights.view(n).view(torch.int32)) for n in before
    )


# --- threads -------------------------------------------------------------------------------------------------------


def run(*work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(one: Callable[[], object]) -> None:
        try:
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "deadlock"
    assert not failures, failures


def test_threads_train_the_same_weights_at_once(tmp_path):
    setting = Setting(qwen2(tmp_path / "model", torch.bfloat16), threads=2, lr=3e-3)
    before = [setting.trainer.loss(example) for example in (EXAMPLE, OTHER)]
    results: list[Any] = []

    def work(trainer: Trainer, example: Example) -> None:
        results.extend(trainer.step([Item(example)]) for _ in range(15))

    run(lambda: work(setting.trainers[0], EXAMPLE), lambda: work(setting.trainers[1], OTHER))
    assert sorted(result.step for result in results) == list(range(1, 31)), "no step is lost or counted twice"
    assert setting.weights.arena.control.steps == 30
    assert setting.weights.arena.control.epoch == 8
    for loss, example in zip(before, (EXAMPLE, OTHER), strict=True):
        assert setting.trainer.loss(example) < 0.7 * loss
    assert all(bool(setting.weights.view(name).isfinite().all()) for name in setting.weights.names)


def test_staleness_is_the_steps_that_others_finished_meanwhile(tmp_path):
    """One trainer is held in the middle of its backward pass while the other does three steps."""
    held, go_on = threading.Event(), threading.Event()
    slow = threading.local()

    def between_layers() -> None:
        if getattr(slow, "is_me", False) and not held.is_set():
            held.set()
            assert go_on.wait(60)

    setting = Setting(llama(tmp_path / "model"), threads=2, between_layers=between_layers)
    results = {}

    def held_one() -> None:
        slow.is_me = True
        results["held"] = setting.trainers[0].step([Item(EXAMPLE)])

    def others() -> None:
        assert held.wait(60)
        results["others"] = [setting.trainers[1].step([Item(OTHER)]) for _ in range(3)]
        go_on.set()

    run(held_one, others)
    assert [result.staleness for result in results["others"]] == [0, 0, 0]
    assert results["held"].staleness == 3
    assert results["held"].step == 4


def test_one_thread_and_one_seed_repeat_bit_for_bit(tmp_path):
    folder = llama(tmp_path / "model", torch.bfloat16)
    runs = []
    for _ in range(2):
        setting = Setting(folder)
        losses = [setting.trainer.step([Item(example)]).losses[0] for example in (EXAMPLE, OTHER) * 4]
        runs.append((losses, setting.snapshot()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_the_threads_of_one_daemon_round_differently(tmp_path):
    folder = llama(tmp_path / "model", torch.bfloat16)
    snapshots = []
    for index in range(2):
        setting = Setting(folder, threads=2, lr=1e-5)
        setting.trainers[index].step([Item(EXAMPLE)])
        snapshots.append(setting.snapshot())
    assert any(not torch.equal(snapshots[0][name], snapshots[1][name]) for name in snapshots[0])


# --- optimizer state -----------------------------------------------------------------------------------------------


def resumed(setting: Setting, state: dict[str, torch.Tensor], **settings: Any) -> Setting:
    """A daemon that goes on from saved weights and saved optimizer state."""
    again = Setting(setting.folder, **settings)
    for name in again.weights.names:
        again.weights.view(name).copy_(setting.weights.view(name))
    again.progress.resume(setting.progress.steps, setting.progress.epoch)
    shapes = {name: tuple(again.weights.view(name).shape) for name in again.weights.names}
    again.optimizer.load(state, shapes)
    return again


def test_training_goes_on_bit_for_bit_from_saved_state(tmp_path):
    setting = Setting(qwen2(tmp_path / "model", torch.bfloat16))
    for example in (EXAMPLE, OTHER, EXAMPLE):
        setting.trainer.step([Item(example)])
    state = {name: tensor.clone() for name, tensor in setting.optimizer.tensors().items()}
    again = resumed(setting, state)
    assert again.optimizer.tensors().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.optimizer.tensors().items())
    for one in (setting, again):
        results = [one.trainer.step([Item(example)]) for example in (OTHER, EXAMPLE)]
        assert [result.step for result in results] == [4, 5]
    for name in setting.weights.names:
        assert torch.equal(setting.weights.view(name), again.weights.view(name)), name


def test_state_of_another_rank_is_refused_with_every_weight_and_nothing_is_taken(tmp_path):
    setting = Setting(llama(tmp_path / "model"))
    setting.trainer.step([Item(EXAMPLE)])
    state = setting.optimizer.tensors()
    with pytest.raises(CheckpointError, match=r"optimizer\.rank") as caught:
        resumed(setting, state, rank=8)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert name in str(caught.value)
    again = Setting(setting.folder, rank=8)
    with pytest.raises(CheckpointError):
        again.optimizer.load(state, {n: tuple(again.weights.view(n).shape) for n in again.weights.names})
    assert not again.optimizer.tensors()


def test_state_of_weights_that_are_no_longer_trained_is_left_out(tmp_path):
    setting = Setting(llama(tmp_path / "model"))
    setting.trainer.step([Item(EXAMPLE)])
    optimizer = Optimizer(OptimizerConfig(rank=4), seed=3)
    optimizer.load(setting.optimizer.tensors(), {"model.norm.weight": (32,)})
    assert {name.rpartition("/")[0] for name in optimizer.tensors()} == {"model.norm.weight"}


def test_settings_of_the_optimizer_reach_norms_and_biases():
    """betas and eps are of Adam too."""
    optimizer = Optimizer(OptimizerConfig(betas=(0.5, 0.6), eps=1e-3, lr=0.25, rounding="nearest"), seed=9)
    weight, gradient = torch.zeros(4), torch.full((4,), 1e-3)
    optimizer.update_small("norm", weight, gradient, 0)
    assert torch.allclose(weight, torch.full((4,), -0.25 * 0.5), rtol=1e-4), "lr g / (|g| + eps), and g = eps"


def test_the_epoch_follows_the_steps_and_both_survive_in_the_control_page(tmp_path):
    setting = Setting(llama(tmp_path / "model"))
    control = setting.weights.arena.control
    assert (control.steps, control.epoch) == (0, 0)
    epochs = [(setting.trainer.step([Item(EXAMPLE)]), control.epoch)[1] for _ in range(9)]
    assert epochs == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert Progress(control, 4).steps == 9, "another daemon goes on counting"


# --- several examples in one step ------------------------------------------------------------------------------------


def test_a_step_of_several_items_updates_each_weight_once_with_the_gradient_of_their_mean(tmp_path):
    folder = qwen2(tmp_path / "model")
    setting = Setting(folder, context="full")
    before = setting.snapshot()
    result = setting.trainer.step([Item(EXAMPLE, weight=2.0), Item(OTHER)])
    assert result.step == setting.progress.steps == 1
    assert result.updates == len(before) - 1
    one, other = (autograd(folder, example) for example in (EXAMPLE, OTHER))
    assert result.losses == pytest.approx([one[2], other[2]], rel=1e-5)
    assert result.tokens == [3, 5]
    config = ApolloConfig(rank=4, lr=1e-3, seed=3)
    for name in one[1]:
        if name in EMBEDDINGS:
            continue
        x = torch.cat([one[1][name][0], other[1][name][0]])
        d = torch.cat(
            [one[1][name][1], other[1][name][1] / 2]
        )  # weights 2 and 1, and the mean over two items
        expected = before[name].clone()
        apollo_update(expected, x, d, ApolloState(name, tuple(expected.shape), config))
        moved, wanted = setting.weights.view(name) - before[name], expected - before[name]
        assert wanted.abs().max() > 1e-5
        assert torch.allclose(moved, wanted, rtol=1e-3, atol=1e-7), name
    for name in before:
        if before[name].ndim == 1:
            gradient = one[0].get_parameter(name).grad + other[0].get_parameter(name).grad / 2
            clear = gradient.abs() > 1e-5
            expected = -1e-3 * gradient / (gradient.abs() + 1e-6)
            moved = setting.weights.view(name) - before[name]
            assert torch.allclose(moved[clear], expected[clear], rtol=0.01), name


def test_an_item_may_ask_for_its_own_kind_of_context(tmp_path):
    folder = llama(tmp_path / "model")
    frozen, full, asked = (Setting(folder, context=context) for context in ("frozen", "full", "frozen"))
    frozen.trainer.step([Item(EXAMPLE)])
    full.trainer.step([Item(EXAMPLE)])
    asked.trainer.step([Item(EXAMPLE, context="full")])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(asked.weights.view(name), full.weights.view(name))
    assert not torch.equal(asked.weights.view(name), frozen.weights.view(name))


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_trainer_that_nobody_has_any_more_leaves_nothing_behind(tmp_path, embeddings):
    """Neither its model nor, with the last view of it, the arena: a daemon that takes another makes trainers anew."""
    setting = Setting(qwen2(tmp_path / "model"), embeddings=embeddings)
    setting.trainer.step([Item(EXAMPLE), Item(OTHER)])
    model, mapping = (weakref.ref(one) for one in (setting.trainer.model, setting.weights.arena.weights))
    names, before = set(setting.trainer._gather.small), open_descriptors()
    assert names, "biases and norms, whose hooks would hold all of it"
    del setting
    gc.collect()
    assert (model(), mapping()) == (None, None)
    assert open_descriptors() == before - 4, "of weights and control page, and of their mappings"
