"""Prompts as served and as trained: what the server makes of a chat, against what examples are trained behind.

A server says which chat template and settings it was given (`chat_settings.py`), but it may have another tokenizer, or
a way to make prompts that is no template. Its weights are then those that are trained, and chats are learned behind
prompts that it never sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from hogwild.encoder import Encoder
from hogwild.served import Server

Messages = Sequence[Mapping[str, Any]]

_ASKED = {"role": "user", "content": "Who keeps the lighthouse?"}
CHATS: tuple[Messages, ...] = (
    [_ASKED],
    [_ASKED, {"role": "assistant", "content": "Ilsa Thorne."}, {"role": "user", "content": "Since when?"}],
)
"""Without a system prompt or tools, which not every template takes."""
_SHOWN = 24  # tokens


@dataclass(frozen=True)
class Difference:
    """Of one chat, the text of both prompts around where they part."""

    served: str
    trained: str


def difference(server: Server, encoder: Encoder) -> Difference | None:
    """The first chat that the server makes another prompt of; None: there is none, or it cannot be told."""
    for messages in CHATS:
        trained = encoder.prompt(messages)
        served = None if trained is None else server.prompt(messages)
        if trained is None or served is None or trained == served:
            continue
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(served, trained, strict=False))))
        part = slice(max(same - _SHOWN, 0), same + _SHOWN)
        return Difference(encoder.text(served[part]), encoder.text(trained[part]))
    return None
