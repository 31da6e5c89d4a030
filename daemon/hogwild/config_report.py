"""What `hogwild config` prints: every effective value and where it comes from. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogwild import config as configuration
from hogwild import presets
from hogwild.config import field_paths

DEFAULT = "default"
_PLACES: dict[tuple[str, ...], str] = {
    ("state_dir",): "STATE_DIRECTORY",
    ("socket",): "RUNTIME_DIRECTORY",
}


@dataclass(frozen=True)
class Setting:
    """One effective value.

    Attributes:
        key: "training.threads".
        origin: a path, "$NAME", "command line", or "default".
    """

    key: str
    value: Any
    origin: str

    @property
    def shown(self) -> str:
        return str(self.value) if isinstance(self.value, str) else presets.toml(self.value)

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "value": self.value, "origin": self.origin}


def keys() -> list[str]:
    """Every key, for completion."""
    return [".".join(path) for path in field_paths()]


def effective(path: Path | None) -> list[Setting]:
    """Every key with its value, in the order of the documented file.

    Raises:
        ConfigError: something is wrong; everything that is.
    """
    config = configuration.load(path).model_dump(mode="json")
    given, origin = configuration.gather(path)
    found = []
    for keys_ in field_paths():
        value: Any = config
        raw: Any = given
        for key in keys_:
            value, raw = value[key], raw.get(key) if isinstance(raw, dict) else None
        if value == ".":  # how an empty path is dumped
            value = ""
        where = origin.get(keys_, DEFAULT)
        if raw == "" and value != "":  # an empty path stands for a place that the environment gives
            where = DEFAULT
        found.append(Setting(".".join(keys_), value, _place(keys_) if where == DEFAULT else where))
    return found


def _place(keys_: tuple[str, ...]) -> str:
    """An unset path follows systemd's variables."""
    import os

    variable = _PLACES.get(keys_, "")
    return f"${variable}" if variable and os.environ.get(variable) else DEFAULT


def show(settings: list[Setting], path: Path | None) -> None:
    """As TOML with the origin beside what is not a default; it can be read back."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"# file: {path or 'none'}; what says no origin has its default", style="dim"))
    if beside := configuration.unread(path):
        console.print(Text(f"# what {beside} sets is missing here: only root may read it", style="yellow"))
    width = max(
        (len(one.key.rpartition(".")[2]) + len(presets.toml(one.value)) for one in settings), default=0
    )
    width, table = min(width + 3, 48), ""
    for one in settings:
        here, _, key = one.key.rpartition(".")
        if here != table:
            table = here
            console.print(Text(f"\n[{table}]", style="bold"))
        line = Text(f"{key} = {presets.toml(one.value)}")
        if one.origin != DEFAULT:
            line.stylize("green")
            line.pad_right(max(width - len(line), 1))
            line.append(f" # {one.origin}", style="dim")
        console.print(line)
