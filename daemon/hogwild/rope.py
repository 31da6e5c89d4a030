"""Rotary frequencies that follow from a length: those that the server has, for every text.

transformers computes them anew in every pass where a configuration says "dynamic" or "longrope", from the largest
position in the row: a short text beside a long one, or after it, then comes out otherwise than alone, and keys that
were read before a text grew long do not fit those after. A server that keeps keys cannot do that either. vLLM has one
set for all texts (vllm/model_executor/layers/rotary_embedding/, vLLM 0.32), and the trainer's model takes it over:

    longrope   the long factors if --max-model-len exceeds original_max_position_embeddings, or else the short ones
    dynamic    those of a text of max_position_embeddings, whatever --max-model-len says
"""

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


def fix(model: PreTrainedModel, max_model_len: int | None = None) -> None:
    """Give every text the frequencies that a server has which takes texts of up to `max_model_len` tokens.

    None: one that was not told, which is vLLM's default. May be called again, for another server; no pass may run.
    """
    for module, kind, parameters in _changing(model):
        frequencies, scaling = _served(module, kind, parameters, max_model_len)
        prefix = f"{kind}_" if kind else ""
        module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
        setattr(module, f"{prefix}attention_scaling", scaling)
        _settle(module, kind, parameters, frequencies, scaling)


def differs(model: PreTrainedModel, max_model_len: int | None) -> bool:
    """Would `fix` change what the model computes?"""
    for module, kind, parameters in _changing(model):
        frequencies, scaling = _served(module, kind, parameters, max_model_len)
        prefix = f"{kind}_" if kind else ""
        if scaling != getattr(module, f"{prefix}attention_scaling") or not torch.equal(
            frequencies, getattr(module, f"{prefix}inv_freq")
        ):
            return True
    return False


def fingerprint(model: PreTrainedModel) -> str:
    """Of what `fix` gave the model: what it computes under another one is not to be compared. Empty: nothing."""
    found = []
    for module, kind, _ in _changing(model):
        prefix = f"{kind}_" if kind else ""
        frequencies = getattr(module, f"{prefix}inv_freq").tolist()
        found.append(f"{prefix}{getattr(module, f'{prefix}attention_scaling')} {frequencies}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] if found else ""


def types(config: Any) -> set[str]:
    """The types of rotary embedding that the configuration of a language model names."""
    given = getattr(config, "rope_parameters", None) or {}
    return {
        name for one in (given, *given.values()) if isinstance(one, dict) and (name := one.get("rope_type"))
    }


def _changing(model: PreTrainedModel) -> Iterator[tuple[Any, str | None, Mapping[str, Any]]]:
    """Modules that would compute their frequencies anew, for which type of layer (None: for all), from what."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for kind in list(types) if isinstance(types, dict) else [None]:
            parameters = _parameters(model, kind)
            if isinstance(types, str | dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
                yield module, kind, parameters


def _parameters(model: PreTrainedModel, kind: str | None) -> Mapping[str, Any]:
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    found: Mapping[str, Any] = (given if kind is None else given.get(kind)) or {}
    return found


def _served(
    module: Any, kind: str | None, parameters: Mapping[str, Any], max_model_len: int | None
) -> tuple[torch.Tensor, float]:
    """(frequencies, factor of their sines and cosines) as vLLM has them."""
    before: torch.Tensor = getattr(module, f"{kind}_inv_freq" if kind else "inv_freq")
    size, base, longest = 2 * len(before), parameters["rope_theta"], module.config.max_position_embeddings
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    if parameters["rope_type"] == "dynamic":  # dynamic_ntk_alpha_rope.py, dynamic_ntk_scaling_rope.py
        if "alpha" in parameters:
            stretch = parameters["alpha"]
        else:
            factor, trained = parameters["factor"], parameters.get("max_trained_positions", longest)
            stretch = factor * longest / trained - (factor - 1)
        frequencies, scaling = 1.0 / (base * stretch ** (size / (size - 2))) ** exponents, 1.0
    else:  # phi3_long_rope_scaled_rope.py; transformers' `factor` and `attention_factor` it does not know
        original = parameters["original_max_position_embeddings"]
        side = "long" if (max_model_len or _default(module.config)) > original else "short"
        ratio = longest / original
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        scaling = parameters.get(f"{side}_mscale") or usual
        frequencies = 1.0 / (torch.tensor(parameters[f"{side}_factor"], dtype=torch.float) * base**exponents)
    return frequencies.to(before.device), scaling


def _default(config: Any) -> int:
    """What vLLM takes for --max-model-len of a "longrope" model when nobody says (vllm/config/model.py:
    _get_and_verify_max_len): a length of the model's own; one that is among the rotary parameters alone counts not."""
    return int(getattr(config, "original_max_position_embeddings", config.max_position_embeddings))


def _settle(
    module: Any, kind: str | None, parameters: Mapping[str, Any], frequencies: torch.Tensor, scaling: float
) -> None:
    """Have this module, and no other, never compute its frequencies anew."""
    if kind is not None:
        module.rope_type = {**module.rope_type, kind: "default"}
        return
    module.rope_type = "default"
    if hasattr(
        module, "rope_init_fn"
    ):  # Phi-MoE asks it in every pass, and its configuration for the scaling
        module.config = copy.copy(module.config)
        module.config.rope_parameters = {**parameters, "rope_type": "default"}
        module.rope_init_fn = lambda *_given, **_named: (frequencies, scaling)
