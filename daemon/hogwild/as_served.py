"""Where vLLM computes otherwise than transformers, the trainer's model does as vLLM: what is trained is what is served.

Each of these can go when both agree, which `make matrix` shows.
"""

# mypy: disable-error-code="no-any-return"
# transformers is untyped.

from typing import Any

import torch
from transformers import PreTrainedModel


def settings(config: Any) -> dict[str, Any]:
    """Changes a model's configuration; what else to build the model with."""
    if config.model_type == "cohere2":
        # commandr.py lets a token see as many before it, and itself: one more, and as the model was trained.
        config.sliding_window += 1
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        # vLLM caps the logits of attention (Gemma 2); the default kernel of transformers leaves that out.
        return {"attn_implementation": "eager"}
    return {}


def adjust(model: PreTrainedModel) -> None:
    """Changes a model that was built with them."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # mamba_mixer2.py has no other; Zamba 2 and Nemotron-H of transformers let no step be shorter than one.
            module.time_step_limit = (0.0, float("inf"))
        if model.config.model_type == "bloom" and hasattr(module, "gelu_impl"):
            # bloom.py takes the function itself, transformers its approximation by tanh.
            module.gelu_impl = torch.nn.GELU()
