"""Rotary frequencies that transformers makes of the length of a row: a text comes out the same beside any other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hogwild import rope, skeleton
from hogwild.apollo import Optimizer
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from test_trainer import Example
from tiny import SIZES, llama

ORIGINAL, LONGEST = 32, 48
"""Beyond the texts with which a trainer tries whether a model's texts can be packed (24 tokens), as in a real model."""
HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
ROPES = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * HALF, "long_factor": [4.0 + i for i in range(HALF)],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def text(seed: int, context: int, trained: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (context + trained,), generator=generator).tolist()
    return Example(ids, [False] * context + [True] * trained)


SHORT, LONG = text(1, 4, 6), text(2, 30, 8)


@pytest.fixture(params=ROPES)
def folder(request, tmp_path: Path) -> Path:
    long = 128 if request.param == "longrope" else ORIGINAL
    return llama(tmp_path / "model", max_position_embeddings=long, rope_parameters=ROPES[request.param])


def trainer(folder: Path, longest: int | None = LONGEST, context: str = "frozen") -> Trainer:
    weights = Weights(load_arena(folder))
    optimizer = Optimizer(OptimizerConfig(lr=1e-12, rank=4), 0)
    model = skeleton.build(folder, weights, longest)
    return Trainer(model, optimizer, Progress(weights.arena.control, 4), set(weights.names), context, seed=0)


@pytest.mark.parametrize("longest", [ORIGINAL - 1, LONGEST])
def test_a_loss_is_the_same_alone_beside_a_long_text_and_after_one(folder, longest):
    made = trainer(folder, longest)
    assert made._packs, "otherwise nothing is beside another"
    alone = made.step([Item(SHORT)]).losses[0]
    beside, long = made.step([Item(SHORT), Item(LONG)]).losses
    assert beside == pytest.approx(alone, abs=1e-5)
    assert made.step([Item(SHORT)]).losses[0] == pytest.approx(alone, abs=1e-5)
    assert made.step([Item(LONG)]).losses[0] == pytest.approx(long, abs=1e-5)
    assert made.loss(LONG) == pytest.approx(long, abs=1e-5), "nor does it matter what was read beforehand"


def test_they_are_those_of_a_text_of_that_length(folder):
    """Against transformers itself, on one text that is as long as it says."""
    whole = text(3, 1, LONGEST)
    whole = Example(whole.ids[:LONGEST], whole.trained[:LONGEST])
    ids = torch.tensor([whole.ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert trainer(folder).loss(whole) == pytest.approx(float(expected), abs=1e-5)
    other = trainer(folder, ORIGINAL - 1)  # and those of another length are others
    assert other.loss(whole) != pytest.approx(float(expected), abs=1e-4)


def test_a_model_whose_frequencies_never_change_is_left_as_it_is(tmp_path):
    folder = llama(tmp_path / "model")
    model = skeleton.build(folder, Weights(load_arena(folder)))
    assert not list(rope._changing(model))
    before = model.model.rotary_emb.inv_freq.clone()
    rope.fix(model, 10_000)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
