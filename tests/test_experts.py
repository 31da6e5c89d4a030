"""Experts that are trained: what the model computes, what is protected, what is saved, and what is served."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES
from families import build
from hogwild import experts, protection, skeleton
from hogwild.apollo import Optimizer
from hogwild.encoding import Encoded
from hogwild.layout import Region
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from studio import Studio, assert_comes_back
from tiny import tokenizer

MIXTURE = next(one for one in ARCHITECTURES if one.name == "Qwen3-MoE")
STACK = "model.layers.0.mlp.experts.gate_up_proj"
IDS = torch.randint(3, 60, (1, 30), generator=torch.Generator().manual_seed(0))


def model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tokenizer(MIXTURE.build(folder, dtype))
    return folder


@torch.no_grad()
def test_a_model_computes_the_same_with_its_experts_apart(tmp_path):
    folder = model(tmp_path / "model", torch.float32)
    weights = Weights(load_arena(folder))
    whole, apart = skeleton.build(folder, weights), skeleton.build(folder, weights, apart=True)
    torch.testing.assert_close(apart(IDS).logits, whole(IDS).logits)
    places = skeleton.bound(apart)
    stack = whole.get_parameter(STACK)
    for number in range(len(stack)):
        name = f"{STACK}.{number}.weight"
        assert weights.at(places[name]).data_ptr() == apart.get_parameter(name).data_ptr()
        assert torch.equal(weights.at(places[name]), stack[number])
    assert STACK not in places
    assert whole.get_parameter(STACK).data_ptr() == apart.get_parameter(f"{STACK}.0.weight").data_ptr()


@torch.no_grad()
def test_stacks_that_are_stored_transposed_are_looked_at_the_other_way_round(tmp_path):
    folder = model(tmp_path / "model", torch.float32)
    plain = skeleton.build(folder, Weights(load_arena(folder)))
    wanted = plain(IDS).logits
    regions = {}
    for name, module in plain.named_modules():
        if hasattr(module, "is_transposed"):
            module.is_transposed = True
            for leaf in ("gate_up_proj", "down_proj"):
                stack = module._parameters[leaf]
                stack.data = stack.transpose(1, 2).contiguous()
                base = stack.data_ptr() - 64
                regions[f"{name}.{leaf}"] = Region.of(stack.data, base)
    shapes = {name: region.shape for name, region in regions.items()}
    torch.testing.assert_close(plain(IDS).logits, wanted)
    found = experts.unstack(plain, regions, skeleton._layer_of)
    torch.testing.assert_close(plain(IDS).logits, wanted)
    for name, stack in found.items():
        weight, region = plain.get_parameter(name), regions[name]
        assert region.shape == tuple(weight.shape) == shapes[stack][:0:-1]
        assert region.stride == weight.stride()
        number = int(name.split(".")[-2])
        assert region.offset == 64 + number * 4 * weight.numel()


def test_what_has_no_place_of_its_own_or_is_described_otherwise_stays_a_stack(tmp_path):
    for family in ("phimoe", "llama4_text"):
        folder = build(family, tmp_path / family)
        weights = Weights(load_arena(folder))
        whole, apart = skeleton.build(folder, weights), skeleton.build(folder, weights, apart=True)
        assert skeleton.bound(whole) == skeleton.bound(apart)
        assert {name for name, _ in whole.named_parameters()} == {
            name for name, _ in apart.named_parameters()
        }


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
def test_older_weights_of_experts_and_of_square_transposed_ones_are_those_of_the_file(tmp_path, apart):
    """What `disagreement.suspects` compares with."""
    for folder in (model(tmp_path / "mixture", torch.float32), build("gpt2", tmp_path / "gpt2")):
        weights = Weights(load_arena(folder))
        live = skeleton.build(folder, weights, apart=apart)
        before = live(IDS).logits
        names = list(skeleton.bound(live))
        for name in names:
            weights.at(skeleton.bound(live)[name]).mul_(1.5)
        assert not torch.allclose(live(IDS).logits, before, atol=1e-3)
        with skeleton.older(live, folder, names):
            torch.testing.assert_close(live(IDS).logits, before)


def trainer_on(folder: Path, weights: Weights, **settings: float) -> Trainer:
    built = skeleton.build(folder, weights, apart=True)
    optimizer = Optimizer(OptimizerConfig(**{"lr": 1e-3, "rank": 4, **settings}), 0)
    places = set(skeleton.bound(built))
    return Trainer(built, optimizer, Progress(weights.arena.control, 4), places, "frozen", seed=0)


def test_training_leaves_alone_what_an_expert_does_with_general_text(tmp_path):
    """In the layer that gets the very same inputs as before: deeper ones get others."""
    folder = model(tmp_path / "model", torch.float32)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 40, (9,), generator=generator).tolist() for _ in range(2)]
    moved = {}
    for protects in (True, False):
        weights = Weights(load_arena(folder))
        reader = skeleton.build(folder, weights, apart=True)
        found = protection.measure(
            reader, set(skeleton.bound(reader)), texts, rank=16, budget_bytes=1 << 20, seed=0
        )
        reached = [name for name in protection.experts(reader) if name in found]
        assert len(reached) > 6
        trainer = trainer_on(folder, weights)
        if protects:
            trainer.protect(found)
            assert all(
                linear.protected is not None for linear in trainer._gather.linears if linear.name in found
            )
        before = {name: reader.get_submodule(name).weight.clone() for name in reached}
        for _ in range(5):
            trainer.step([Item(Encoded([5, 50, 51, 52, 53, 54, 55], [False, *[True] * 6]))])
        rows = {name: found[name].float() for name in reached}
        change = [
            float(((reader.get_submodule(name).weight - before[name]) @ rows[name].t()).norm())
            for name in reached
        ]
        whole = [float((reader.get_submodule(name).weight - before[name]).norm()) for name in reached]
        moved[protects] = sum(change), sum(whole)
    assert moved[True][1] > 0.2 * moved[False][1], "it learns all the same"
    assert moved[True][0] < 1e-4 * moved[False][0]


def test_rows_that_wait_are_those_of_the_experts_that_tokens_were_sent_to(tmp_path):
    folder = model(tmp_path / "model", torch.float32)
    trainer = trainer_on(folder, Weights(load_arena(folder)))
    trainer._batch_tokens, trainer._activations = 1, 1 << 30
    waiting, losses = [], trainer._losses

    def note(group: object) -> list[torch.Tensor]:
        waiting.append(trainer._gather.waiting_nbytes)
        return losses(group)

    trainer._losses = note
    texts = [Encoded(IDS[0, :length].tolist(), [False] + [True] * (length - 1)) for length in (20, 30)]
    trainer.step([Item(one, context="full") for one in texts])
    nothing, waited = waiting
    assert nothing == 0
    assert waited == pytest.approx(19 * trainer._gather.row_nbytes, rel=1e-3)


def test_directions_that_were_found_before_experts_were_trained_are_found_anew(tmp_path):
    model(tmp_path / "model")
    settings = {"replay__self_texts": 4, "replay__self_tokens": 6, "replay__protected_rank": 4}
    found = []
    for apart in (False, True, True):
        studio = Studio(tmp_path, training__experts=apart, **settings)
        studio.learner.wait_for_own_texts()
        linears = studio.learner.trainers[0]._gather.linears
        assert any(linear.stack for linear in linears) is apart
        if apart:
            assert any(linear.protected is not None for linear in linears if linear.stack)
        found.append((studio.config.state_dir / "protected.safetensors").read_bytes())
        studio.close()
    assert found[0] != found[1] == found[2]


def test_checkpoint_restart_and_rollback_have_them_to_the_bit(tmp_path):
    folder = model(tmp_path / "model")
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"  # as the checkpoint calls it
    studio = Studio(tmp_path, training__experts=True)
    was = studio.bits()
    studio.drop("a", 3)
    studio.train()
    first, saved = studio.save(), studio.bits()
    assert any(".experts." in name and name.endswith("exp_avg_sq") for name in saved)
    assert saved[expert] != was[expert]
    written = studio.config.state_dir / "checkpoints" / "current"
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)(IDS).logits
        live = studio.learner.reader(IDS).logits.float()
    agree = (plain - live).abs().amax(-1) < 0.1  # rounding sends a token to other experts now and then
    assert agree.float().mean() > 0.8
    assert load_file(written / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    studio.close()
    assert_comes_back(tmp_path, first, saved, expert, training__experts=True)

    studio = Studio(tmp_path, training__experts=False)
    live = {name for name in studio.bits() if not name.endswith(("exp_avg", "exp_avg_sq", "norm", "counts"))}
    assert {name: studio.bits()[name] for name in live} == {name: saved[name] for name in live}
    studio.close()
