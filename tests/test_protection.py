"""Updates leave alone what a layer does with the model's own texts, and still learn."""

from pathlib import Path

import pytest
import torch

from families import build
from hogwild import coverage, protection, skeleton
from hogwild.apollo import Optimizer
from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.encoding import Encoded
from hogwild.errors import ConfigError, HogwildError
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, digest, load_arena
from hogwild_kernels import ApolloConfig, ApolloState, products, reference
from tiny import chat_model, qwen2

RANK = 8
SECRET = 63  # a token that no text of the model's own has


def texts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (9,), generator=generator).tolist() for _ in range(count)]


def measured(
    folder: Path, weights: Weights, *, budget: int = 1 << 20, rank: int = RANK
) -> dict[str, torch.Tensor]:
    model = skeleton.build(folder, weights)
    return protection.measure(model, set(weights.names), texts(), rank=rank, budget_bytes=budget, seed=0)


def trainer_on(folder: Path, weights: Weights) -> Trainer:
    return Trainer(
        skeleton.build(folder, weights), Optimizer(OptimizerConfig(lr=1e-3, rank=4), 0),
        Progress(weights.arena.control, 4), set(weights.names), "frozen", seed=0,
    )  # fmt: skip


def test_the_principal_directions_hold_what_the_best_ones_hold():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, generator=generator) * torch.logspace(0, -2, 40)
    basis = protection.principal(x, 10, seed=0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(10), atol=1e-5, rtol=0)
    best = torch.linalg.svdvals(x)[:10].square().sum()
    assert (x @ basis.T).square().sum() > 0.99 * best
    assert torch.equal(basis, protection.principal(x, 10, seed=0))
    assert protection.principal(x, 30, seed=0).shape == (20, 40)  # never more than half
    assert protection.principal(x[:3], 10, seed=0).shape == (3, 40)  # nor more than there are inputs


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_layers_that_share_an_input_share_its_directions_whatever_fits_into_memory(tmp_path, family):
    weights = Weights(load_arena(build(family, tmp_path)))
    bases = measured(tmp_path, weights)
    again = measured(tmp_path, weights, budget=1)  # one layer at a time
    assert set(bases) == set(again)
    assert all(f"{name}.weight" in weights.names for name in bases)
    for name, basis in bases.items():
        torch.testing.assert_close(basis, again[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-4, rtol=0)
    gates = [name for name in bases if name.endswith("gate_proj")]
    assert gates
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj")
        assert up not in bases or bases[gate] is bases[up]


def test_training_leaves_alone_what_a_layer_does_in_these_directions(tmp_path):
    folder = build("llama", tmp_path)
    moved = {}
    for protects in (True, False):
        weights = Weights(load_arena(folder))
        before = {name: weights.view(name).clone() for name in weights.names}
        bases = measured(folder, weights)
        trainer = trainer_on(folder, weights)
        if protects:
            trainer.protect(bases)
        for step in range(6):
            example = Encoded([5, SECRET, 7 + step, SECRET, 9], [False, True, True, True, True])
            trainer.step([Item(example)])
        for name, basis in bases.items():
            change = weights.view(f"{name}.weight") - before[f"{name}.weight"]
            assert change.norm() > 1e-3, name
            moved[name, protects] = float((change @ basis.T).norm() / change.norm())
        vectors = [name for name in weights.names if weights.view(name).ndim == 1]
        assert vectors
        assert all(torch.equal(weights.view(name), before[name]) is protects for name in vectors)
    for (name, protects), share in moved.items():
        assert share < 1e-4 if protects else share > 0.05, (name, protects, share)


def test_decay_shrinks_what_updates_leave_alone_and_is_refused_beside_it():
    """In fp64, against W B^T as it was: the update has no part in it, the decay takes its share."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 6, generator=generator, dtype=torch.float64)).Q.T
    for decay in (0.0, 0.1):
        config = ApolloConfig(rank=4, lr=0.01, weight_decay=decay)
        weight = torch.randn(40, 24, generator=generator, dtype=torch.float64)
        kept = weight @ basis.T
        state = ApolloState("w", (40, 24), config, dtype=torch.float64)
        x = products.without(torch.randn(5, 24, generator=generator, dtype=torch.float64), basis)
        reference.factored_step(
            weight, x, torch.randn(5, 40, generator=generator, dtype=torch.float64), state
        )
        torch.testing.assert_close(weight @ basis.T, kept * (1 - 0.01 * decay), rtol=1e-12, atol=1e-12)
    wrong = {"optimizer.weight_decay": 0.1}
    with pytest.raises(ConfigError, match="weight_decay shrinks the directions"):
        load(overrides=wrong)
    for off in ("replay.protected_rank", "replay.self_texts", "replay.ratio"):  # nothing is protected then
        assert load(overrides={**wrong, off: 0}).optimizer.weight_decay == 0.1


def test_a_trainer_says_of_everything_that_it_leaves_why(tmp_path):
    """Biases too (Qwen 2), and as the doctor says it."""
    folder = qwen2(tmp_path / "model")
    weights = Weights(load_arena(folder))
    trainer = Trainer(
        skeleton.build(folder, weights), Optimizer(OptimizerConfig(rank=4), 0), Progress(weights.arena.control, 4),
        set(weights.names), "frozen", seed=0,
    )  # fmt: skip
    trainer.protect({})
    said = coverage.examine(folder, weights.arena.layout, protected=True).frozen
    assert trainer.frozen == {name: why for name, (_, why) in said.items()}
    assert trainer.frozen["model.layers.0.self_attn.q_proj.bias"].startswith("protected")


def test_it_still_learns_and_the_own_texts_move_less(tmp_path):
    folder = build("llama", tmp_path)
    secret = Encoded([5, SECRET, 41, SECRET, 50], [False, True, True, True, True])
    learned, moved = {}, {}
    for protects in (True, False):
        weights = Weights(load_arena(folder))
        trainer = trainer_on(folder, weights)
        own = [Encoded(ids, [False] + [True] * (len(ids) - 1)) for ids in texts()]
        first, was = trainer.loss(secret), [trainer.loss(one) for one in own]
        if protects:
            trainer.protect(measured(folder, weights, rank=16))
        for _ in range(30):
            trainer.step([Item(secret)])
        learned[protects] = first - trainer.loss(secret)
        moved[protects] = sum(abs(trainer.loss(one) - loss) for one, loss in zip(own, was, strict=True))
    assert learned[True] > 0.5 * learned[False] > 0.1
    assert moved[True] < 0.8 * moved[False]


def test_a_restart_goes_on_with_the_very_same_and_a_damaged_file_is_made_anew(tmp_path):
    folder = chat_model(tmp_path / "model")
    base, path = digest(folder), tmp_path / "protected.safetensors"
    settings = {"state_dir": str(tmp_path), "training.threads": 2, "replay.self_texts": 4, "replay.self_tokens": 6,
                "replay.protected_rank": 4}  # fmt: skip
    config = load(None, settings)

    def directions(ledger: Ledger) -> list[torch.Tensor]:
        learner = Learner(load_arena(folder), folder, config, ledger, Curriculum(ledger, config.replay))
        learner.write_own_texts(tmp_path / "selfreplay.json", base)
        learner.wait_for_own_texts()
        assert learner.stop(60)
        one, two = ([linear.protected for linear in t._gather.linears] for t in learner.trainers)
        assert all(a is b for a, b in zip(one, two, strict=True))  # no copy for each thread
        return one

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        made = directions(ledger)
        assert all(one is not None for one in made)
        kept = path.read_bytes()
        read = directions(ledger)
        assert all(torch.equal(a, b) for a, b in zip(made, read, strict=True))
        assert path.read_bytes() == kept
        path.write_bytes(kept[:100])
        with pytest.raises(HogwildError, match="delete it"):
            protection.load(path, base, 4)
        assert [one.shape for one in directions(ledger)] == [one.shape for one in made]
        assert protection.load(path, base, 4) is not None
    assert protection.load(path, "another model", 4) is None
    assert protection.load(tmp_path / "missing", base, 4) is None
    assert protection.load(path, base, 5) is None, "another rank was asked for"
