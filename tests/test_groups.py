"""An example of several sequences counts as one example, and its tokens all the same."""

import pytest
import torch

from hogwild.encoding import Encoded
from hogwild.groups import Group, flat, regroup
from hogwild.trainer import StepResult
from test_trainer import Setting
from tiny import llama


def sequence(*ids: int, context: int) -> Encoded:
    return Encoded(list(ids), [i >= context for i in range(len(ids))])


ONE = sequence(3, 4, 5, 6, context=3)  # one trained token
THREE = sequence(3, 4, 5, 6, 7, context=2)  # three
OTHER = sequence(9, 10, 11, context=1)


def result_of(losses: list[float], tokens: list[int]) -> StepResult:
    return StepResult(losses, tokens, step=1, staleness=0, update_norm=0, updates=0, skipped=0, seconds=0)


def test_losses_are_put_together_by_tokens():
    groups = [Group.of([ONE, THREE]), Group.of([OTHER])]
    assert regroup(groups, result_of([8.0, 4.0, 1.0], [1, 3, 2])) == [(5.0, 4), (1.0, 2)]
    assert groups[0].ids == THREE.ids, "the last one has the whole conversation"


def test_an_example_of_one_sequence_keeps_its_weight_and_context():
    (item,) = flat([Group.of([ONE], weight=-0.5, context="full")])
    assert (item.encoded, item.weight, item.context) == (ONE, -0.5, "full")


def test_the_gradient_of_a_step_is_the_mean_over_examples(tmp_path):
    """Against autograd on the loss written down plainly."""
    folder = llama(tmp_path / "model", torch.float32)
    groups = [Group.of([ONE, THREE], weight=2.0), Group.of([OTHER])]
    items = flat(groups)
    trainer = Setting(folder).trainer
    losses = [trainer.loss(item.encoded) for item in items]
    step = sum(item.weight * loss for item, loss in zip(items, losses, strict=True)) / len(items)
    plain = (2.0 * (losses[0] * 1 + losses[1] * 3) / 4 + losses[2]) / 2
    assert step == pytest.approx(plain, rel=1e-6)
    assert trainer.step(items).losses == pytest.approx(losses, rel=1e-5)
