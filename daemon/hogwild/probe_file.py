"""`probes.file`: what the model must go on knowing, one a line, in the forms that the spool takes. Imports no torch."""

import json
from pathlib import Path

from hogwild.errors import ConfigError, ExampleError
from hogwild.examples import Example, parse_line
from hogwild.lines import BOM
from hogwild.settings import Config

_ONLY = ("id", "messages", "tools", "prompt", "completion", "text", "train_on")


def read(path: Path) -> list[tuple[int, Example]]:
    """The lines that are not blank, with their numbers.

    Raises:
        ConfigError: naming every line that is not a probe.
    """
    try:
        lines = path.read_bytes().removeprefix(BOM).splitlines()
    except OSError as error:
        raise ConfigError(f"probes.file: {path}: {error.strerror}") from error
    found, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = parse_line(line)
            given = [key for key in json.loads(line) if key not in _ONLY]
            if given:
                raise ExampleError("means nothing for a probe", given[0])
            found.append((number, example))
        except ExampleError as error:
            problems.append(f"line {number}: {error}")
    refuse(path, problems)
    return found


def check(config: Config) -> None:
    """Before anything is started: raises as `read`, if there is such a file."""
    if config.probes.file != Path():
        read(config.probes.file)


def refuse(path: Path, problems: list[str]) -> None:
    """Raises ConfigError if there are any."""
    if problems:
        raise ConfigError("\n  - ".join([f"probes.file: {path} ({len(problems)} wrong):", *problems]))
