"""Rotary frequencies that follow from how long a text is: made those of one length, for every text.

transformers computes them anew in every pass where a configuration says "dynamic" or "longrope", from the largest
position in the row: a short text beside a long one, or after it, then comes out otherwise than alone, and keys that
were read before a text grew long do not fit those after. A server that keeps keys cannot do that either: vLLM takes one
set for all texts, by the longest one that it may be asked for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel


def fix(model: PreTrainedModel, longest: int) -> None:
    """Give every text the frequencies of one of `longest` tokens, as transformers computes them."""
    for module, kind in list(_changing(model)):
        place = torch.zeros(1, device=model.device), torch.tensor([[longest - 1]], device=model.device)
        module(*place, **({} if kind is None else {"layer_type": kind}))
        if kind is None:
            module.rope_type = "default"  # that of this module alone: never computed anew
        else:
            module.rope_type = {**module.rope_type, kind: "default"}


def _changing(model: PreTrainedModel) -> Iterator[tuple[Any, str | None]]:
    """Modules that would compute their frequencies anew, and for which type of layer (None: for all)."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for kind, name in types.items() if isinstance(types, dict) else [(None, types)]:
            if isinstance(name, str) and ("dynamic" in name or name == "longrope"):
                yield module, kind
