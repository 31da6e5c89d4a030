"""The architectures of the matrix: tiny random checkpoints, built from the configurations of transformers.

To add one, add a line to ARCHITECTURES: see docs/models.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tiny import save

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DELTA_NET = {
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 32,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
OMIT = object()
"""In place of a value: a setting of SIZES that this configuration does not take."""
MLA = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_key_value_heads": 2, "first_k_dense_replace": 3, "n_routed_experts": 4, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "head_dim": 64,
}  # fmt: skip
MAMBA = {"state_size": 16, "intermediate_size": OMIT}
NO_SCAN = "no attribute 'selective_scan_fwd'"
"""vLLM's builds for CPUs lack the kernel of the first Mamba."""
VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4, "out_hidden_size": 64,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "window_size": 16,
}  # fmt: skip
VISION_TOKENS = {
    "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: as the table prints it.
        model_type: of transformers' configuration.
        row: what it stands for: "dense", "delta-net", "experts", "hybrid", "vision", "mla", "copied" or "refused".
        settings: of the configuration, beyond SIZES.
        frozen: parts of the names of checkpoint tensors that are expected to be frozen; every other one must be live.
        refused: part of the message with which the server refuses it; "": it serves.
        unserved: part of what is found where vLLM itself, on a CPU, cannot serve it or serves another model.
        vllm: arguments of the server.
        published: the class that published checkpoints name, where transformers calls it otherwise.
        head: for a model with tied embeddings, what the checkpoint stores as its head all the same ("same", "other").
        short: also part of the short selection that every change runs.
    """

    name: str
    model_type: str
    row: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    refused: str = ""
    unserved: str = ""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    head: str = ""
    short: bool = False

    def build(self, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Path:
        """Save a checkpoint with random weights."""
        settings = dict(self.settings)
        quantization = settings.pop("quantization_config", None)
        if "text_config" in settings:
            settings["text_config"] = {**SIZES, **settings["text_config"]}
            config = AutoConfig.for_model(self.model_type, **settings)
            kind: Any = AutoModelForImageTextToText
        else:
            given = {name: value for name, value in {**SIZES, **settings}.items() if value is not OMIT}
            config = AutoConfig.for_model(self.model_type, **given)
            kind = AutoModelForCausalLM
        save(type(kind.from_config(config)), config, folder, dtype, seed)
        stated: dict[str, Any] = {}
        if quantization is not None:  # what is refused for its configuration needs no weights of that kind
            stated["quantization_config"] = quantization
        if self.published:
            stated["architectures"] = [self.published]
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
        if self.head:
            tensors = load_file(file := folder / "model.safetensors")
            embedding = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = (
                embedding.clone() if self.head == "same" else embedding.flip(0).contiguous()
            )
            save_file(tensors, file, {"format": "pt"})
        return folder


def _dense(name: str, model_type: str, *, short: bool = False, **settings: Any) -> Architecture:
    return Architecture(name, model_type, "dense", settings, short=short)


_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + i / 8 for i in range(16)], "long_factor": [4.0 + i for i in range(16)],
}  # fmt: skip
"""Of heads of 32. Of the matrix's texts one is shorter than that, and one longer."""
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

ARCHITECTURES = [
    _dense("Llama", "llama", tie_word_embeddings=False, short=True),
    _dense("Llama, tied", "llama", tie_word_embeddings=True),
    _dense("Llama, longrope, long factors", "llama", short=True,
           rope_parameters={**_LONGROPE, "factor": 2.0, "attention_factor": 1.5}),
    Architecture("Llama, longrope, short factors", "llama", "dense", {
        "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 64, "short_mscale": 1.1},
    }, vllm={"max_model_len": 48}),
    _dense("Llama, dynamic", "llama", rope_parameters={**_DYNAMIC, "max_trained_positions": 64}),
    Architecture("Llama, dynamic, longer texts", "llama", "refused", {
        "rope_parameters": _DYNAMIC, "max_position_embeddings": 64,
    }, refused="serve with --max-model-len 64", short=True),
    _dense("HunYuan, dynamic by alpha", "hunyuan_v1_dense", rope_parameters={**_DYNAMIC, "alpha": 20.0}),
    Architecture("Llama, tied, head stored twice", "llama", "dense", {"tie_word_embeddings": True}, head="same",
                 frozen=("lm_head",), short=True),
    Architecture("Llama, tied, another head stored", "llama", "dense", {"tie_word_embeddings": True}, head="other",
                 short=True),
    _dense("Qwen2", "qwen2", tie_word_embeddings=True),
    _dense("Qwen3", "qwen3", tie_word_embeddings=False),
    _dense("Mistral", "mistral", sliding_window=9),
    _dense("Gemma", "gemma", tie_word_embeddings=True),
    _dense("Gemma 2", "gemma2", sliding_window=16, query_pre_attn_scalar=32, tie_word_embeddings=True,
           attn_logit_softcapping=2.0),
    _dense(
        "Gemma 3 text", "gemma3_text", sliding_window=16, query_pre_attn_scalar=32, short=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    _dense("Phi", "phi"),
    _dense("Phi-3", "phi3", short=True),
    _dense("Phi-3, longrope", "phi3", original_max_position_embeddings=16, rope_parameters=_LONGROPE),
    _dense("OLMo 2", "olmo2"),
    _dense("GPT-2", "gpt2", n_embd=64, n_layer=3, n_head=2, n_positions=256, short=True),
    _dense("GPT-NeoX", "gpt_neox", short=True, tie_word_embeddings=False, num_key_value_heads=OMIT, head_dim=OMIT),
    _dense("GPT-J", "gptj", n_embd=64, n_layer=3, n_head=2, n_positions=256, rotary_dim=16),
    _dense("StableLM", "stablelm"),
    _dense("Cohere", "cohere"),
    _dense("Cohere 2", "cohere2", sliding_window=16, sliding_window_pattern=3),
    _dense("Granite", "granite"),
    _dense("GLM-4", "glm4", short=True),
    _dense("SmolLM3", "smollm3"),
    _dense("Starcoder2", "starcoder2"),
    _dense("OPT", "opt", ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=256),
    Architecture("Qwen3.5 dense text", "qwen3_5_text", "delta-net", DELTA_NET, short=True),
    Architecture(
        "Qwen3-Next", "qwen3_next", "delta-net",
        {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    Architecture("Qwen3-MoE", "qwen3_moe", "experts", EXPERTS, short=True),
    Architecture("Mixtral", "mixtral", "experts", {"num_local_experts": 4}),
    Architecture("OLMoE", "olmoe", "experts", {**EXPERTS, "intermediate_size": 32, "norm_topk_prob": False}),
    Architecture("Qwen2-MoE", "qwen2_moe", "experts", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    Architecture("Granite-MoE", "granitemoe", "experts", {"num_local_experts": 4}),
    Architecture("GLM4-MoE", "glm4_moe", "experts", {
        **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1,
    }),
    Architecture("Granite hybrid", "granitemoehybrid", "hybrid", {
        "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32,
        "mamba_n_groups": 1, "mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
    }, frozen=("A_log",)),
    Architecture("Falcon-H1", "falcon_h1", "hybrid", {
        "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    }, frozen=("A_log",), short=True),
    Architecture("Mamba 2", "mamba2", "hybrid", {
        "num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 1, "expand": 2, "chunk_size": 16,
        "intermediate_size": OMIT,
    }, frozen=("A_log",)),
    Architecture("Nemotron-H", "nemotron_h", "hybrid", {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "num_hidden_layers": 4, "mamba_num_heads": 4,
        "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1, "chunk_size": 16,
    }, frozen=("A_log",)),
    Architecture("Phi-MoE", "phimoe", "experts", {"num_local_experts": 4}, published="PhiMoEForCausalLM"),
    Architecture("Phi-MoE, longrope", "phimoe", "experts", {
        "num_local_experts": 4,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.25},
    }, published="PhiMoEForCausalLM"),
    Architecture("Llama 4 text", "llama4_text", "copied", {
        "num_hidden_layers": 4, "num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 32,
        "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0],
    }, frozen=("q_proj", "k_proj"), vllm={"block_size": 32}),
    Architecture("Gemma 3n text", "gemma3n_text", "dense", {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 32, "altup_num_inputs": 2, "laurel_rank": 32,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4,
    }, unserved="embed_tokens_per_layer.weight: vLLM does not read it"),
    Architecture("Gemma 4 text", "gemma4_text", "dense", {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
        "num_kv_shared_layers": 0,
    }, frozen=("layer_scalar",)),
    Architecture("Zamba 2", "zamba2", "hybrid", {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 32, "mamba_headdim": 32,
        "mamba_ngroups": 1, "mamba_expand": 2, "n_mamba_heads": 4, "num_mem_blocks": 1, "adapter_rank": 32,
        "head_dim": 64, "num_key_value_heads": 2,
    }, frozen=("A_log",)),
    Architecture("Mamba", "mamba", "hybrid", MAMBA, frozen=("A_log",), unserved=NO_SCAN),
    Architecture("Falcon-Mamba", "falcon_mamba", "hybrid", MAMBA, frozen=("A_log",), unserved=NO_SCAN),
    Architecture("Jamba", "jamba", "hybrid", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1,
        "mamba_d_state": 16, "mamba_dt_rank": 32,
    }, frozen=("A_log",), unserved=NO_SCAN),
    Architecture("Qwen2.5-VL text", "qwen2_5_vl", "vision", {
        "text_config": {"rope_parameters": _MROPE}, "vision_config": VISION, **VISION_TOKENS,
    }, frozen=("visual",), vllm={"language_model_only": True}),
    Architecture("Qwen3-VL text", "qwen3_vl", "vision", {
        "text_config": {"rope_parameters": {**_MROPE, "mrope_interleaved": True}}, "vision_config": VISION,
        **VISION_TOKENS,
    }, frozen=("visual",), vllm={"language_model_only": True}),
    Architecture("Qwen3.5-VL text", "qwen3_5", "vision", {
        "text_config": DELTA_NET, "vision_config": VISION, **VISION_TOKENS,
    }, frozen=("visual",), vllm={"language_model_only": True}, short=True),
    Architecture(
        "DeepSeek-V2, CPU_MLA", "deepseek_v2", "mla", MLA,
        vllm={"compilation_config": {"custom_ops": ["-rotary_embedding"]}, "attention_backend": "CPU_MLA"},
    ),
    Architecture(
        "DeepSeek-V2, wrong backend", "deepseek_v2", "mla", MLA, refused="--compilation-config", short=True,
    ),
    Architecture(
        "BLOOM", "bloom", "copied", {"n_layer": 3, "n_head": 2}, frozen=("query_key_value",), short=True,
    ),
    Architecture("Falcon (older)", "falcon", "copied", {
        "head_dim": OMIT, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": True, "bias": True,
        "alibi": False,
    }, frozen=("query_key_value",)),
    Architecture("gpt-oss", "gpt_oss", "copied", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4, "sliding_window": 16,
    }, refused="serve a model whose experts are gated by SiLU"),
    Architecture("Llama, fp8", "llama", "refused", {"quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
    }}, refused="in bf16 or fp16, without --quantization", short=True),
    Architecture("Llama, AWQ", "llama", "refused", {"quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }}, refused="in bf16 or fp16, without --quantization"),
    Architecture("Llama, with LoRA", "llama", "refused", vllm={"enable_lora": True},
                 refused="serve without --enable-lora", short=True),
]  # fmt: skip
