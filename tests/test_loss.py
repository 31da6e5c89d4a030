"""Unlearning is bounded: by token, and in what it does to a model."""

import math

import pytest
import torch

from hogwild.loss import bounded_loss, unlearning_limit


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
