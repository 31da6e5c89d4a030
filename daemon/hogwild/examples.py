"""From one line of JSON to a typed example. Every refusal is an `ExampleError` with a reason and a field."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from hogwild.encoding import Encoded, Tokenizer, encode_chat, encode_completion, encode_text
from hogwild.errors import ExampleError
from hogwild.strict_json import loads_object

__all__ = ["Encoded", "Example", "Tokenizer", "TrainOn", "encode", "parse_line"]

TrainOn = Literal["last", "all"]
Message = Mapping[str, Any]

COMMON = ("id", "tags", "weight", "priority", "passes", "until_loss")
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools", "train_on", *COMMON),
    "prompt": ("prompt", "completion", *COMMON),
    "text": ("text", *COMMON),
}
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
# What may follow what. A conversation that ends on the assistant's turn has something to learn.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
MAX_PRIORITY = 2**31
MAX_PASSES = 10_000
MAX_ID_CHARS = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One valid line. Exactly one of `messages`, `completion` and `text` is set."""

    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    id: str | None = None
    """The user's own name for it; shown in logs, not required to be unique."""
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    """Factor on the loss; negative unlearns."""
    priority: int = 0
    """Higher goes first among examples with as many passes behind them."""
    passes: int | None = None
    """None: as configured."""
    until_loss: float | None = None
    """Trained until its loss, in nats per trained token, is at most this, or its passes are used up."""
    train_on: TrainOn | None = None
    """None: as configured."""


def parse_line(line: bytes) -> Example:
    """Reads one line of a spool file, without its newline.

    Raises:
        ExampleError: the line is not one of the three forms; names the field and what would be right.
    """
    data = loads_object(line)
    forms = [form for form in FORMS if form in data]
    if len(forms) > 1:
        raise ExampleError(f"{' and '.join(forms)} in one line; choose one", forms[1])
    if not forms:
        allowed = sorted({name for names in FORMS.values() for name in names})
        for name in data:
            if name not in allowed:
                raise _unknown(name, allowed)
        raise ExampleError('needs "messages", or "prompt" and "completion", or "text"')
    for name in data:
        if name not in FORMS[forms[0]]:
            raise _unknown(name, FORMS[forms[0]])
    if forms[0] == "messages":
        content: dict[str, Any] = {"messages": _messages(data["messages"])}
        if "tools" in data:
            content["tools"] = tuple(_objects(data["tools"], "tools"))
        if "train_on" in data:
            content["train_on"] = _train_on(data["train_on"])
    elif forms[0] == "prompt":
        if "completion" not in data:
            raise ExampleError('missing; a "prompt" line needs what to answer', "completion")
        content = {name: _filled(data[name], name) for name in ("prompt", "completion")}
    else:
        content = {"text": _filled(data["text"], "text")}
    return Example(**content, **_common(data))


def encode(example: Example, tokenizer: Tokenizer, *, max_tokens: int, train_on: TrainOn = "last") -> Encoded:
    """Token ids and loss mask of an example.

    Args:
        tokenizer: the model's own, with its chat template.
        max_tokens: longest allowed, context included.
        train_on: for chats whose line does not say.

    Raises:
        ExampleError: too long, or the chat template does not allow it.
    """
    if example.messages is not None:
        turns = example.train_on or train_on
        encoded = encode_chat(example.messages, example.tools, tokenizer, only_last=turns == "last")
    elif example.completion is not None:
        encoded = encode_completion(example.prompt or "", example.completion, tokenizer)
    else:
        encoded = encode_text(example.text or "", tokenizer)
    if len(encoded.ids) > max_tokens:
        raise ExampleError(f"{len(encoded.ids)} tokens, and training.max_tokens is {max_tokens}")
    if not any(encoded.trained):
        raise ExampleError("no token to train on")
    return encoded


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "id" in data:
        value = data["id"]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ExampleError(f"must be a string, not {_kind(value)}", "id")
        fields["id"] = str(value)
        if not 0 < len(fields["id"]) <= MAX_ID_CHARS:
            raise ExampleError(f"must have 1 to {MAX_ID_CHARS} characters", "id")
    if "tags" in data:
        tags = data["tags"]
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
            raise ExampleError('must be an array of strings, like ["support", "2025"]', "tags")
        fields["tags"] = tuple(tags)
    if "weight" in data:
        fields["weight"] = float(_number(data["weight"], "weight"))
        if fields["weight"] == 0:
            raise ExampleError("0 trains nothing; leave the line out instead", "weight")
    if "priority" in data:
        fields["priority"] = _integer(data["priority"], "priority", -MAX_PRIORITY, MAX_PRIORITY)
    if "passes" in data:
        fields["passes"] = _integer(data["passes"], "passes", 1, MAX_PASSES)
    if "until_loss" in data:
        fields["until_loss"] = float(_number(data["until_loss"], "until_loss"))
        if fields["until_loss"] <= 0:
            raise ExampleError("must be greater than 0 (nats per trained token)", "until_loss")
    return fields


def _messages(value: Any) -> tuple[Message, ...]:
    messages = _objects(value, "messages")
    before: str | None = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        for name in message:
            if name not in MESSAGE_FIELDS:
                raise _unknown(name, MESSAGE_FIELDS, where)
        role = message.get("role")
        if not isinstance(role, str) or role not in FOLLOWS:
            raise ExampleError(f"must be one of {', '.join(r for r in FOLLOWS if r)}", f"{where}.role")
        if role not in FOLLOWS[before]:
            raise ExampleError(
                f"{role} cannot come {f'after {before}' if before else 'first'}; "
                f"expected {' or '.join(FOLLOWS[before])}",
                f"{where}.role",
            )
        if role == "tool" and before == "assistant" and not messages[i - 1].get("tool_calls"):
            raise ExampleError("tool answers a turn that called no tool", f"{where}.role")
        _check_content(message, role, where)
        before = role
    if before != "assistant":
        raise ExampleError(f"ends with {before}; the last turn must be the assistant's", "messages")
    return tuple(messages)


def _check_content(message: Message, role: str, where: str) -> None:
    """Text may be empty from a tool and in a silenced system prompt, absent when a tool is called."""
    if "tool_calls" in message:
        if role != "assistant":
            raise ExampleError("only the assistant calls tools", f"{where}.tool_calls")
        _objects(message["tool_calls"], f"{where}.tool_calls")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in message and not isinstance(message[name], str):
            raise ExampleError(f"must be a string, not {_kind(message[name])}", f"{where}.{name}")
    content = message.get("content")
    if "tool_calls" in message and content is None:
        return
    if role in ("user", "assistant") and "tool_calls" not in message:
        _filled(content, f"{where}.content")
    elif not isinstance(content, str):
        raise ExampleError(f"must be a string, not {_kind(content)}", f"{where}.content")


def _objects(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ExampleError("must be a non-empty array of objects", field)
    return cast("list[dict[str, Any]]", value)


def _filled(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ExampleError(f"must be a string, not {_kind(value)}", field)
    if not value.strip():
        raise ExampleError("is empty", field)
    return value


def _number(value: Any, field: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExampleError(f"must be a number, not {_kind(value)}", field)
    if abs(value) > 1e30:
        raise ExampleError("is too large", field)
    return value


def _integer(value: Any, field: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ExampleError(f"must be a whole number, not {_kind(value)}", field)
    if not low <= value <= high:
        raise ExampleError(f"must be between {low} and {high}", field)
    return value


def _train_on(value: Any) -> TrainOn:
    if value not in ("last", "all"):
        raise ExampleError('must be "last" or "all" (assistant turns)', "train_on")
    return cast(TrainOn, value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(
        type(value), f"{value:.40}" if isinstance(value, str) else f"the number {str(value)[:40]}"
    )


def _unknown(name: str, allowed: Sequence[str], where: str = "") -> ExampleError:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"allowed here: {', '.join(allowed)}"
    field = name if len(name) <= 80 else name[:80] + "..."
    return ExampleError(f"unknown field; {hint}", f"{where}.{field}" if where else field)
