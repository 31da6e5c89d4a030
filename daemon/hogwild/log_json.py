"""Any dictionary to one line of valid JSON, within journald's limit, without ever raising."""

import json
import math
from collections.abc import Mapping
from typing import Any

import orjson

MAX_LINE_BYTES = 48 * 1024 - 1  # journald's LineMax; it splits what is longer
MAX_DEPTH = 12
FIRST = ("timestamp", "level", "event")
_SHRINK_TO = (4096, 512, 64)  # characters of a value, tried in turn until the line fits
_SCALARS = frozenset({str, int, bool, type(None)})


def to_line(fields: Mapping[str, Any]) -> bytes:
    """Serialises an event, `timestamp`, `level` and `event` first. Not-a-number becomes the string "nan".

    A line that would be too long has its long values cut, marked by `"truncated": true`.
    """
    ordered = {name: fields[name] for name in FIRST if name in fields}
    for name, value in fields.items():
        ordered[name] = value if type(value) in _SCALARS else _plain(value)
    line = _dumps(ordered)
    for limit in _SHRINK_TO:
        if len(line) <= MAX_LINE_BYTES:
            return line
        ordered = {name: _shrunk(value, limit) for name, value in ordered.items()}
        line = _dumps({**ordered, "truncated": True})
    if len(line) <= MAX_LINE_BYTES:
        return line
    return _dumps({name: _shrunk(ordered.get(name), 256) for name in FIRST} | {"truncated": True})


def _dumps(value: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except Exception:  # half a surrogate pair, an integer beyond 64 bits
        return json.dumps(value, default=_text).encode("ascii")


def _plain(value: Any, depth: int = 0) -> Any:
    """Only what JSON has. NumPy and 0-d tensor scalars become numbers; the unknown becomes its text."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if depth >= MAX_DEPTH:
        return _text(value)
    try:
        if isinstance(value, Mapping):
            return {key if type(key) is str else _text(key): _plain(v, depth + 1) for key, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [_plain(v, depth + 1) for v in value]
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return _plain(value.item(), depth + 1)
    except Exception:
        return _text(value)
    return _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be written: {type(error).__name__}>"


def _shrunk(value: Any, limit: int) -> Any:
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]}... ({len(value) - limit} more characters)"
    if isinstance(value, list):
        few = max(4, limit // 64)
        kept = [_shrunk(v, limit) for v in value[:few]]
        return kept if len(value) <= few else [*kept, f"... ({len(value) - few} more)"]
    if isinstance(value, dict):
        few = max(16, limit // 16)
        return {name[:limit]: _shrunk(v, limit) for name, v in list(value.items())[:few]}
    return value
