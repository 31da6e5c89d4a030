"""What a server was told of chats: a template in place of the model's (`vllm serve --chat-template`), and settings for
it (`--default-chat-template-kwargs`). Its prompts are made with them, so examples have to be, too.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hogwild.vllm_plugin.arguments import in_full, option

_TEMPLATE, _SETTINGS = "--chat-template", "--default-chat-template-kwargs"
_NOT_SETTINGS = ("conversation", "chat_template", "tokenize", "continue_final_message")
"""Names that mean something else to `apply_chat_template`; of a server, each is refused or overruled by the request."""


@dataclass(frozen=True)
class ChatSettings:
    template: str | None = None
    """Text of the template; None: the model's own."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def given(cls, template: str | None, settings: Any) -> "ChatSettings":
        """As on vLLM's command line, where a template is the name of a file or the text itself."""
        return cls(
            None if template is None else _text(template), settings if isinstance(settings, dict) else {}
        )

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> "ChatSettings":
        """Of a server that is started with these arguments of `vllm serve`.

        Raises:
            UsageError: the file that `--config` names cannot be read.
        """
        said = in_full(arguments)
        settings = _value(option(said, _SETTINGS) or "null") or {}
        for name in (argument.partition("=")[0] for argument in said):  # one by one, as vLLM takes them, too
            if name.replace("_", "-").startswith(f"{_SETTINGS}."):
                settings |= {name.partition(".")[2]: _value(option(said, name.replace("_", "-")) or "")}
        return cls.given(option(said, _TEMPLATE), settings)

    @classmethod
    def from_json(cls, said: Any) -> "ChatSettings":
        """What a server says of itself; one that says nothing, or something else, has been told nothing."""
        template, settings = (
            (said.get("template"), said.get("settings")) if isinstance(said, dict) else (None, None)
        )
        return cls(
            template if isinstance(template, str) else None, settings if isinstance(settings, dict) else {}
        )

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, "settings": dict(self.settings)}

    def on(self, tokenizer: Any) -> Any:
        """The tokenizer with this template and these settings; the one that is given stays as it is."""
        if self == MODELS_OWN:
            return tokenizer
        result = copy.copy(tokenizer)
        if self.template is not None:
            result.chat_template = self.template
        settings = {name: value for name, value in self.settings.items() if name not in _NOT_SETTINGS}
        # What the caller says counts for more, as what a request says does.
        result.apply_chat_template = functools.partial(type(result).apply_chat_template, result, **settings)
        return result


MODELS_OWN = ChatSettings()


def _text(template: str) -> str | None:
    """As vLLM reads it (renderers/chat_utils.py: load_chat_template, vLLM 0.32)."""
    try:
        return Path(template).read_text("utf-8")
    except (OSError, ValueError):  # no such file, or no name of one
        return template if any(mark in template for mark in "{}\n") else None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
