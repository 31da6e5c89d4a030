"""A Hugging Face model around the live weights: it owns none of them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from families import build
from hogwild import skeleton
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.errors import VerificationError
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from test_trainer import EXAMPLE, OTHER
from tiny import llama, qwen2

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
IDS = torch.tensor([[3, 9, 27, 4, 12, 36, 5]])
MODELS = {
    "tied": lambda folder: llama(folder, torch.bfloat16),
    "untied": lambda folder: llama(folder, torch.float32, tie_word_embeddings=False),
    "biases": lambda folder: qwen2(folder, torch.bfloat16),
    "biases untied": lambda folder: qwen2(folder, torch.float32, tie_word_embeddings=False),
}


def without(arena: Arena, *names: str, frozen: dict[str, str] | None = None) -> Weights:
    """The arena as a server would offer it that keeps no plain copy of these tensors."""
    tensors = {name: region for name, region in arena.layout.tensors.items() if name not in names}
    return Weights(
        Arena(arena.weights, arena.control, replace(arena.layout, tensors=tensors, frozen=frozen or {}))
    )


@pytest.fixture(params=MODELS)
def folder(request, tmp_path: Path) -> Path:
    return MODELS[request.param](tmp_path / "model")


@torch.no_grad()
def test_every_parameter_lies_in_the_arena_and_the_model_is_the_checkpoints(folder):
    weights = Weights(load_arena(folder))
    model = skeleton.build(folder, weights)
    segment = weights.arena.weights
    for name, parameter in model.named_parameters():
        assert segment.base <= parameter.data_ptr() < segment.base + segment.nbytes, name
        assert not parameter.requires_grad, name
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


@torch.no_grad()
def test_what_is_written_to_the_arena_is_what_the_model_computes(folder):
    weights = Weights(load_arena(folder))
    model, other = skeleton.build(folder, weights), skeleton.build(folder, weights)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    before = model(IDS).logits
    for name, parameter in reference.named_parameters():
        parameter.mul_(1.25)
        weights.view(name).copy_(parameter)
    after = model(IDS).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, reference(IDS).logits)
    assert torch.equal(after, other(IDS).logits)


@torch.no_grad()
def test_logits_of_attention_are_capped_as_the_server_caps_them(tmp_path):
    """The kernel that transformers takes if nobody says otherwise leaves it out."""
    folder = build("gemma2", tmp_path / "model", attn_logit_softcapping=0.5)
    model = skeleton.build(folder, Weights(load_arena(folder)))
    capped, plain = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=how)(IDS).logits
        for how in ("eager", "sdpa")
    )
    assert torch.allclose(model(IDS).logits, capped, atol=1e-5)
    assert not torch.allclose(capped, plain, atol=1e-2), "it makes a difference"


@torch.no_grad()
def test_a_tied_head_is_one_tensor(tmp_path):
    folder = MODELS["tied"](tmp_path / "model")
    model = skeleton.build(folder, Weights(load_arena(folder)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    folder = qwen2(tmp_path / "model")
    arena = load_arena(folder)
    region = arena.layout.tensors[NORM]
    weights = without(arena, UP, "model.layers.1.self_attn.q_proj.bias")
    weights.arena.layout.tensors[NORM] = replace(region, shape=(16,), stride=(1,))
    with pytest.raises(VerificationError) as caught:
        skeleton.build(folder, weights)
    assert sorted(caught.value.problems) == [
        f"{UP}: needed by Qwen2ForCausalLM, not served",
        "model.layers.1.self_attn.q_proj.bias: needed by Qwen2ForCausalLM, not served",
        f"{NORM}: (32,) in the model, (16,) served",
    ]


def test_a_model_whose_embeddings_are_not_served_is_refused_tied_or_not(tmp_path):
    for name in ("tied", "untied"):
        folder = MODELS[name](tmp_path / name)
        with pytest.raises(VerificationError, match=r"embed_tokens\.weight"):
            skeleton.build(folder, without(load_arena(folder), "model.embed_tokens.weight"))


@torch.no_grad()
def test_a_frozen_tensor_comes_from_the_checkpoint_and_is_nobody_elses(tmp_path):
    folder = MODELS["untied"](tmp_path / "model")
    arena = load_arena(folder)
    Weights(arena).view(UP).zero_()  # what the server keeps there is not plain
    weights = without(arena, UP, frozen={UP: "packed"})
    model = skeleton.build(folder, weights)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    own = model.get_parameter(UP)
    assert not arena.weights.base <= own.data_ptr() < arena.weights.base + arena.weights.nbytes


# --- which layers are linear ------------------------------------------------------------------------------------------


class _InItsOwnWords(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden @ self.weight.T
        return out if self.bias is None else out + self.bias


class _Same(nn.Linear):
    pass


class _Router(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(hidden)
        return scores, scores.argmax(-1)


class _Scaled(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 1.01


class _OfGroups(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gn,gmn->...gm", hidden, self.weight.view(2, -1, hidden.shape[-1]))


class _WithMore(nn.Linear):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_what_computes_the_product_whatever_it_is_called(bias):
    kinds = [nn.Linear, skeleton.FrozenLinear, _Same, _InItsOwnWords]
    others = [_Router, _Scaled, _OfGroups, _WithMore]
    found = {kind for kind in [*kinds, *others] if skeleton.is_linear(kind(12, 8, bias=bias))}
    assert found == set(kinds)
    assert skeleton.is_linear(_InItsOwnWords(12, 8, bias=bias).to("meta"))
    assert not skeleton.is_linear(nn.Embedding(12, 8))


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_router_that_is_a_linear_layer_by_name_is_said_to_be_frozen(tmp_path, family, dtype):
    folder = build(family, tmp_path / "model", dtype)
    weights = Weights(load_arena(folder))
    model = skeleton.build(folder, weights)
    trainer = Trainer(
        model, Optimizer(OptimizerConfig(rank=4), seed=0), Progress(weights.arena.control, 4),
        set(skeleton.bound(model)), "frozen", seed=0,
    )  # fmt: skip
    routers = {name: kind for name, kind in kinds(model).items() if kind.endswith("Router")}
    assert routers
    for name, kind in routers.items():
        why = f"a matrix of {kind}, which is not a linear layer"
        assert trainer.frozen[f"{name}.weight"] == why
    assert not trainer.step([Item(EXAMPLE), Item(OTHER)]).skipped


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_older_weights_are_those_of_the_checkpoint_though_they_lie_transposed_there(tmp_path):
    """GPT-2 has square ones too."""
    folder = build("gpt2", tmp_path)
    weights = Weights(load_arena(folder))
    model = skeleton.build(folder, weights)
    came = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in weights.names:
        weights.view(name).mul_(2)
    with skeleton.older(model, folder, came):
        now = dict(model.named_parameters())
        assert [name for name, tensor in came.items() if not torch.equal(now[name], tensor)] == []


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_what_is_frozen_is_of_the_type_that_is_served_whatever_the_checkpoint_has(tmp_path, family):
    """As of a checkpoint in fp32, which vLLM serves in bf16."""
    folder, frozen = (
        build(family, tmp_path / "wide", tie_word_embeddings=False),
        ("lm_head", "query_key_value"),
    )
    came = load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "served")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in came.items()}
    save_file(rounded, tmp_path / "served" / "model.safetensors", {"format": "pt"})
    arena = load_arena(tmp_path / "served")
    gone = {name for name in rounded if any(part in name for part in frozen)}
    live = {name: region for name, region in arena.layout.tensors.items() if name not in gone}
    layout = replace(arena.layout, tensors=live, frozen=dict.fromkeys(gone, "vLLM keeps it otherwise"))
    model = skeleton.build(folder, Weights(Arena(arena.weights, arena.control, layout)))
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 11, 17, 21]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, truth(ids).logits, rtol=0.02, atol=0.02)
