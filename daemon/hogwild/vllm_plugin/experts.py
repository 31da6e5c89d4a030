"""The experts of a mixture multiply with their weights as they lie, on a CPU."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from hogwild.errors import VerificationError
from hogwild.vllm_plugin.patch import Patch, looks_like
from hogwild.vllm_plugin.plain import library
from hogwild_kernels.linear import plain_linear

_process, _apply = CPUUnquantizedExperts.process_weights_after_loading, CPUUnquantizedExperts.apply
_APPLY = [
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
]  # fmt: skip


def plain_experts(
    x: torch.Tensor,  # (T, n)
    w13: torch.Tensor,  # (experts, 2 * inner, n): gate above up
    w2: torch.Tensor,  # (experts, n, inner)
    b13: torch.Tensor | None,  # (experts, 2 * inner)
    b2: torch.Tensor | None,  # (experts, n)
    weights: torch.Tensor,  # (T, k) of each token's experts
    ids: torch.Tensor,  # (T, k) which they are
    activation: str,
    weigh_input: bool,  # the router's weight is in x already
) -> torch.Tensor:  # (T, n)
    """Sum over a token's experts of weight * W2 activation(W13 x), in fp32, rounded once."""
    y = torch.zeros(x.shape, dtype=torch.float32)
    for expert in torch.unique(ids).tolist():
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        h = plain_linear(x[tokens], w13[expert], None if b13 is None else b13[expert])
        inner = h.new_empty(len(tokens), w2.shape[2])
        apply_moe_activation(MoEActivation(activation), inner, h)
        part = plain_linear(inner, w2[expert], None if b2 is None else b2[expert]).float()
        if not weigh_input:
            part *= weights[tokens, place, None]
        y.index_add_(0, tokens, part)
    return y.to(x.dtype)


library.define(  # type: ignore[no-untyped-call]  # torch leaves it untyped
    "plain_experts(Tensor x, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, Tensor weights, Tensor ids, "
    "str activation, bool weigh_input) -> Tensor"
)
library.impl("plain_experts", plain_experts, "CPU")  # type: ignore[no-untyped-call]  # torch leaves it untyped


@torch.library.register_fake(  # type: ignore[untyped-decorator]  # torch leaves it untyped
    "hogwild::plain_experts", lib=library
)
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(self: Any, layer: Any) -> None:
    """Neither pad nor pack.

    Raises:
        VerificationError: experts of a kind that is not computed here.
    """
    if (kind := layer.activation) not in (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH):
        raise VerificationError(
            "this server cannot be trained",
            [
                f"its experts' activation is {kind.value} (gpt-oss), and their weights are kept interleaved: serve a "
                "model whose experts are gated by SiLU or GELU, or one without experts"
            ],
        )
    self._use_zentorch = False


def _apply_plain(
    self: Any, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: Any, *rest: Any, **named: Any,
) -> None:  # fmt: skip
    """An operator, so that torch.compile leaves it whole."""
    given = dict(zip(_APPLY[8:], rest, strict=False)) | named
    output.copy_(
        torch.ops.hogwild.plain_experts(
            hidden_states, w1, w2, self.w1_bias, self.w2_bias, topk_weights, topk_ids, activation.value,
            bool(given["apply_router_weight_on_input"]),
        )
    )  # fmt: skip


def _install() -> None:
    CPUUnquantizedExperts.process_weights_after_loading = _keep
    CPUUnquantizedExperts.apply = _apply_plain


PATCH = Patch(
    name="plain experts",
    replaces="vllm/model_executor/layers/fused_moe/experts/cpu_moe.py: CPUUnquantizedExperts, its "
    "process_weights_after_loading and apply",
    why="vLLM packs the experts' weights into copies: what is trained would not be served",
    until="vLLM can be told to keep CPU experts unpacked",
    differs=lambda: (
        looks_like(_process, ["self", "layer"], "cpu_prepack_moe_weight(layer.w13_weight, self.isa)")
        or looks_like(_apply, _APPLY, "self.w1_bias, self.w2_bias")
    ),
    install=_install,
)
