"""Tiny models of several families, as `tiny.llama` makes them, and plain autograd over them as the truth."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.pytorch_utils import Conv1D

from hogwild import as_served, rope, skeleton
from hogwild.encoding import Encoded
from hogwild.loss import bounded_loss, unlearning_limit
from tiny import SIZES, save

OMIT = object()
"""In place of a value: a setting of SIZES that this configuration does not take."""
DELTA_NET = {
    "head_dim": 8, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 9, "head_dim": 8},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3_next": {**DELTA_NET, "mlp_only_layers": [0, 1, 2, 3], "num_experts": 0},
    "qwen3_5_text": DELTA_NET,
    "falcon_h1": {
        "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 8,
    },
    "mamba2": {
        "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "intermediate_size": OMIT,
    },
    "mamba": {"hidden_size": 64, "state_size": 16, "intermediate_size": OMIT},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
}  # fmt: skip
UNUSUAL: dict[str, dict[str, Any]] = {
    "falcon": {  # adds to what a linear layer of its own kind gives it
        "new_decoder_architecture": False, "multi_query": False, "parallel_attn": True, "bias": True, "alibi": False,
    },
    "phimoe": {"num_local_experts": 4},  # routers that are linear layers by name
    "llama4_text": {
        "head_dim": 8, "num_hidden_layers": 4, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 1, 0],
    },
    "gemma3n_text": {  # a layer takes more than one tensor with a gradient
        "head_dim": 8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 7, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
        "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "head_dim": 8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 7, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    "zamba2": {  # two layers share a block
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_headdim": 16,
        "mamba_ngroups": 1, "mamba_expand": 2, "n_mamba_heads": 4, "num_mem_blocks": 1, "adapter_rank": 4,
    },
}  # fmt: skip
"""Families that do with their layers what no other does."""
ATTENTION = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"]
RECURRENT = ["qwen3_next", "qwen3_5_text", "falcon_h1", "mamba2"]
MAMBA = ["falcon_h1", "mamba2"]
"""Those of them whose truth has no place to cut Mamba's own vectors."""
INEXACT = ["mamba", "jamba"]
"""transformers goes on from their state with several tokens as if there were none, so their context is not frozen."""


def build(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    given = {**SIZES, "tie_word_embeddings": True, **{**FAMILIES, **UNUSUAL}[family], **settings}
    config = AutoConfig.for_model(
        family, **{name: value for name, value in given.items() if value is not OMIT}
    )
    kind = type(AutoModelForCausalLM.from_config(config))
    return save(kind, config, folder, dtype, seed=1)


class Truth:
    """Plain transformers and plain autograd over one whole text.

    Attributes:
        loss: mean negative log-likelihood of the trained tokens.
        logits: (trained tokens, vocabulary).
        gradients: name -> gradient of every parameter that has one.
    """

    def __init__(
        self,
        folder: Path,
        example: Encoded,
        constants: Literal["none", "linear", "everywhere", "read"],
        dtype: torch.dtype | Literal["auto"] = "auto",
        weight: float = 1.0,
    ) -> None:
        """Where tokens that predict nothing trained are detached: nowhere, at the output of every linear layer, or
        also at that of norms and convolutions and on their way into the recurrence. "read": those before the first
        trained one are read without gradient, into transformers' own cache."""
        kind, config = _kind(folder)
        model = kind.from_pretrained(folder, config=copy.deepcopy(config), dtype=dtype)
        as_served.adjust(model)
        rope.fix(model)
        ids, wanted = example.ids, torch.tensor(example.trained[1:])
        start = example.trained.index(True) - 1 if constants == "read" else 0
        constant = ~wanted if constants in ("linear", "everywhere") else torch.zeros_like(wanted)
        for name, module in model.named_modules():
            leaf = not list(module.children()) and any(True for _ in module.parameters())
            cut = isinstance(module, nn.Linear) if constants == "linear" else leaf
            wanted_here = cut and constants in ("linear", "everywhere")
            if wanted_here and not isinstance(module, nn.Embedding) and "lm_head" not in name:
                module.register_forward_hook(lambda _m, _i, out: _cut(out, constant))
        with _recurrences_cut(constant) if constants == "everywhere" else nullcontext():
            cache = _read(model, ids[:start]) if start else {"use_cache": False}
            self._logits = model(torch.tensor([ids[start:-1]]), **cache).logits[0][wanted[start:]]
        targets = torch.tensor(ids[1:])[wanted]
        nll = nn.functional.cross_entropy(self._logits.float(), targets, reduction="none")
        vocabulary = model.config.get_text_config().vocab_size
        bounded_loss(nll, weight, unlearning_limit(5.0, vocabulary)).backward()
        self.loss, self.logits = float(nll.detach().mean()), self._logits.detach()
        self.gradients = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):  # a linear layer whose weight lies transposed
                self.gradients[f"{name}.weight"] = self.gradients[f"{name}.weight"].t()


@functools.lru_cache(maxsize=1)
def _kind(folder: Path) -> tuple[Any, Any]:
    """The class of a model, and its configuration as it is served."""
    empty = skeleton.empty(folder)
    return type(empty), empty.config


@torch.no_grad()
def _read(model: Any, ids: list[int]) -> dict[str, Any]:
    """What a model takes to go on from these tokens."""
    accepted = inspect.signature(model.base_model.forward).parameters
    name = next(one for one in ("cache", "past_key_values", "cache_params") if one in accepted)
    return {name: model(torch.tensor([ids]), use_cache=True)[name], "use_cache": True}


def _cut(out: Any, constant: torch.Tensor) -> Any:
    """Constant tokens detached; they lie along the first dimension of their number, or are rows of (tokens * heads,
    width). So no text may have as many tokens as a model has heads."""
    if isinstance(out, tuple):  # a router's
        return tuple(_cut(one, constant) for one in out)
    if out.ndim == 2:
        shape = [len(out), 1]
        mask = constant.repeat_interleave(len(out) // len(constant))
    else:
        shape = [1] * out.ndim
        shape[list(out.shape).index(len(constant), 1)] = len(constant)
        mask = constant
    return torch.where(mask.view(shape), out.detach(), out)


@contextmanager
def _recurrences_cut(constant: torch.Tensor) -> Iterator[None]:
    """The Gated-DeltaNet functions of transformers with constant tokens detached on their way in."""
    modules = [modeling_qwen3_next, modeling_qwen3_5]
    before = [
        (m, n, getattr(m, n)) for m in modules for n in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    ]

    def rule(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any, *, g: Any, beta: Any, **rest: Any) -> Any:
            q, k, v, g, beta = (_cut(each, constant) for each in (q, k, v, g, beta))
            return plain(q, k, v, g=g, beta=beta, **rest)

        return call

    def convolution(plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **rest: _cut(plain(*arguments, **rest), constant)

    for module, name, plain in before:
        setattr(module, name, rule(plain) if "rule" in name else convolution(plain))
    try:
        yield
    finally:
        for module, name, plain in before:
            setattr(module, name, plain)
