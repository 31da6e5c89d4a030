"""Where settings come from: defaults, the file, `HOGWILD_<TABLE>__<KEY>` environment variables (with the machine's file
also those in /etc/hogwild/environment), the command line.

Later sources win. Everything that is wrong is listed in one `ConfigError`.
"""

import contextlib
import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from hogwild import service_environment
from hogwild.errors import ConfigError
from hogwild.settings import Config

ENV_PREFIX = "HOGWILD_"
NO_SETTINGS = frozenset(
    ENV_PREFIX + name
    for name in (
        "CONFIG",  # cli_history.py
        "API_KEY", "BASE_WEIGHTS", "PAGE",  # vllm_plugin/names.py
        "SERVER_URL", "SERVER_CERTIFICATE", "SERVER_CHAT", "SERVER_PID",
        "VLLM_ARGUMENTS",  # benchmarks/gpu_vllm.py
    )
)  # fmt: skip
"""Variables with the prefix that hogwild itself reads or sets, besides settings."""
_SERVICE = re.compile(ENV_PREFIX + r"(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_.*)?)")
"""What Kubernetes gives every container where a service is called hogwild."""
SYSTEM_FILE = Path("/etc/hogwild/hogwild.toml")
"""Where `hogwild install` writes it, and the units read it."""


def find() -> Path | None:
    """The file that is read when nobody names one: the user's own, or the machine's; None if there is neither."""
    given = os.environ.get("XDG_CONFIG_HOME")
    own = []
    with contextlib.suppress(RuntimeError):  # a user that nobody knows, in a container, has no home
        own.append((Path(given) if given else Path.home() / ".config") / "hogwild" / "hogwild.toml")
    return next((path for path in (*own, SYSTEM_FILE) if path.is_file()), None)


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
    problems = [_unknown_variable(variable) for variable in _strangers(path, data)]
    try:
        config = Config.model_validate(data)
        if not problems:
            return config
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

    With the machine's file, what the units load beside it counts, too: before what is in this process's environment.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    origin: dict[tuple[str, ...], str] = {}
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_toml(path)
        origin.update((keys, str(path)) for keys, _ in _leaves(data))
    for variable in _environment(path):
        keys = _keys(variable.name)
        if _names_setting(variable.name) and _put(data, keys, parse(variable.text, keys)):
            origin[keys] = variable.source
    for keys, value in _leaves(overrides):
        dotted = tuple(part for key in keys for part in key.split("."))
        if value is not None and _put(data, dotted, value):
            origin[dotted] = "command line"
    return data, origin


def usable(path: Path | None) -> Config:
    """As `load`, without what is wrong: to look at the rest (`hogwild doctor`).

    Raises:
        ConfigError: what is wrong is no key that could be left out.
    """
    try:
        data, _ = gather(path)
    except ConfigError:  # the file as a whole
        data, _ = gather(None)
    while True:
        try:
            return Config.model_validate(data)
        except ValidationError as error:
            if not any(_drop(data, item["loc"]) for item in error.errors(include_url=False)):
                return load(path)  # which says it


def _drop(data: dict[str, Any], keys: Sequence[int | str]) -> bool:
    """Removes the value at a path, or the array that it is in. Was there one?"""
    for key in keys:
        inner = data.get(str(key))
        if not isinstance(inner, dict) or key == keys[-1]:
            return data.pop(str(key), None) is not None
        data = inner
    return False


def field_paths(table: type[BaseModel] = Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that exists, as ("training", "threads")."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_paths(field.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        theirs = "; vLLM's own file comes after a `--`: hogwild vllm MODEL -- --config FILE"
        hint = theirs if path.suffix in (".yaml", ".yml") else ""
        raise ConfigError(f"{path}: is not TOML: {error}{hint}") from error


@dataclass(frozen=True)
class _Variable:
    name: str
    text: str
    source: str  # as it is shown


def _environment(path: Path | None) -> Iterator[_Variable]:
    """`HOGWILD_TRAINING__THREADS=3`, `HOGWILD_STATE_DIR=...`; every other name is one of `_strangers`."""
    beside = service_environment.beside(path, SYSTEM_FILE)
    if beside is not None:
        with contextlib.suppress(PermissionError):  # `unread` says it
            for name, text in service_environment.read(beside).items():
                if name.startswith(ENV_PREFIX):
                    yield _Variable(name, text, f"{beside}: ${name}")
    for name, text in sorted(os.environ.items()):
        if name.startswith(ENV_PREFIX):
            yield _Variable(name, text, f"${name}")


def unread(path: Path | None) -> Path | None:
    """What the units load beside this file, and whoever asks may not read; None: nothing."""
    beside = service_environment.beside(path, SYSTEM_FILE)
    return beside if beside is not None and not os.access(beside, os.R_OK) else None


def _keys(variable: str) -> tuple[str, ...]:
    return tuple(variable.removeprefix(ENV_PREFIX).lower().split("__"))


def _names_setting(variable: str) -> bool:
    """Also where its table or key does not exist: that is said as for a file."""
    keys = _keys(variable)
    return len(keys) > 1 or keys in set(field_paths())


def _strangers(path: Path | None, data: Mapping[str, Any]) -> list[_Variable]:
    """Variables with the prefix that name neither a setting nor anything else that is known: typing errors."""
    server = data.get("server")
    key = server.get("api_key_env") if isinstance(server, dict) else None  # may be called anything
    return [
        variable
        for variable in _environment(path)
        if (name := variable.name) not in NO_SETTINGS
        and name != key
        and not _SERVICE.fullmatch(name)
        and not _names_setting(name)
    ]


def _unknown_variable(variable: _Variable) -> str:
    """Names the nearest variable: by its whole name, else by its key alone."""
    name = variable.name
    variables = {ENV_PREFIX + "__".join(keys).upper(): keys[-1] for keys in field_paths()}
    close = difflib.get_close_matches(name, [*variables, *NO_SETTINGS], n=1, cutoff=0.8)
    key = name.removeprefix(ENV_PREFIX).lower()
    close += [one for one, last in variables.items() if last == key]
    said = f"; did you mean ${close[0]}?" if close else ": unset it"
    return f"{variable.source}: names no setting{said}"


def parse(text: str, keys: tuple[str, ...]) -> Any:
    """The text of a variable as a value of the key's type, `[0.9, 0.999]` as an array; as it is, where it is none:
    whoever checks the configuration says so."""
    value: Any = text
    try:
        if text.startswith("["):
            value = tomllib.loads(f"array = {text}")["array"]
        return TypeAdapter(_type(keys)).validate_python(value)
    except (tomllib.TOMLDecodeError, ValidationError):
        return value


def _type(keys: tuple[str, ...]) -> Any:
    """Of a key's values, without its bounds; anything, where there is no such key."""
    found: Any = Config
    for key in keys:
        fields = found.model_fields if isinstance(found, type) and issubclass(found, BaseModel) else {}
        found = fields[key].annotation if key in fields else Any
    return found


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
    text = text.removeprefix("Value error, ").replace("a valid tuple", "a valid array")  # as TOML calls it
    text = text[:1].lower() + text[1:]
    return f"{text}, not {value!r}" if isinstance(value, str | int | float | bool) else text
