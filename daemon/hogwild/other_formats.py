"""Lines as other trainers take them: named, with the command that makes spool files of them. docs/spool.md has more."""

from collections.abc import Mapping
from typing import Any

from hogwild.errors import ExampleError

_EACH = 'if type == "array" then .[] else . end'  # of a file of lines, or of one array
_FORMATS: dict[str, tuple[frozenset[str], str]] = {
    "ShareGPT": (
        frozenset({"conversations"}),
        '{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from), content: .value}]}',
    ),
    "Alpaca": (
        frozenset({"instruction", "output"}),
        '{messages: [{role: "user", content: ([.instruction, .input // ""] | map(select(. != "")) | join("\\n\\n"))}, '
        '{role: "assistant", content: .output}]}',
    ),
}
"""Name -> the fields by which a line of it is known, and what jq makes of such a line."""


def recognised(data: Mapping[str, Any]) -> ExampleError | None:
    """How to convert the file of a line in a known format; None: it is none of these."""
    for name, (fields, convert) in _FORMATS.items():
        if fields <= data.keys():
            command = f"jq -c '{_EACH} | {convert}' FILE > chats.jsonl"
            return ExampleError(f"this is a line in the {name} format; convert the file: {command}")
    return None
