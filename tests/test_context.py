"""Frozen context, packing and activation checkpointing: the same losses and gradients as plain autograd gives."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from families import ATTENTION, INEXACT, MAMBA, RECURRENT, UNUSUAL, Truth, build
from hogwild import context, skeleton
from hogwild.apollo import Optimizer
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from hogwild_kernels import UpdateResult, products


class Recorder(Optimizer):
    """Notes the gradients and updates nothing."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(rank=4), seed=0)
        self.gradients: dict[str, torch.Tensor] = {}
        self.rows: set[int] = set()

    def forget(self, *endings: str) -> None:
        for name in list(self.gradients):
            if any(part in name for part in endings):
                del self.gradients[name]

    def _note(self, name: str, gradient: torch.Tensor) -> UpdateResult:
        assert name not in self.gradients, f"{name} is updated twice in one step"
        self.gradients[name] = gradient
        return UpdateResult(0.0, skipped=False)

    def update_linear(
        self,
        name: str,
        _weight: Any,
        x: torch.Tensor,
        d: torch.Tensor,
        _seed: int,
        *,
        one_scale: bool = False,
    ) -> UpdateResult:
        assert not one_scale
        self.rows.add(len(x))
        return self._note(name, d.t() @ x)

    def update_small(self, name: str, _weight: Any, gradient: torch.Tensor, _seed: int) -> UpdateResult:
        return self._note(name, gradient.clone())


def prepared(folder: Path, **settings: Any) -> tuple[Trainer, Recorder]:
    """A trainer that records its gradients."""
    weights, optimizer = Weights(load_arena(folder)), Recorder()
    model = skeleton.build(folder, weights)
    trainer = Trainer(
        model,
        optimizer,
        Progress(weights.arena.control, 4),
        set(skeleton.bound(model)),
        "frozen",
        seed=0,
        **settings,
    )
    trainer._activations = 1 << 30  # one update, with activations computed twice too
    return trainer, optimizer


def recorded(folder: Path, items: list[Item], **settings: Any) -> tuple[Trainer, Recorder, list[float]]:
    """One step of it: (trainer, recorder, losses)."""
    trainer, optimizer = prepared(folder, **settings)
    return trainer, optimizer, trainer.step(items).losses


def text(seed: int, *lengths: int) -> Encoded:
    """Spans of context and trained tokens in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (sum(lengths),), generator=generator).tolist()
    trained = [bool(number % 2) for number, length in enumerate(lengths) for _ in range(length)]
    return Encoded(ids, trained)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To the rounding of fp32 sums."""
    for name, gradient in found.items():
        scale = wanted[name].abs().max()
        assert scale > 1e-6, f"{name}: nothing to compare"
        assert (gradient - wanted[name]).abs().max() < 1e-3 * scale, name


# --- frozen context --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTION + RECURRENT)
@pytest.mark.parametrize("lengths", [(5, 4), (90, 6)], ids=["short", "long"])
def test_frozen_context_equals_the_full_forward_and_gradients_the_detached_one(tmp_path, family, lengths):
    """The long context is read beforehand, in pieces; the short one goes through with the trained tokens if it can."""
    folder, example = build(family, tmp_path / "model", max_position_embeddings=128), text(2, *lengths)
    truth = Truth(folder, example, "everywhere")
    _, optimizer, losses = recorded(folder, [Item(example)], batch_tokens=37)
    assert losses == pytest.approx([truth.loss], rel=1e-5)
    assert optimizer.rows == {lengths[1]}
    assert len(optimizer.gradients) > 10
    if family in MAMBA:
        optimizer.forget(".A_log", ".D", ".dt_bias", "conv1d")
    assert_close(optimizer.gradients, truth.gradients)


@pytest.mark.parametrize("family", ATTENTION + RECURRENT)
def test_later_turns_are_constants_too(tmp_path, family):
    folder, example = build(family, tmp_path / "model"), text(3, 6, 5, 7, 3, 2, 4)
    truth = Truth(folder, example, "linear" if family in RECURRENT else "everywhere")
    _, optimizer, losses = recorded(folder, [Item(example)])
    assert losses == pytest.approx([truth.loss], rel=1e-5)
    assert optimizer.rows == {12}
    if family in RECURRENT:  # of the recurrence's own vectors this is not claimed
        optimizer.forget(".A_log", ".D", ".dt_bias", "conv1d", "_norm.weight")
    assert_close(optimizer.gradients, truth.gradients)


@pytest.mark.parametrize("family", ATTENTION + RECURRENT)
def test_full_context_gives_the_gradients_of_plain_autograd(tmp_path, family):
    folder, example = build(family, tmp_path / "model"), text(3, 20, 5, 7, 3)
    truth = Truth(folder, example, "none")
    _, optimizer, losses = recorded(folder, [Item(example, context="full")])
    assert losses == pytest.approx([truth.loss], rel=1e-5)
    assert optimizer.rows == {34}
    assert_close(optimizer.gradients, truth.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ATTENTION + RECURRENT + INEXACT)
def test_whether_context_can_be_frozen_is_judged_by_what_the_model_computes(tmp_path, family, dtype):
    trainer = prepared(build(family, tmp_path / "model", dtype))[0]
    assert trainer.can_freeze == (family not in INEXACT)
    assert trainer._packs == (family in ATTENTION)


@pytest.mark.parametrize("family", INEXACT)
def test_context_that_would_be_read_inexactly_is_trained_in_full(tmp_path, family):
    folder, example = build(family, tmp_path / "model"), text(3, 20, 5, 7, 3)
    truth = Truth(folder, example, "none")
    _, optimizer, losses = recorded(folder, [Item(example)])
    assert losses == pytest.approx([truth.loss], rel=1e-5)
    assert optimizer.rows == {34}
    assert_close(optimizer.gradients, truth.gradients)


def test_a_cache_by_a_name_that_the_model_swallows_is_not_taken_for_frozen_context(tmp_path, monkeypatch):
    """Layers that look known are not enough: under the wrong name the context would be dropped without a word."""
    monkeypatch.setattr(context, "_CACHE_NAMES", ("past_key_values", "kwargs"))
    assert not prepared(build("mamba2", tmp_path / "model"))[0].can_freeze


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("budget", [0, 1024], ids=["recomputed", "kept"])
def test_a_single_trained_token_takes_the_last_of_its_context_along(tmp_path, family, budget):
    """Three examples go on from one context, the first and the last with a single token, for which models have code
    that writes into the state, and that has no backward pass."""
    folder, shared = build(family, tmp_path / "model"), text(1, 20).ids
    examples = [Encoded([*shared, *text(2 + n, n).ids], [False] * 20 + [True] * n) for n in (1, 6, 1)]
    items = [Item(example) for example in examples]
    _, together, losses = recorded(folder, items, activation_mib=budget)
    truths = [Truth(folder, example, "everywhere") for example in examples]
    assert losses == pytest.approx([truth.loss for truth in truths], rel=1e-5)
    assert together.rows == {1 + 6 + 1}
    together.forget(".A_log", ".D", ".dt_bias", "conv1d", "_norm.weight")
    wanted = {name: sum(t.gradients[name] for t in truths) / 3 for name in together.gradients}
    assert_close(together.gradients, wanted)


# --- several examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTION + RECURRENT)
def test_packing_gives_the_gradients_of_one_by_one(tmp_path, family):
    """Short and long contexts, later turns, full and frozen, texts without context, and a shared beginning."""
    folder = build(family, tmp_path / "model", max_position_embeddings=256)
    shared = text(9, 80, 5)
    other = Encoded([*shared.ids[:75], *text(4, 12).ids], [False] * 80 + [True] * 7)
    kinds = [
        (text(1, 6, 9), "frozen"), (text(2, 90, 4, 3, 2), "frozen"), (text(3, 1, 20), "frozen"),
        (text(4, 30, 5), "full"), (shared, "frozen"), (other, "frozen"),
    ]  # fmt: skip
    items = [Item(e, weight=1 + 0.5 * i, context=c) for i, (e, c) in enumerate(kinds)]
    _, together, losses = recorded(folder, items, batch_tokens=1000)
    _, apart, losses_apart = recorded(folder, items, batch_tokens=1)
    truths = [
        Truth(folder, item.encoded, "everywhere" if item.context == "frozen" else "none") for item in items
    ]
    assert losses == pytest.approx([truth.loss for truth in truths], rel=1e-5)
    assert losses_apart == pytest.approx(losses, rel=1e-5)
    assert together.rows == apart.rows == {9 + 6 + 20 + 34 + 5 + 7}
    assert_close(together.gradients, apart.gradients)
    if family in RECURRENT:
        together.forget(".A_log", ".D", ".dt_bias", "conv1d", "_norm.weight")
    wanted = {
        name: sum(i.weight / len(items) * t.gradients[name] for i, t in zip(items, truths, strict=True))
        for name in together.gradients
    }
    assert_close(together.gradients, wanted)


def test_shared_beginnings_are_read_once(tmp_path):
    """Three texts after one document of 70 tokens; two of them go on alike for 50 more, which one pass reads too."""
    folder = build("qwen3_5_text", tmp_path / "model", max_position_embeddings=256)
    document, question = text(1, 70).ids, text(2, 50).ids
    contexts = [[*document, *question], [*document, *question], [*document, *text(3, 40).ids]]
    examples = [
        Encoded([*c, *text(5 + i, 6).ids], [False] * len(c) + [True] * 6) for i, c in enumerate(contexts)
    ]
    trainer = prepared(folder)[0]
    read: list[int] = []

    def note(_module: Any, arguments: Any) -> None:
        if not torch.is_grad_enabled():
            read.append(arguments[0].numel())

    trainer.model.base_model.register_forward_pre_hook(note)
    losses = trainer.step([Item(example) for example in examples]).losses
    truths = [Truth(folder, example, "none").loss for example in examples]
    assert losses == pytest.approx(truths, rel=1e-5)
    assert sorted(read) == [39, 49, 70], "the last token of a context predicts the first trained one"


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families_pack_too(tmp_path, family):
    """Soft-capped logits, learned positions."""
    folder = build(family, tmp_path / "model")
    examples = [text(1, 6, 9), text(3, 40, 5, 3, 2)]
    truths = [Truth(folder, example, "none").loss for example in examples]
    together, losses = recorded(folder, [Item(example) for example in examples])[1:]
    apart, losses_apart = recorded(folder, [Item(example) for example in examples], batch_tokens=1)[1:]
    assert losses == pytest.approx(truths, rel=1e-5)
    assert losses_apart == pytest.approx(truths, rel=1e-5)
    assert_close(together.gradients, apart.gradients)


# --- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ATTENTION, *RECURRENT, *UNUSUAL])
def test_activations_computed_twice_give_the_same_gradients(tmp_path, family):
    check_computed_twice(build(family, tmp_path / "model", max_position_embeddings=128))


@pytest.mark.parametrize("width", [0, 8], ids=["keys and values alone", "with inputs of each layer"])
def test_layers_that_take_the_keys_and_values_of_another_give_them_a_gradient(tmp_path, width):
    check_computed_twice(
        build("gemma4_text", tmp_path / "model", num_kv_shared_layers=2, hidden_size_per_layer_input=width)
    )


def check_computed_twice(folder):
    items = [Item(text(1, 70, 6, 5, 4)), Item(text(2, 12, 7))]
    if "zamba2" in (folder / "config.json").read_text():  # sums over layers and passes come in another order
        check_same(folder, items[:1])
        check_same(folder, items[1:])
    else:
        check_same(folder, items)


def check_same(folder, items):
    kept, kept_losses = recorded(folder, items)[1:]
    twice, twice_losses = recorded(folder, items, activation_mib=0)[1:]
    assert twice_losses == kept_losses
    assert twice.rows == kept.rows
    for name, gradient in kept.gradients.items():
        assert torch.equal(gradient, twice.gradients[name]), name


def test_layers_are_computed_again_before_their_own_update_and_never_after(tmp_path):
    """With real updates: weights after a step are bit for bit those of a step that kept its activations."""
    folder = build("qwen3", tmp_path / "model", torch.bfloat16)
    after = []
    for budget in (0, 1024):
        weights = Weights(load_arena(folder))
        optimizer = Optimizer(OptimizerConfig(rank=4, lr=0.01), seed=0)
        trainer = Trainer(
            skeleton.build(folder, weights), optimizer, Progress(weights.arena.control, 4), set(weights.names),
            "frozen", seed=0, activation_mib=budget,
        )  # fmt: skip
        for seed in range(3):
            trainer.step([Item(text(seed, 8, 9)), Item(text(seed + 5, 3, 4))])
        after.append({name: weights.view(name).clone() for name in weights.names})
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


MANY = {
    "llama": {"num_hidden_layers": 8},
    "gemma3n_text": {
        "num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 8, "num_kv_shared_layers": 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4, "num_kv_shared_layers": 4,
    },
    "zamba2": {"num_hidden_layers": 8, "layers_block_type": ["mamba", "hybrid"] * 4},
}  # fmt: skip


@pytest.mark.parametrize("family", MANY)
def test_less_memory_is_held_when_activations_are_computed_twice(tmp_path, family):
    folder = build(family, tmp_path / "model", **MANY[family])
    held = []
    for budget in (0, 1024):
        trainer = prepared(folder, activation_mib=budget)[0]
        work = [trainer._cut(0, Item(text(1, 8, 40)), "full")]
        trainer._losses(work)  # the first pass measures, in the same way as this test
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer._losses(work)
        held.append(sum(saved.values()))
    assert held[0] < held[1] / 2


@pytest.mark.parametrize("widened", [False, True], ids=["", "fp32 around bf16"])
@pytest.mark.parametrize("family", MANY)
def test_rows_that_wait_are_no_more_than_what_a_step_is_cut_by(tmp_path, monkeypatch, family, widened):
    """Layers that share a weight have rows of each; one that is called twice (Gemma 3n's router of modalities) has
    those of both calls; and rows are as wide as activations, not as the weight."""
    if widened:
        monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)
    folder = build(family, tmp_path / "model", torch.bfloat16 if widened else torch.float32, **MANY[family])
    trainer = prepared(folder, activation_mib=0, batch_tokens=40)[0]
    trainer._activations = 1 << 30  # one update
    waiting, losses = [], trainer._losses

    def note(group: Any) -> Any:
        waiting.append(trainer._gather.waiting_nbytes)
        return losses(group)

    trainer._losses = note
    trainer.step([Item(text(1, 1, 39), context="full"), Item(text(2, 1, 40), context="full")])
    assert waiting[0] == 0
    assert 0.7 * 39 * trainer._gather.row_nbytes < waiting[1] <= 39 * trainer._gather.row_nbytes


@pytest.mark.parametrize("family", MANY)
def test_nothing_of_a_step_is_held_after_it(tmp_path, family):
    """Keys and values that layers hand on belong to autograd, and what is computed twice to it as well."""
    trainer, recorder = prepared(build(family, tmp_path / "model", **MANY[family]), activation_mib=0)
    held = []
    for _ in range(3):
        trainer.step([Item(text(1, 5, 20), context="full")])
        recorder.gradients.clear()
        gc.collect()
        held.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
    assert held[2] == held[1]


def test_the_first_pass_keeps_no_more_than_its_budget_either(tmp_path):
    """How large activations are is not known then; a layer or two tell."""
    folder = build("llama", tmp_path / "model", num_hidden_layers=16)
    whole, layer = held_by_the_first_pass(folder, 1024), held_by_the_first_pass(folder, 0)
    tight = prepared(folder, activation_mib=0)[0]
    tight._recompute._budget = whole // 8  # tests have no model whose activations take a MiB
    kept = held(tight)
    assert layer < kept < whole // 4
    assert tight._recompute._bytes_per_token == pytest.approx(whole / 48, rel=0.3)
    assert held(tight) < kept, "from then on nothing is kept"


def held_by_the_first_pass(folder, budget):
    return held(prepared(folder, activation_mib=budget)[0])


def held(trainer):
    """Bytes that a forward pass over 48 tokens keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    plain = trainer.model.forward  # inside: the first pass has hooks of its own, and the innermost count

    def forward(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(lambda one: note(own(one)), lambda one: one):
            return plain(*args, **kwargs)

    own = trainer._recompute._note
    trainer.model.forward = forward
    try:
        trainer._losses([trainer._cut(0, Item(text(1, 8, 40)), "full")])
    finally:
        trainer.model.forward = plain
    return sum(saved.values())


# --- fp32 around 16-bit weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [f for f in [*ATTENTION, *RECURRENT, "falcon"] if f not in {"gemma3_text", "mamba2"}]
)  # one scales its embedding in bf16, the other rounds to it before its head
def test_bf16_weights_give_the_gradients_of_the_same_weights_in_fp32(tmp_path, family, monkeypatch):
    """Where a CPU cannot multiply bf16, nothing but the weights is bf16: no rounding of activations is left."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)
    folder, example = build(family, tmp_path / "model", torch.bfloat16), text(2, 70, 6)
    truth = Truth(folder, example, "everywhere", dtype=torch.float32)
    _, optimizer, losses = recorded(folder, [Item(example)])
    assert losses == pytest.approx([truth.loss], rel=1e-5)
    if family in MAMBA:
        optimizer.forget(".A_log", ".D", ".dt_bias", "conv1d")
    assert_close(optimizer.gradients, truth.gradients)
