"""Embeddings that are trained: which rows move and by how much, alone or tied to a head."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import studio as studios
from families import Truth, build
from hogwild import protection, skeleton
from hogwild.arena.client import Arena
from hogwild.coverage import examine
from hogwild.drift import Drift
from hogwild.encoding import Encoded
from hogwild.errors import LossError
from hogwild.trainer import Item
from hogwild.weights import Weights, digest, load_arena
from hogwild_kernels import ApolloConfig, ApolloState, reference
from studio import Studio
from test_trainer import EXAMPLE, OTHER, Setting, overflow, resumed, run
from tiny import llama, qwen2

TABLE = "model.embed_tokens.weight"
CONFIG = ApolloConfig(rank=4, lr=1e-3, seed=3)  # as Setting has it


def setting_on(folder: Path, **settings: object) -> Setting:
    return Setting(folder, embeddings=True, **settings)


def rows_moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set((before != after).any(1).nonzero()[:, 0].tolist())


def reached(example: Encoded, context: str) -> set[int]:
    """Tokens that get a gradient: all that are read, or those that predict a trained one."""
    pairs = zip(example.ids[:-1], example.trained[1:], strict=True)
    return {token for token, predicts in pairs if predicts or context == "full"}


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "context"),
    [
        *[("llama", tied, context) for tied in (False, True) for context in ("frozen", "full")],
        *[
            ("gemma3_text", tied, context) for tied in (False, True) for context in ("frozen", "full")
        ],  # scales the rows
        ("gpt2", True, "full"),  # a second embedding, of positions, and other names
    ],
)
def test_the_update_is_that_of_autograds_gradient(tmp_path, family, tied, context):
    folder = build(family, tmp_path, tie_word_embeddings=tied)
    setting = setting_on(folder, context=context)
    model = skeleton.build(folder, setting.weights)
    name = f"{skeleton.table_name(model)}.weight"
    live = model.get_parameter(name)
    before = live.clone()
    result = setting.trainer.step([Item(EXAMPLE)])
    truth = Truth(folder, EXAMPLE, "linear" if context == "frozen" else "none")
    assert result.losses[0] == pytest.approx(truth.loss, rel=1e-5)
    gradient = truth.gradients[name]
    touched = set(gradient.any(1).nonzero()[:, 0].tolist())
    assert touched == (set(range(64)) if tied else reached(EXAMPLE, context))
    assert rows_moved(before, live) == touched
    expected = before.clone()
    reference.published_step(expected, gradient, ApolloState(name, tuple(expected.shape), CONFIG))
    moved, wanted = live - before, expected - before
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(moved, wanted, rtol=1e-3, atol=2e-7)
    assert result.skipped == 0
    assert name not in setting.trainer.frozen
    assert "lm_head.weight" not in setting.trainer.frozen


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_rows_that_no_gradient_reaches_do_not_decay_either(tmp_path, context):
    """Context that is constant was read, too, and counts as if it had not been."""
    setting = setting_on(
        llama(tmp_path / "model", tie_word_embeddings=False), context=context, weight_decay=10.0
    )
    before = setting.weights.view(TABLE).clone()
    setting.trainer.step([Item(EXAMPLE)])
    assert rows_moved(before, setting.weights.view(TABLE)) == reached(EXAMPLE, context)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_several_passes_updates_it_once_with_the_gradient_of_their_mean(tmp_path, tied):
    folder = llama(tmp_path / "model", tie_word_embeddings=tied)
    one, other = (Truth(folder, example, "linear").gradients[TABLE] for example in (EXAMPLE, OTHER))
    before = Weights(load_arena(folder)).view(TABLE).clone()
    expected = before.clone()
    reference.published_step(expected, one * 2 / 2 + other / 2, ApolloState(TABLE, (64, 32), CONFIG))
    for batch_tokens in (512, 1):  # together, and one after the other
        setting = setting_on(folder)
        setting.trainer._batch_tokens = batch_tokens
        setting.trainer.step([Item(EXAMPLE, weight=2.0), Item(OTHER)])
        moved, wanted = setting.weights.view(TABLE) - before, expected - before
        assert torch.allclose(moved, wanted, rtol=1e-3, atol=2e-7)
        moments = {name for name in setting.optimizer.tensors() if name.startswith(TABLE)}
        assert setting.optimizer.tensors()[f"{TABLE}/counts"].tolist() == [1, 0]
        assert len(moments) == 4
    assert not torch.equal(one, other)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bad", [EXAMPLE, OTHER], ids=["example", "other"])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_given_up_leaves_nothing_behind(tmp_path, tied, bad, late):
    """One of two passes is refused: what the other, if it was the first, has found for the embedding must not move it
    later, which shows where the next example is another one."""
    folder = llama(tmp_path / "model", tie_word_embeddings=tied)
    setting, fresh = setting_on(folder), setting_on(folder)
    setting.trainer._batch_tokens, setting.trainer.stream.waits = 1, late
    setting.trainer._max_loss = 0.0  # which is not asked of what is unlearned
    before = setting.snapshot()
    with pytest.raises(LossError):
        setting.trainer.step([Item(one, 1.0 if one is bad else -1.0) for one in (EXAMPLE, OTHER)])
    setting.trainer._max_loss = math.inf
    assert all(torch.equal(before[n], setting.weights.view(n)) for n in before)
    for one in (setting, fresh):
        one.trainer.step([Item(bad)])
    assert torch.equal(setting.weights.view(TABLE), fresh.weights.view(TABLE))
    assert not torch.equal(setting.weights.view(TABLE), before[TABLE])


def test_a_gradient_that_is_dense_after_all_gives_the_same_update(tmp_path):
    """As from a model that uses the table for something else than looking up."""
    folder = llama(tmp_path / "model", tie_word_embeddings=False)
    sparse, dense = setting_on(folder), setting_on(folder)
    dense.trainer.model.get_input_embeddings().sparse = False
    for setting in (sparse, dense):
        setting.trainer.step([Item(EXAMPLE)])
    torch.testing.assert_close(sparse.weights.view(TABLE), dense.weights.view(TABLE), rtol=1e-6, atol=1e-8)


def test_a_gradient_that_is_not_finite_touches_no_row(tmp_path):
    setting = setting_on(llama(tmp_path / "model", tie_word_embeddings=False))
    overflow(setting.trainer)
    before = setting.weights.view(TABLE).clone()
    result = setting.trainer.step([Item(EXAMPLE)])
    assert result.skipped == result.updates > 0
    assert torch.equal(setting.weights.view(TABLE), before)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_teaches_the_example_and_the_embedding_has_a_part_in_it(tmp_path, dtype, tied):
    folder = llama(tmp_path / "model", dtype, tie_word_embeddings=tied)
    setting = setting_on(folder, lr=5e-3)
    before, first = setting.snapshot(), setting.trainer.loss(EXAMPLE)
    for _ in range(15):
        setting.trainer.step([Item(EXAMPLE)])
    assert setting.trainer.loss(EXAMPLE) < 0.5 * first
    table = setting.weights.view(TABLE).clone()
    if not tied:
        assert rows_moved(before[TABLE], table) == reached(EXAMPLE, "frozen"), "all others stay, to the bit"
    for name in before:
        setting.weights.view(name).copy_(before[name] if name != TABLE else table)
    assert setting.trainer.loss(EXAMPLE) < first - 0.05, "with the embedding alone as it was trained"


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_is_what_others_look_at(tmp_path, tied):
    """The reader's skeleton, which is compared with the server, and another trainer's."""
    folder = llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
    setting = setting_on(folder, threads=2, lr=5e-3)
    reader = skeleton.build(folder, setting.weights)
    address = reader.get_input_embeddings().weight.data_ptr()
    for _ in range(3):
        setting.trainer.step([Item(EXAMPLE)])
    live = setting.weights.view(TABLE)
    assert live.data_ptr() == address, "never moved or re-bound"
    for model in (reader, setting.trainers[1].model):
        assert torch.equal(model.get_input_embeddings().weight, live)
        assert (model.get_output_embeddings().weight.data_ptr() == address) is tied
    assert setting.trainers[1].loss(EXAMPLE) == setting.trainers[0].loss(EXAMPLE)


@pytest.mark.parametrize("tied", [False, True])
def test_threads_train_the_same_rows_at_once(tmp_path, tied):
    folder = llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
    setting = setting_on(folder, threads=2, lr=3e-3)
    before = [setting.trainer.loss(example) for example in (EXAMPLE, OTHER)]

    def work(index: int) -> None:
        for _ in range(15):
            setting.trainers[index].step([Item((EXAMPLE, OTHER)[index])])

    run(lambda: work(0), lambda: work(1))
    for loss, example in zip(before, (EXAMPLE, OTHER), strict=True):
        assert setting.trainer.loss(example) < 0.7 * loss
    assert bool(setting.weights.view(TABLE).isfinite().all())


# --- saving and going back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_bit_for_bit_from_saved_state(tmp_path, tied):
    setting = setting_on(llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied))
    for example in (EXAMPLE, OTHER, EXAMPLE):
        setting.trainer.step([Item(example)])
    state = {name: tensor.clone() for name, tensor in setting.optimizer.tensors().items()}
    assert f"{TABLE}/exp_avg" in state
    again = resumed(setting, state, embeddings=True)
    forgetful = resumed(setting, {k: t for k, t in state.items() if TABLE not in k}, embeddings=True)
    for one in (setting, again, forgetful):
        for example in (OTHER, EXAMPLE):
            one.trainer.step([Item(example)])
    for name in setting.weights.names:
        assert torch.equal(setting.weights.view(name), again.weights.view(name)), name
    assert not torch.equal(setting.weights.view(TABLE), forgetful.weights.view(TABLE)), "lost moments show"


def test_checkpoint_restart_and_rollback_have_it_to_the_bit(tmp_path):
    studios.model(tmp_path / "model")
    studio = Studio(tmp_path, training__embeddings=True)
    was = studio.bits()
    studio.drop("a", 3)
    studio.train()
    first, saved = studio.save(), studio.bits()
    assert saved[TABLE] != was[TABLE]
    assert f"{TABLE}/exp_avg_sq" in saved
    studio.close()
    studios.assert_comes_back(tmp_path, first, saved, TABLE, training__embeddings=True)


# --- protection ------------------------------------------------------------------------------------------------------


def texts() -> list[list[int]]:
    """None has a token above 40 in it."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (9,), generator=generator).tolist() for _ in range(12)]


SECRET = Encoded([5, 63, 7, 62, 9, 61], [False, True, True, True, True, True])


def test_the_commonest_tokens_are_protected_and_never_more_than_half():
    assert protection.commonest([[4, 4, 9], [9, 4, 2]], 2, 20).tolist() == [4, 9]
    assert protection.commonest([[4, 4, 9], [9, 4, 2]], 9, 20).tolist() == [2, 4, 9]
    assert len(protection.commonest([list(range(20))], 50, 20)) == 10


def protected(setting: Setting, rank: int = 12) -> dict[str, torch.Tensor]:
    model = skeleton.build(setting.folder, setting.weights)
    return protection.measure(
        model, set(setting.weights.names), texts(), rank=rank, budget_bytes=1 << 20, seed=0, embeddings=True
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_the_models_own_texts_use_most_stay_to_the_bit(tmp_path, dtype, tied):
    setting = setting_on(llama(tmp_path / "model", dtype, tie_word_embeddings=tied))
    directions = protected(setting)
    kept = directions["model.embed_tokens"]
    assert kept.tolist() == protection.commonest(texts(), 12, 64).tolist()
    example = replace(SECRET, ids=[5, 63, int(kept[3]), 62, int(kept[7]), 61])
    before = setting.snapshot()
    setting.trainer.protect(directions)
    for _ in range(6):
        setting.trainer.step([Item(example)])
    live = setting.weights.view(TABLE)
    assert torch.equal(live[kept], before[TABLE][kept])
    assert {62, 63} <= rows_moved(before[TABLE], live)
    head = TABLE if tied else "lm_head.weight"
    change = setting.weights.view(head).float() - before[head].float()
    assert change.norm() > 1e-3
    if dtype == torch.float32:  # without the noise of rounding
        basis = directions["lm_head"]
        assert (change @ basis.T).norm() < 1e-4 * change.norm(), "what the head makes of general text stays"


def test_a_protected_tied_table_learns_and_its_rounding_is_taken_back(tmp_path):
    shares, learned = {}, {}
    for every in (0, 3):
        setting = setting_on(llama(tmp_path / f"every{every}", torch.bfloat16))
        reader = skeleton.build(setting.folder, setting.weights)
        directions, before = protected(setting), setting.snapshot()
        drift = Drift(setting.weights, reader, setting.folder, every)
        setting.trainer.protect(directions)
        drift.protect(directions, digest(setting.folder))
        first = setting.trainer.loss(SECRET)
        for step in range(1, 31):
            setting.trainer.step([Item(SECRET)])
            drift.after(step)
        learned[every] = first - setting.trainer.loss(SECRET)
        moved = setting.weights.view(TABLE).float() - before[TABLE].float()
        basis = directions["lm_head"].float()
        shares[every] = float((moved @ basis.T).square().sum() / moved.square().sum())
        kept = directions["model.embed_tokens"]
        assert torch.equal(setting.weights.view(TABLE)[kept], before[TABLE][kept])
    assert shares[3] < shares[0] / 2
    assert all(gain > 0.5 for gain in learned.values())


def test_directions_that_were_found_while_it_was_frozen_are_found_anew(tmp_path):
    studios.model(tmp_path / "model")
    settings = {"replay__self_texts": 4, "replay__self_tokens": 6, "replay__protected_rank": 4}
    found = []
    for embeddings in (False, True, True):
        studio = Studio(tmp_path, training__embeddings=embeddings, **settings)
        studio.learner.wait_for_own_texts()
        trainer = studio.learner.trainers[0]
        assert trainer.trains_embeddings is embeddings
        if embeddings:
            assert trainer._gather.embedding.protected is not None
            assert all(linear.protected is not None for linear in trainer._gather.linears)
        found.append((studio.config.state_dir / "protected.safetensors").read_bytes())
        studio.close()
    assert found[0] != found[1] == found[2]


# --- what it is offered for ------------------------------------------------------------------------------------------


def test_the_doctor_says_what_would_be_trained(tmp_path):
    folder = build("gpt2", tmp_path / "model")
    layout = load_arena(folder).layout
    frozen = examine(folder, layout).frozen
    assert (
        frozen["transformer.wte.weight"][1] == frozen["transformer.wpe.weight"][1] == "embeddings are frozen"
    )
    trained = examine(folder, layout, embeddings=True)
    assert trained.trained["transformer.wte.weight"] == 64 * 32
    assert set(trained.frozen) == {"transformer.wpe.weight"}
    (file := tmp_path / "layout.json").write_text(json.dumps({"layout": layout.to_json()}))
    asked = [sys.executable, "-m", "hogwild.coverage", str(folder), str(file)]
    off, on = (
        json.loads(subprocess.run([*asked, *given], capture_output=True, check=True).stdout)
        for given in ([], ["--embeddings"])
    )
    assert on["trained_elements"] - off["trained_elements"] == 64 * 32, "the tied head is not counted again"
    assert on["trained"] - off["trained"] == 1


def test_a_tied_head_is_counted_once_and_norms_only_where_they_are_trained(tmp_path):
    folder = llama(tmp_path / "model")
    stored = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    norms = sum(size for name, size in stored.items() if "norm" in name)
    assert norms
    (file := tmp_path / "layout.json").write_text(json.dumps({"layout": load_arena(folder).layout.to_json()}))
    asked = [sys.executable, "-m", "hogwild.coverage", str(folder), str(file)]

    def counted(*options: str) -> tuple[int, int]:
        ran = subprocess.run([*asked, *options], capture_output=True, check=True)
        about = json.loads(ran.stdout)
        protected = [names for why, names in about["frozen"] if why.startswith("protected")]
        assert bool(protected) == ("--protected" in options)
        assert all("norm" in name for names in protected for name in names)
        return about["elements"], about["trained_elements"]

    total = sum(stored.values())
    assert counted() == (total, total - stored[TABLE])
    assert counted("--protected") == (total, total - stored[TABLE] - norms)
    assert counted("--embeddings") == (total, total)
    assert counted("--embeddings", "--protected") == (total, total - norms)


def test_what_coverage_calls_protected_is_what_a_trainer_leaves_alone(tmp_path):
    """Norms, the biases of qwen2; and nothing else."""
    folder = qwen2(tmp_path / "model")
    setting = setting_on(folder)
    before = {name: setting.weights.view(name).clone() for name in setting.weights.names}
    setting.trainer.protect({})
    setting.trainer.step([Item(EXAMPLE)])
    moved = {name for name, was in before.items() if not torch.equal(setting.weights.view(name), was)}
    about = examine(folder, setting.weights.arena.layout, embeddings=True, protected=True)
    assert moved == set(about.trained)


def test_a_head_that_is_stored_twice_keeps_both_frozen_and_says_so(tmp_path):
    """A checkpoint would hold the old head beside the new embedding, and a server takes a head that differs for
    another one."""
    folder = llama(tmp_path / "model")
    tensors = load_file(file := folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors[TABLE].clone()
    save_file(tensors, file, {"format": "pt"})
    whole = load_arena(folder)
    served = {name: region for name, region in whole.layout.tensors.items() if name != "lm_head.weight"}
    layout = replace(whole.layout, tensors=served, frozen={"lm_head.weight": "replaced after loading"})
    setting = setting_on(folder, arena=Arena(whole.weights, whole.control, layout))
    assert not setting.trainer.trains_embeddings
    assert "stored a second time, as lm_head.weight" in setting.trainer.frozen[TABLE]
    before = setting.weights.view(TABLE).clone()
    setting.trainer.step([Item(EXAMPLE)])
    assert torch.equal(setting.weights.view(TABLE), before)
    why = examine(folder, layout, embeddings=True).frozen[TABLE][1]
    assert "stored a second time" in why
