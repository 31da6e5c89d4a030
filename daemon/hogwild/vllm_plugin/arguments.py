"""The arguments of `vllm serve` as vLLM reads them, its own file of them included. Imports no vllm."""

import json
from collections.abc import Sequence
from pathlib import Path

from hogwild.errors import UsageError

_FILE = "--config"


def option(arguments: Sequence[str], name: str) -> str | None:
    """What is said last counts, and names may have underscores."""
    found = None
    for position, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given.replace("_", "-") == name:
            found = value if equals else next(iter(arguments[position + 1 :]), found)
    return found


def in_full(arguments: Sequence[str]) -> list[str]:
    """With what the file says that `--config FILE` names: before the others, which count for more. vLLM takes no
    `--config=FILE`.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    if _FILE not in arguments:
        return list(arguments)
    place = arguments.index(_FILE)
    rest = [*arguments[:place], *arguments[place + 2 :]]
    return [*(_read(arguments[place + 1]) if place + 1 < len(arguments) else []), *rest]


def _read(path: str) -> list[str]:
    """`port: 9000` as --port=9000, as FlexibleArgumentParser.load_config_file does (vllm/utils/argparse_utils.py)."""
    import yaml  # only here: few have such a file

    try:
        said = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}, of vLLM: cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise UsageError(f"--config {path}, of vLLM: give lines such as `port: 8000`")
    found = []
    for key, value in said.items():
        if isinstance(value, bool):
            found.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            found += [f"--{key}", *map(str, value)] if value else []
        else:
            found.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return found
