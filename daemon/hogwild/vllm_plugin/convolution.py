"""Gated DeltaNet's convolution reads the weight as it lies, on a CPU whose kernel wants it packed."""

import inspect
from typing import Any

import torch
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import (
    causal_conv1d_fn_cpu,
    causal_conv1d_update_cpu,
)

from hogwild.vllm_plugin.patch import Patch, looks_like

_forward, _update = gdn_attention._causal_conv1d_fwd_cpu, gdn_attention._causal_conv1d_update_cpu
_OLDER = "is_vnni" in inspect.signature(_forward).parameters  # vLLM 0.31
_PACKED = "is_vnni" if _OLDER else "is_weight_packed"
"""What the caller believes of the weight. Here it is plain."""
_FORWARD = [
    "x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state", "silu_activation",
    _PACKED,
]  # fmt: skip
_UPDATE = [
    "x", "conv_states", "weight", "bias", "silu_activation", "conv_state_indices", _PACKED, "num_accepted_tokens",
]  # fmt: skip


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(weight.size(0), weight.size(-1))  # (d, 1, width) -> (d, width)


def _forward_plain(
    *, x: torch.Tensor, weight: torch.Tensor, conv_states: torch.Tensor, silu_activation: bool, **rest: Any,
) -> torch.Tensor:  # fmt: skip
    """Prefill."""
    del rest[_PACKED]
    result: torch.Tensor = causal_conv1d_fn_cpu(
        x=x, weight=_plain(weight), conv_states=conv_states, activation="silu" if silu_activation else None, **rest
    )  # fmt: skip
    return result


def _update_plain(
    *, x: torch.Tensor, conv_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    silu_activation: bool, conv_state_indices: torch.Tensor, num_accepted_tokens: torch.Tensor | None = None,
    **packed: bool,
) -> torch.Tensor:  # fmt: skip
    """Decode."""
    if (
        num_accepted_tokens is not None
    ):  # speculative decoding: only the kernel knows how, and it packs for itself
        speculated: torch.Tensor = _update(
            x=x, conv_states=conv_states, weight=_plain(weight), bias=bias, silu_activation=silu_activation,
            conv_state_indices=conv_state_indices, num_accepted_tokens=num_accepted_tokens,
            **dict.fromkeys(packed, False),
        )  # fmt: skip
        return speculated
    result: torch.Tensor = causal_conv1d_update_cpu(
        x=x, conv_state=conv_states, weight=_plain(weight), bias=bias,
        activation="silu" if silu_activation else None, conv_state_indices=conv_state_indices,
    )  # fmt: skip
    return result


def _install() -> None:
    gdn_attention._causal_conv1d_fwd_cpu = _forward_plain
    gdn_attention._causal_conv1d_update_cpu = _update_plain


def _differs() -> str:
    return (
        looks_like(_forward, _FORWARD)
        or looks_like(_update, _UPDATE)
        or looks_like(
            gdn_attention._cpu_gdn_attention_nonspec,
            ["layer", "attn_metadata_i", "mixed_qkv", "b", "a", "core_attn_out"],
            "_causal_conv1d_fwd_cpu( x=prefill_mixed_qkv",
            "_causal_conv1d_update_cpu( x=decode_mixed_qkv",
        )
    )


PATCH = Patch(
    name="plain convolution of Gated DeltaNet",
    replaces="vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py: _causal_conv1d_fwd_cpu, "
    "_causal_conv1d_update_cpu",
    why="on a CPU with AVX512-BF16 the kernel takes the plain weight for a packed one: silently wrong output",
    until="gdn_attention.py asks the layer whether its weight is packed, instead of writing that it is",
    differs=_differs,
    install=_install,
)
