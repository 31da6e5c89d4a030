"""One JSON object from bytes, refusing what Python's json module lets through.

NaN and Infinity are not JSON; a duplicate key hides a value; 1e999 reads as infinity; half a surrogate pair
cannot be written as UTF-8; deep nesting exhausts the stack.
"""

import json
import math
import re
from typing import Any, NoReturn

from hogwild.errors import ExampleError

_OF_ARRAY = ". Of a file that is one array: jq -c '.[]' FILE > lines.jsonl"
_OVER_LINES = {
    "[": _OF_ARRAY,
    "{": ". Of a file whose objects go over several lines: jq -c . FILE > lines.jsonl",
}
"""The first line of a file that was written to be read: what makes lines of it."""
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def loads_object(line: bytes) -> dict[str, Any]:
    """Parses one line.

    Raises:
        ExampleError: with one reason a person can act on.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExampleError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}; save the file as UTF-8"
        ) from None
    value = loads(text)
    if not isinstance(value, dict):
        kind = {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
        hint = _OF_ARRAY if isinstance(value, list) else ""
        raise ExampleError(
            f'a bare {kind}; a line is an object like {{"prompt": "...", "completion": "..."}}{hint}'
        )
    return value


def loads(text: str) -> Any:
    """Parses a JSON text; raises as `loads_object`."""
    try:
        value = _DECODER.decode(text)
        # Only an escape can have smuggled a surrogate in: UTF-8 itself cannot carry one.
        surrogate = "\\u" in text and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False))
    except json.JSONDecodeError as error:
        hint = _OVER_LINES.get(text.strip(), "")
        raise ExampleError(
            f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{hint}"
        ) from None
    except RecursionError:
        raise ExampleError("nested too deeply") from None
    except ValueError:  # an integer with more digits than Python converts
        raise ExampleError("a number with too many digits") from None
    if surrogate:
        raise ExampleError("half of a surrogate pair (\\ud800-\\udfff) is not a character")
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add returns None: falsy on purpose
        raise ExampleError("given twice in one object", field=twice)
    return result


def _constant(name: str) -> NoReturn:
    raise ExampleError(f"{name} is not JSON; write a finite number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        shown = digits if len(digits) <= 40 else f"{digits[:40]}..."
        raise ExampleError(f"{shown} is larger than any number that can be stored")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
