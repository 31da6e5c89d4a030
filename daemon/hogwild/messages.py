"""The messages and tools of a chat line, checked. Every refusal names the message and its field."""

from collections.abc import Mapping
from typing import Any

from hogwild.chat import arguments_of
from hogwild.errors import ExampleError
from hogwild.fields import filled, kind, objects, unknown

Message = Mapping[str, Any]

MESSAGE_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",  # what the server calls it now
    "weight",
)
_OF_ANSWERS = ("refusal", "annotations", "audio", "function_call")
"""What servers send with an answer, empty mostly: then it says nothing."""
# What may follow what. A conversation that ends on the assistant's turn has something to learn.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def parse_messages(value: Any) -> tuple[Message, ...]:
    messages = objects(value, "messages")
    before: str | None = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        message = {name: said for name, said in message.items() if said or name not in _OF_ANSWERS}
        for name in message:
            if name not in MESSAGE_FIELDS:
                raise unknown(name, MESSAGE_FIELDS, where)
        message = messages[i] = _tidied(message, where)
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
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise ExampleError("every turn of the assistant has weight 0: nothing is trained", "messages")
    return tuple(messages)


def _tidied(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Without what says nothing (exports are full of null fields and empty lists), and reasoning by one name."""
    tidy = {
        name: value
        for name, value in message.items()
        if not (value is None or (name == "tool_calls" and value == []))
    }
    if isinstance(tidy.get("content"), list):
        tidy["content"] = _text_of(tidy["content"], f"{where}.content")
    if "reasoning" in tidy:
        if "reasoning_content" in tidy:
            raise ExampleError("is the same as reasoning_content; give one", f"{where}.reasoning")
        tidy["reasoning_content"] = tidy.pop("reasoning")
    return tidy


def _text_of(parts: list[Any], where: str) -> str:
    """Of content in parts, which is text if it is one part of text: the server joins several as its template has it."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            said = part.get("type") if isinstance(part, dict) else kind(part)
            raise ExampleError(f"has a part that is no text ({said!s:.40}): only text is trained", where)
    if len(parts) != 1 or not isinstance(parts[0].get("text"), str):
        raise ExampleError("is in several parts: write them as one string", where)
    return str(parts[0]["text"])


def _check_content(message: Message, role: str, where: str) -> None:
    """Text may be empty from a tool and in a silenced system prompt, absent when a tool is called."""
    assistants = ("tool_calls", "reasoning_content")
    for name in assistants:
        if name in message and role != "assistant":
            what = "calls tools" if name == "tool_calls" else "reasons"
            raise ExampleError(f"only the assistant {what}", f"{where}.{name}")
    if "weight" in message and (
        role != "assistant" or isinstance(message["weight"], bool) or message["weight"] not in (0, 1)
    ):
        raise ExampleError("must be 0 or 1, of the assistant's: is this turn trained?", f"{where}.weight")
    if "tool_call_id" in message and role != "tool":
        raise ExampleError("only a tool answers a call", f"{where}.tool_call_id")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in message and not isinstance(message[name], str):
            raise ExampleError(f"must be a string, not {kind(message[name])}", f"{where}.{name}")
    for i, call in enumerate(
        objects(message["tool_calls"], f"{where}.tool_calls") if "tool_calls" in message else []
    ):
        _check_call(call, f"{where}.tool_calls[{i}]")
    content = message.get("content")
    if "tool_calls" in message and content is None:
        return
    if role in ("user", "assistant") and "tool_calls" not in message:
        filled(content, f"{where}.content")
    elif not isinstance(content, str):
        raise ExampleError(f"must be a string, not {kind(content)}", f"{where}.content")


def _check_call(call: Message, where: str) -> None:
    """What the server accepts of a call, except that it must be whole: it is something to learn."""
    _check_function(call, where)
    try:
        arguments_of(call)
    except (ValueError, ExampleError) as error:
        why = f" ({error.reason})" if isinstance(error, ExampleError) else ""
        raise ExampleError(
            f'must be an object, or its JSON text, as in {{"city": "Oslo"}}{why}',
            f"{where}.function.arguments",
        ) from None


def _check_function(value: Message, where: str) -> None:
    if value.get("type", "function") != "function":
        raise ExampleError('must be "function"', f"{where}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        raise ExampleError(f"must be an object with a name, not {kind(function)}", f"{where}.function")
    filled(function.get("name"), f"{where}.function.name")


def parse_tools(value: Any) -> list[dict[str, Any]]:
    tools = objects(value, "tools")
    for i, tool in enumerate(tools):
        _check_function(tool, f"tools[{i}]")
    return tools
