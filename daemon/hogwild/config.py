"""Where settings come from: defaults, the file, `HOGWILD_<TABLE>__<KEY>` environment variables, the command line.

Later sources win. Everything that is wrong is listed in one `ConfigError`.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from hogwild.errors import ConfigError
from hogwild.settings import Config

ENV_PREFIX = "HOGWILD_"
SYSTEM_FILE = Path("/etc/hogwild/hogwild.toml")
"""Where `hogwild install` writes it, and the units read it."""


def find() -> Path | None:
    """The file that is read when nobody names one: the user's own, or the machine's; None if there is neither."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (home / "hogwild" / "hogwild.toml", SYSTEM_FILE):
        if path.is_file():
            return path
    return None


def load(path: Path | None = None, overrides: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Reads the configuration.

    Args:
        path: a TOML file, or None for defaults and environment alone.
        overrides: what the command line said, nested like the file or with dotted keys ("training.threads").
            A value of None counts as not given.

    Raises:
        ConfigError: listing every problem, each with its key and where the value came from.
    """
    data, origin = gather(path, overrides)
    problems: list[str] = []
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            keys = tuple(str(part) for part in item["loc"])
            shortened = (keys[:n] for n in range(len(keys), 0, -1))
            source = next((origin[part] for part in shortened if part in origin), str(path or ""))
            unknown = item["type"] == "extra_forbidden"
            what = unknown_key(keys) if unknown else _message(item["msg"], item["input"])
            problems.append(": ".join(part for part in (source, ".".join(keys), what) if part))
    raise ConfigError("\n  - ".join([f"the configuration is wrong ({len(problems)} found):", *problems]))


def gather(
    path: Path | None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What was set, unchecked, nested like the file; and by key where: a path, "$NAME" or "command line".

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    origin: dict[tuple[str, ...], str] = {}
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_toml(path)
        origin.update((keys, str(path)) for keys, _ in _leaves(data))
    for name, keys, value in _environment():
        if _put(data, keys, value):
            origin[keys] = f"${name}"
    for keys, value in _leaves(overrides):
        dotted = tuple(part for key in keys for part in key.split("."))
        if value is not None and _put(data, dotted, value):
            origin[dotted] = "command line"
    return data, origin


def field_paths(table: type[BaseModel] = Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that exists, as ("training", "threads")."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_paths(field.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _environment() -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """`HOGWILD_TRAINING__THREADS=3`, `HOGWILD_STATE_DIR=...`.

    A name without a table counts only when it is a key: other programs may own the rest of the prefix.
    """
    for name, value in sorted(os.environ.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        keys = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        if len(keys) > 1 or keys in set(field_paths()):
            yield name, keys, _array(value) if value.startswith("[") else value


def _array(text: str) -> Any:
    """`[0.9, 0.999]`, or the text itself, which pydantic then refuses."""
    try:
        return tomllib.loads(f"array = {text}")["array"]
    except tomllib.TOMLDecodeError:
        return text


def _leaves(data: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _put(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> bool:
    """Sets a nested key; False where a plain value stands for a table, which pydantic reports."""
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            return False
    data[keys[-1]] = value
    return True


def unknown_key(keys: tuple[str, ...]) -> str:
    """Names the nearest key of the same table, else the nearest key anywhere."""
    table, key = keys[:-1], keys[-1]
    known = list(field_paths())
    here = {path[len(table)]: path[len(table)] for path in known if path[: len(table)] == table}
    anywhere = {path[-1]: ".".join(path) for path in reversed(known)}
    for names in (here, anywhere):
        if close := difflib.get_close_matches(key, names, n=1):
            return f"unknown key; did you mean `{names[close[0]]}`?"
    return f"unknown key; there are {', '.join(here)}" if here else "unknown key"


def _message(text: str, value: Any) -> str:
    text = text.removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    return f"{text}, not {value!r}" if isinstance(value, str | int | float | bool) else text
