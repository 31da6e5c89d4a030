"""Models in fp16, where it is multiplied as it is: small numbers are few there."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from families import Truth, build
from hogwild import skeleton
from hogwild.apollo import Optimizer
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from hogwild_kernels import UpdateResult, products

FAMILIES = ["llama", "gpt2", "gemma3n_text", "qwen3_5_text", "falcon_h1", "mamba2", "zamba2"]


class Recorded(Optimizer):
    """Keeps the gradient of each update."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(rank=4, lr=1e-3), 0)
        self.gradients: dict[str, torch.Tensor] = {}

    def update_linear(
        self, name: str, weight: Any, x: Any, d: Any, seed: int, *, one_scale: bool = False
    ) -> UpdateResult:
        self.gradients[name] = d.float().t() @ x.float()
        return super().update_linear(name, weight, x, d, seed, one_scale=one_scale)

    def update_small(self, name: str, weight: Any, gradient: Any, seed: int) -> UpdateResult:
        self.gradients[name] = gradient.float().clone()
        return super().update_small(name, weight, gradient, seed)

    def update_embedding(self, name: str, weight: Any, tokens: Any, rows: Any, seed: int) -> UpdateResult:
        whole = torch.zeros(weight.shape).index_add_(0, tokens, rows.float())
        self.gradients[name] = whole
        return super().update_embedding(name, weight, tokens, rows, seed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_token_is_worth_in_a_long_text_is_no_less_than_fp16_can_tell(
    tmp_path, monkeypatch, family, tied
):
    """One of a step of thousands of tokens, as a small weight makes of a short text: the gradient is that of fp32."""
    monkeypatch.setattr(products, "multiplies", lambda _dtype: True)  # or the CPU would compute in fp32
    folder = build(family, tmp_path, torch.float16, tie_word_embeddings=tied)
    weights, optimizer = Weights(load_arena(folder)), Recorded()
    model = skeleton.build(folder, weights)
    trainer = Trainer(
        model, optimizer, Progress(weights.arena.control, 4), set(skeleton.bound(model)), "full", seed=0,
        embeddings=True,
    )  # fmt: skip
    ids = torch.randint(3, 60, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    example, weight = Encoded(ids, [False] + [True] * 49), 1e-3
    result = trainer.step([Item(example, weight=weight)])
    assert not result.skipped
    truth = Truth(folder, example, "none", torch.float32, weight=weight)
    assert result.losses == pytest.approx([truth.loss], rel=0.01)
    assert len(optimizer.gradients) > 10
    for name, gradient in optimizer.gradients.items():
        wanted = truth.gradients[name]
        assert float(gradient.norm()) == pytest.approx(float(wanted.norm()), rel=0.05), name
        assert cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.995, name
