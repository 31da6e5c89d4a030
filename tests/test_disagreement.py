"""How far server and trainer may differ, and which module is named when they differ more."""

from pathlib import Path
from typing import cast

import pytest
import torch

from architectures import ARCHITECTURES
from hogwild import disagreement, served, skeleton
from hogwild.errors import VerificationError
from hogwild.served import trained_log_probabilities
from hogwild.weights import Weights, load_arena
from tiny import llama

PROMPT = [3, 17, 40, 9, 23, 51, 5, 60, 12, 33, 8, 45, 19]


def moved(folder: Path, *dead: str) -> tuple[skeleton.PreTrainedModel, torch.Tensor]:
    """A trainer's model after every weight has moved, and what a server answers that did not see it in some modules."""
    weights = Weights(load_arena(folder))
    model = skeleton.build(folder, weights)
    generator = torch.Generator().manual_seed(0)
    for name in skeleton.bound(model):
        live = model.get_parameter(name).data
        live.add_(
            torch.randn(live.shape, generator=generator).to(live.dtype) * live.float().std().to(live.dtype)
        )
    stale = [name for name in skeleton.bound(model) if any(part in name for part in dead)]
    assert bool(stale) == bool(dead)
    with torch.no_grad(), skeleton.older(model, folder, stale):
        answer = trained_log_probabilities(model, PROMPT)
    return model, answer


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Qwen3-MoE", "Qwen3.5 dense text", "Qwen2.5-VL text"])
def test_the_module_that_the_server_does_not_read_is_named(family, tmp_path):
    """Also where transformers calls it otherwise than the checkpoint, stacks it, or transposes it."""
    (architecture,) = (one for one in ARCHITECTURES if one.name == family)
    folder = architecture.build(tmp_path / "model")
    names = skeleton.bound(skeleton.build(folder, Weights(load_arena(folder))))
    ends = ("up_proj.weight", "gate_up_proj", "c_fc.weight")
    module = next(name for name in names if ".1.mlp." in name and name.endswith(ends)).rpartition(".")[0]
    model, answer = moved(folder, f"{module}.")
    found = disagreement.suspects(model, folder, PROMPT, answer, trained_log_probabilities)
    assert found[0] == module


def test_modules_that_are_dead_together_are_named_together(tmp_path):
    """As what vLLM fuses is."""
    folder = llama(tmp_path / "model", torch.bfloat16)
    dead = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    model, answer = moved(folder, *dead)
    assert sorted(disagreement.suspects(model, folder, PROMPT, answer, trained_log_probabilities)) == dead


def test_nothing_is_named_where_nothing_explains_it(tmp_path):
    folder = llama(tmp_path / "model", torch.bfloat16)
    model, answer = moved(folder)
    assert disagreement.suspects(model, folder, PROMPT, answer.roll(1), trained_log_probabilities) == []


def test_the_live_weights_are_back_afterwards(tmp_path):
    folder = llama(tmp_path / "model", torch.bfloat16)
    model, answer = moved(folder, "up_proj")
    before = trained_log_probabilities(model, PROMPT)
    disagreement.suspects(model, folder, PROMPT, answer, trained_log_probabilities)
    disagreement.tolerance(model, [PROMPT], trained_log_probabilities)
    assert torch.equal(trained_log_probabilities(model, PROMPT), before)
    segment = skeleton.bound(model)
    assert all(not model.get_parameter(name).is_meta for name in segment)


def test_the_tolerance_follows_what_rounding_makes(tmp_path):
    """A model whose weights are ten times as large answers far more sharply, and differs by more in bf16."""
    folder = llama(tmp_path / "model", torch.bfloat16, num_hidden_layers=4)
    weights = Weights(load_arena(folder))
    model = skeleton.build(folder, weights)
    quiet = disagreement.tolerance(model, [PROMPT], trained_log_probabilities)
    model.get_parameter("model.norm.weight").data.mul_(10)
    loud = disagreement.tolerance(model, [PROMPT], trained_log_probabilities)
    assert loud > 3 * quiet


def test_rounding_alone_does_not_trip_on_a_short_text(tmp_path):
    """Eight tokens, as a short example has: their mean scatters, and every checkpoint is compared anew."""
    folder = llama(tmp_path / "model", torch.bfloat16)
    model = skeleton.build(folder, Weights(load_arena(folder)))
    choose = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 60, (9,), generator=choose).tolist() for _ in range(400)]
    tolerance = disagreement.FACTOR * disagreement.noise(model, prompts, trained_log_probabilities)
    plain = [trained_log_probabilities(model, prompt) for prompt in prompts]
    with disagreement.rounded(model):
        off = [trained_log_probabilities(model, prompt) for prompt in prompts]
    means = torch.stack([(a - b).abs().mean() for a, b in zip(plain, off, strict=True)])
    assert float(1.2 * means.max()) < disagreement.allowed(tolerance, torch.arange(8.0)) < 1.6 * tolerance
    assert disagreement.allowed(tolerance, torch.arange(100.0)) < 1.2 * tolerance


class Off:
    """Answers what the trainer computes, off by so many nats for each text."""

    url, longest = "http://off", served.MAX_PROBE_TOKENS

    def __init__(self, model: skeleton.PreTrainedModel, nats: list[float]) -> None:
        self._model, self._nats = model, nats

    def log_probabilities(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        return [
            trained_log_probabilities(self._model, prompt) + off
            for prompt, off in zip(prompts, self._nats, strict=True)
        ]


def test_short_texts_are_judged_together(tmp_path):
    folder = llama(tmp_path / "model", torch.bfloat16)
    model = skeleton.build(folder, Weights(load_arena(folder)))
    fixed, recent = [PROMPT], [PROMPT[i : i + 9] for i in range(4)]
    allowed = disagreement.allowed(disagreement.FLOOR, torch.arange(32.0))

    def check(*nats: float, tolerance: float = 0.0) -> served.Agreement:
        server = cast(served.Server, Off(model, list(nats)))
        return served.check(server, model, [fixed, recent, []], tolerance, folder)

    noise = disagreement.tolerance(model, [*fixed, *recent], trained_log_probabilities)
    assert noise < 2 * disagreement.FLOOR
    check(0, 2 * allowed, 0, 0, 0)
    with pytest.raises(VerificationError) as caught:
        check(0, 3 * noise, 0, 3 * noise, 3 * noise)
    assert [problem[:8] for problem in caught.value.problems[:-1]] == ["probe 1:", "probe 3:", "probe 4:"]
    with pytest.raises(VerificationError):
        check(3 * noise, 0, 0, 0, 0)
    with pytest.raises(VerificationError):
        check(0, 0, 0, 0, float("nan"))
    with pytest.raises(VerificationError, match="does not serve"):
        check(0, 0.02, 0.02, 0.02, 0.02, tolerance=0.01)


def test_tokens_of_one_log_probability_count_as_one():
    """A model that says the same whatever it reads is rounded once, however long the text: one step of a bf16 logit,
    all along, is no other memory."""
    same = torch.full((60,), -4.868)
    assert disagreement.allowed(0.0356, same) == disagreement.allowed(0.0356, same[:1]) > 0.0414 > 0.0356
    mixed = torch.cat((same, torch.linspace(-6, -1, 40)))
    assert disagreement.allowed(1.0, mixed) == pytest.approx(1 + 1.5 / 41**0.5)
