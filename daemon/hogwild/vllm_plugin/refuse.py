"""Servers whose weights cannot be trained, told so before a weight is read, and told what would work."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from hogwild import rope
from hogwild.errors import VerificationError
from hogwild.vllm_plugin.names import PAGE_VARIABLE, SOCKET_VARIABLE

_ROTARY = "-rotary_embedding"


def unsupported(vllm_config: VllmConfig, daemon: Path | None) -> None:
    """Raise one error for everything about this server that cannot be trained.

    Raises:
        VerificationError: with every reason, and what would work instead.
    """
    problems = list(_reasons(vllm_config, daemon))
    if problems:
        raise VerificationError("this server cannot be trained", problems)


def _reasons(vllm_config: VllmConfig, daemon: Path | None) -> Iterator[str]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if daemon is None:
        yield f"{SOCKET_VARIABLE} is not set: start the server with `hogwild vllm`, or set it yourself"
    if PAGE_VARIABLE not in os.environ and vllm_config.cache_config.enable_prefix_caching:
        # Without it, the process that looks into the cache does not install unsalted.py, and no request is salted.
        yield (
            "answers would come from cached keys and values of older weights: start the server with `hogwild vllm`, "
            "or with --no-enable-prefix-caching"
        )
    if parallel.world_size > 1:
        yield f"tensor or pipeline parallelism over {parallel.world_size} processes: use one"
    # An engine of a dense model goes by a size of 1, each by itself, and keeps its number alone.
    if parallel.data_parallel_size > 1 or getattr(parallel, "data_parallel_index", 0) > 0:
        yield (
            "data parallelism keeps a copy of the weights in each engine, and one copy is trained: serve without "
            "--data-parallel-size (--api-server-count is for more API servers)"
        )
    if model.quantization is not None:
        yield (
            f"{model.quantization} weights are not the weights that are trained: serve the model that they were made "
            "from, in bf16 or fp16, without --quantization"
        )
    if vllm_config.lora_config is not None:
        yield "LoRA adapters change what is served behind the trainer's back: serve without --enable-lora"
    if model.runner_type == "pooling":
        yield (
            "it gives embeddings or scores and no text, and its answers could not be compared with what is trained: "
            "serve a model that writes, without --runner pooling"
        )
    if overrides := _overrides(model.hf_overrides):
        yield (
            f"--hf-overrides changes {overrides} in what is served and not in what is trained: write that into "
            "config.json in the model's folder, or a copy of it, and serve without --hf-overrides"
        )
    if model.hf_config_path not in (None, model.model):
        yield (
            f"--hf-config-path {model.hf_config_path} describes what is served and not what is trained: put that "
            "config.json into the model's folder, or a copy of it, and serve without --hf-config-path"
        )
    if model.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        yield (
            f"--logprobs-mode {model.logprobs_mode} answers with other numbers than the log-probabilities that are "
            "compared with those of what is trained: serve without it"
        )
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        yield "another trainer's weights would replace those that are trained: serve without --weight-transfer-config"
    if model.enable_sleep_mode:
        yield "sleep mode moves the weights: serve without --enable-sleep-mode"
    if not current_platform.is_cpu() and _offloads(vllm_config):
        yield (
            "weights that are offloaded are in the memory of the CPU and not of the GPU: serve without "
            "--cpu-offload-gb and --offload-group-size"
        )
    if model.use_mla:
        yield from _mla(vllm_config)
    positions = getattr(model.hf_text_config, "max_position_embeddings", None)
    if "dynamic" in rope.types(model.hf_text_config) and positions and model.max_model_len > positions:
        # Not a number beyond them. Can go when dynamic_ntk_scaling_rope.py makes a row for each position that
        # _get_and_verify_max_len of vllm/config/model.py allows, and rope.py makes the same frequencies (vLLM 0.32).
        yield (
            f'vLLM makes "dynamic" rotary frequencies for {positions} positions alone, whatever their factor, and '
            f"reads beyond them in longer texts: serve with --max-model-len {positions}"
        )
    if model.is_moe and not current_platform.is_cpu() and vllm_config.kernel_config.moe_backend != "triton":
        yield "most MoE backends rearrange the experts' weights: serve with --moe-backend triton"


def _overrides(given: object) -> str:
    """What of a model's configuration a server was told otherwise; which of vLLM's classes computes it may differ."""
    names = set(given) - {"architectures"} if isinstance(given, dict) else {"something"} if given else set()
    return ", ".join(sorted(names))


def _offloads(vllm_config: VllmConfig) -> bool:
    """Does vLLM keep weights elsewhere, and bring them when they are wanted (vllm/config/offload.py, vLLM 0.32)?"""
    offload = getattr(vllm_config, "offload_config", None)
    by_need = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    ahead = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    return bool(by_need or ahead)


def _mla(vllm_config: VllmConfig) -> Iterator[str]:
    """Multi-head latent attention: most backends keep what they derive from kv_b_proj, and no longer read it."""
    if not current_platform.is_cpu():
        yield "MLA keeps copies of kv_b_proj that training would not reach: only CPU_MLA, on a CPU, reads it live"
        return
    backend = vllm_config.attention_config.backend
    named = backend.name if backend is not None else ""
    chosen = named or ("AMX_MLA" if torch.cpu._is_amx_tile_supported() else "CPU_MLA")
    if chosen != "CPU_MLA":
        yield f"{chosen} packs kv_b_proj for MLA: serve with --attention-backend CPU_MLA"
    if _ROTARY not in vllm_config.compilation_config.custom_ops:
        # csrc's CPU rotary operator takes the heads of a 3-D query for tokens. Can go when it agrees with
        # RotaryEmbedding.forward_native there (vllm/model_executor/layers/rotary_embedding/, vLLM 0.32).
        yield (
            "vLLM's CPU rotary embedding is wrong for MLA: serve with "
            f'--compilation-config \'{{"custom_ops": ["{_ROTARY}"]}}\''
        )
