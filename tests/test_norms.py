"""RMS norms as one kernel: which ones, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from families import FAMILIES, build
from hogwild import norms
from hogwild.trainer import Item
from test_trainer import EXAMPLE, OTHER, Setting
from tiny import llama

PLAIN = {"llama": 5, "qwen2": 5, "mistral": 5, "qwen3": 9}
"""family -> RMS norms of a model with two layers: two in each, the last one, and those of queries and keys."""


class Operators(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def passed(folder: Path, dtype: torch.dtype, fuse: bool) -> dict[str, torch.Tensor]:
    """The logits of a model whose weights are bf16 numbers, and its gradients, after one pass in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype)
    if fuse:
        found = norms.fuse(model)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        family = model.config.model_type
        if family in PLAIN:
            assert len(found) == PLAIN[family]
            assert set(found) == {name for name, kind in kinds.items() if kind.endswith("RMSNorm")}
        assert not family.startswith(("gemma", "gpt2")) or not found, "1 + weight, or no RMS norms"
    ids = torch.tensor([EXAMPLE.ids])
    out = model(ids, labels=ids)
    out.loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"logits": out.logits.detach(), **gradients}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_what_it_said_and_its_gradients_are_the_same(tmp_path, family):
    folder = build(family, tmp_path / "model", torch.bfloat16)
    plain = passed(folder, torch.float32, fuse=False)
    fused = passed(folder, torch.float32, fuse=True)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_in_16_bits_it_is_as_exact_as_before(tmp_path, family):
    folder = build(family, tmp_path / "model", torch.bfloat16)
    truth = passed(folder, torch.float32, fuse=False)
    plain, fused = (passed(folder, torch.bfloat16, fuse=fuse) for fuse in (False, True))

    def error(of: dict[str, torch.Tensor]) -> float:
        relative = [(of[name].float() - true).norm() / true.norm() for name, true in truth.items()]
        return float(torch.stack(relative).mean())

    assert 0 < error(fused) < 1.2 * error(plain)


class _Gated(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden) * (1 if gate is None else gate)


class _Shifted(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 1e-2


class _OtherEpsilon(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.eps, self.variance_epsilon = 1e-6, 1e-5

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class _OfHeads(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.view(1, 3, 3, -1))


@pytest.mark.parametrize("kind", [_Gated, _Shifted, _OtherEpsilon, _OfHeads])
def test_what_computes_something_else_is_left_alone(kind):
    assert norms.fuse(nn.Sequential(kind(8), nn.LayerNorm(8), nn.Linear(8, 8))) == []
    assert norms.fuse(nn.Sequential(LlamaRMSNorm(8))) == ["0"]


def test_other_activations_than_weights_are_left_to_transformers():
    norm = LlamaRMSNorm(8).to(torch.bfloat16)
    x = torch.randn(3, 8)
    expected = norm(x)
    norms.fuse(nn.Sequential(norm))
    assert torch.equal(norm(x), expected)


def test_norms_are_trained_as_before(tmp_path):
    folder = llama(tmp_path / "model")
    plain, fused = Setting(folder, rounding="nearest"), Setting(folder, rounding="nearest")
    norms.fuse(fused.trainer.model)
    for _ in range(2):
        for setting in (plain, fused):
            setting.trainer.step([Item(EXAMPLE), Item(OTHER)])
    after = fused.snapshot()
    for name, weight in plain.snapshot().items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_on_a_device_a_norm_is_one_kernel_each_way():
    norm = LlamaRMSNorm(256).to("cuda", torch.bfloat16)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = norm(x)
    norms.fuse(nn.Sequential(norm))
    with Operators() as operators:
        out = norm(x)
        out.sum().backward()
    assert operators.found.count("_fused_rms_norm") == 1
    assert operators.found.count("_fused_rms_norm_backward") == 1
    assert "rsqrt" not in operators.found
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.01)


@pytest.mark.gpu
def test_a_trainer_on_a_device_has_them(tmp_path: Path):
    from hogwild.weights import load_arena

    folder = llama(tmp_path / "model", dtype=torch.bfloat16)
    setting = Setting(folder, arena=load_arena(folder, "cuda"))
    with Operators() as operators:
        setting.trainer.step([Item(EXAMPLE)])
    assert operators.found.count("_fused_rms_norm_backward") == 5
    assert "rsqrt" not in operators.found
