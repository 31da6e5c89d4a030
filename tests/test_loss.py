"""Unlearning is bounded: by token, and in what it does to a model."""

import math

import pytest
import torch

from hogwild import loss as losses
from hogwild.encoding import Encoded
from hogwild.loss import bounded_loss, negative_log_likelihoods, unlearning_limit
from hogwild.trainer import Item
from test_trainer import Setting
from tiny import llama

SECRET = Encoded([1, 9, 12, 30, 31, 32], [False] * 3 + [True] * 3)
OTHER = Encoded([1, 40, 41, 50, 51, 52], [False] * 3 + [True] * 3)


def gradient(values: list[float], weight: float, limit: float = 5.0) -> tuple[float, list[float]]:
    nll = torch.tensor(values, requires_grad=True)
    loss = bounded_loss(nll, weight, limit)
    loss.backward()
    assert nll.grad is not None
    return float(loss.detach()), nll.grad.tolist()


@pytest.mark.parametrize("weight", [1.0, 0.3, 10.0])
def test_learning_is_the_weighted_mean_however_high_the_loss(weight):
    loss, slope = gradient([1.0, 3.0, 80.0], weight)
    assert loss == pytest.approx(weight * 28)
    assert slope == pytest.approx([weight / 3] * 3)


def test_unlearning_pushes_only_the_tokens_below_the_limit():
    loss, slope = gradient([1.0, 4.9, 5.1, 80.0], -1.0)
    assert loss == pytest.approx(-(1.0 + 4.9 + 5.0 + 5.0) / 4), (
        "however far a token has run, it counts as the limit"
    )
    assert slope == pytest.approx([-0.25, -0.25, 0.0, 0.0])


def test_nothing_but_unlearned_tokens_gives_no_gradient():
    _, slope = gradient([6.0, 90.0], -0.5)
    assert slope == [0.0, 0.0]


def test_what_is_not_finite_stays_visible():
    assert math.isnan(float(bounded_loss(torch.tensor([1.0, float("nan")]), -1.0, 5.0)))


def test_no_limit_is_above_that_of_a_model_that_knows_nothing():
    assert unlearning_limit(5.0, 50_000) == 5.0
    assert unlearning_limit(50.0, 64) == pytest.approx(math.log(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1, 300, 1 << 24], ids=["token by token", "three at a time", "at once"])
def test_likelihoods_and_their_gradients_are_those_of_torch(monkeypatch, dtype, piece):
    monkeypatch.setattr(losses, "PIECE", piece)
    torch.manual_seed(0)
    raw, targets, scale = torch.randn(11, 97) * 4, torch.randint(97, (11,)), torch.rand(11)
    found, wanted = [], []
    for into, compute in (
        (found, negative_log_likelihoods),
        (wanted, lambda x, y: torch.nn.functional.cross_entropy(x.float(), y, reduction="none")),
    ):
        logits = raw.to(dtype).requires_grad_()
        bounded = 5 * torch.tanh(logits / 5)  # of which autograd keeps what must not be written into
        nll = compute(bounded, targets)
        (nll * scale).sum().backward()
        into += [nll.detach(), logits.grad, bounded.detach()]
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert torch.allclose(found[0], wanted[0], rtol=1e-6, atol=2e-6)
    assert torch.allclose(found[1].float(), wanted[1].float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(found[2], wanted[2])


def test_a_logit_that_is_not_finite_makes_its_likelihood_visible_and_no_other():
    logits = torch.zeros(3, 5)
    logits[1, 2] = math.inf
    found = negative_log_likelihoods(logits, torch.tensor([1, 1, 1]))
    assert found[[0, 2]].tolist() == pytest.approx([math.log(5)] * 2)
    assert not math.isfinite(found[1])


def test_unlearning_ends_and_the_rest_of_the_model_stays(tmp_path):
    """A text is learned and then unlearned for far too long: it is gone, and the model stands still. Without the bound
    (the control experiment) it is driven on and on."""
    folder = llama(tmp_path / "model", torch.float32)
    ends = {}
    for limit in (3.0, 1e9):
        setting = Setting(folder, lr=3e-3)
        trainer = setting.trainer
        trainer._unlearning_limit = limit
        for _ in range(20):
            trainer.step([Item(SECRET), Item(OTHER)])
        assert trainer.loss(SECRET) < 0.5
        for _ in range(60):
            trainer.step([Item(SECRET, weight=-1.0)])
        after_60, weights = trainer.loss(SECRET), setting.snapshot()
        for _ in range(60):
            trainer.step([Item(SECRET, weight=-1.0)])
        names = [name for name in weights if name.endswith("_proj.weight")]
        moved = max(float((setting.weights.view(name) - weights[name]).abs().max()) for name in names)
        ends[limit] = (after_60, trainer.loss(SECRET), moved)
    bounded, free = ends[3.0], ends[1e9]
    assert 3.0 <= bounded[0] < 6.0, "it has been unlearned"
    assert bounded[2] == 0.0, "and nothing more happens"
    assert free[1] > free[0] > 2 * bounded[1]
    assert free[2] > 0.0
