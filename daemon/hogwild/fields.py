"""Checks of single JSON values: each gives the value back, or an `ExampleError` that says what would be right."""

import difflib
from collections.abc import Sequence
from typing import Any, cast

from hogwild.errors import ExampleError


def objects(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ExampleError("must be a non-empty array of objects", field)
    return cast("list[dict[str, Any]]", value)


def filled(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ExampleError(f"must be a string, not {kind(value)}", field)
    if not value.strip():
        raise ExampleError("is empty", field)
    return value


def number(value: Any, field: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExampleError(f"must be a number, not {kind(value)}", field)
    if abs(value) > 1e30:
        raise ExampleError("is too large", field)
    return value


def integer(value: Any, field: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ExampleError(f"must be a whole number, not {kind(value)}", field)
    if not low <= value <= high:
        raise ExampleError(f"must be between {low} and {high}", field)
    return value


def choice(value: Any, field: str, allowed: tuple[str, str], of_what: str = "") -> Any:
    if value not in allowed:
        raise ExampleError(f'must be "{allowed[0]}" or "{allowed[1]}"{of_what}', field)
    return value


def kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(
        type(value), f"{value:.40}" if isinstance(value, str) else f"the number {str(value)[:40]}"
    )


def unknown(name: str, allowed: Sequence[str], where: str = "", *, form: str = "") -> ExampleError:
    close = difflib.get_close_matches(name, allowed, n=1)
    others = f"the line {form}" if form else f"allowed here: {', '.join(allowed)}"
    hint = f"did you mean `{close[0]}`?" if close else others
    field = name if len(name) <= 80 else name[:80] + "..."
    return ExampleError(f"unknown field; {hint}", f"{where}.{field}" if where else field)
