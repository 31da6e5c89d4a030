"""Settings to begin with for a kind of machine, and the commented file that `install` and `config --preset` write.

config/presets/<name>.toml holds the keys that differ from the defaults. Imports no torch.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from hogwild import resources
from hogwild.errors import UsageError

Key = tuple[str, ...]
_TABLE = re.compile(r"\[(\w+)\]")
_KEY = re.compile(r"(\w+) = (.*)")


def names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in resources.folder("presets").glob("*.toml"))


def values(name: str) -> dict[Key, Any]:
    """What a preset sets, by key: ("training", "threads").

    Raises:
        UsageError: there is no such preset.
    """
    if name not in names():
        raise UsageError(f"--preset {name}: there are {', '.join(names())}")
    found: dict[Key, Any] = {}
    for key, value in tomllib.loads(_text(name)).items():
        if isinstance(value, dict):
            found.update({(key, inner): one for inner, one in value.items()})
        else:
            found[key,] = value
    return found


def file(preset: str | None, more: Mapping[Key, Any] | None = None) -> str:
    """config/hogwild.toml with every default as a comment, and what the preset and `more` set as a setting.

    Raises:
        UsageError: there is no such preset.
    """
    given = {**(values(preset) if preset else {}), **(more or {})}
    reasons = _reasons(preset) if preset else {}
    lines: list[str] = []
    table: Key = ()
    for line in resources.resource("hogwild.toml").read_text("utf-8").splitlines():
        if heading := _TABLE.fullmatch(line):
            table = (heading[1],)
        if setting := _KEY.fullmatch(line):
            key = (*table, setting[1])
            if key in given:
                lines += [f"# {preset}: {reasons[key]}"] if key in reasons else []
                line = f"{setting[1]} = {toml(given.pop(key))}"
            else:
                line = f"#{line}"
        lines.append(line)
    assert not given, f"not in config/hogwild.toml: {given}"
    head = "# hogwild: every key with its default, as a comment. Remove the # before what you change.\n"
    return head + "\n".join(lines[1:]) + "\n"


def toml(value: Any) -> str:
    """A value as TOML. JSON is TOML for all that occurs here: texts, numbers, booleans, arrays of these; but TOML knows
    no surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)


def _reasons(preset: str) -> dict[Key, str]:
    """The comment above each key of a preset."""
    found: dict[Key, str] = {}
    table: Key = ()
    above = ""
    for line in _text(preset).splitlines():
        if heading := _TABLE.fullmatch(line):
            table = (heading[1],)
        elif above and (setting := _KEY.fullmatch(line)):
            found[*table, setting[1]] = above
        above = line.removeprefix("# ") if line.startswith("# ") else ""
    return found


def _text(name: str) -> str:
    return resources.resource(f"presets/{name}.toml").read_text("utf-8")
