"""Lines as other trainers take them: named, with the command that makes spool files of them. docs/spool.md has more."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hogwild.errors import ExampleError

_EACH = 'if type == "array" then .[] else . end'  # of a file of lines, or of one array


class _Format(NamedTuple):
    name: str
    fields: Mapping[str, type | tuple[type, ...]]
    """By which a line of it is known, and what they hold."""
    convert: str
    """What jq makes of such a line."""
    but: str = ""


_FORMATS = (
    _Format(
        "ShareGPT",
        {"conversations": list},
        '{messages: [.conversations[] | {role: ((.from // .role) as $who | {human: "user", gpt: "assistant"}[$who] // '
        "$who), content: (.value // .content)}]}",
    ),
    _Format(
        "Alpaca",
        {"instruction": str, "output": str},
        '{messages: [{role: "user", content: ([.instruction, .input // ""] | map(select(. != "")) | join("\\n\\n"))}, '
        '{role: "assistant", content: .output}]}',
    ),
    _Format(
        "Dolly",
        {"instruction": str, "response": str},
        '{messages: [{role: "user", content: ([.context // "", .instruction] | map(select(. != "")) | '
        'join("\\n\\n"))}, {role: "assistant", content: .response}]}',
    ),
    _Format(
        "preference",
        {"chosen": (list, str), "rejected": (list, str)},
        '(if (.chosen | type) == "array" then .chosen else [{role: "assistant", content: .chosen}] end) as $said | '
        'if (.prompt | type) == "array" then .prompt elif $said[0].role != "assistant" then [] else [{role: "user", '
        "content: .prompt}] end | {messages: (. + $said)}",
        "of which the chosen answer can be learned, and nothing from the comparison",
    ),
    _Format(
        "conversational prompt-completion",
        {"prompt": list, "completion": list},
        "{messages: (.prompt + .completion)}",
    ),
)


def recognised(data: Mapping[str, Any]) -> ExampleError | None:
    """How to convert the file of a line in a known format; None: it is none of these."""
    for name, fields, convert, but in _FORMATS:
        if all(isinstance(data.get(field), held) for field, held in fields.items()):
            command = f"jq -c '{_EACH} | {convert}' FILE > chats.jsonl"
            said = f"the {name} format{f', {but}' if but else ''}"
            return ExampleError(f"this is a line in {said}; convert the file: {command}")
    return None
