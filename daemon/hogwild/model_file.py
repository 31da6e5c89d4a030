"""Small JSON files of the state folder that belong to one model: what it wrote before training. Imports no torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hogwild.errors import HogwildError, in_short
from hogwild.files import replace_file

T = TypeVar("T")


def save(path: Path, version: int, base: str, body: dict[str, Any]) -> None:
    """Write the file whole or not at all, fsynced.

    Args:
        base: digest of the model as it came.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    replace_file(path, json.dumps({"version": version, "base": base, **body}).encode())


def load(
    path: Path, version: int, base: str, parse: Callable[[dict[str, Any]], T], *, without: str
) -> T | None:
    """What `parse` makes of the file; None where there is none of this version and model.

    Args:
        without: what happens once the file is deleted, for the message.

    Raises:
        HogwildError: the file is damaged.
    """
    try:
        body = json.loads(path.read_bytes())
        if body["version"] != version or body["base"] != base:
            return None
        return parse(body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HogwildError(f"{path} cannot be read ({in_short(error)}); delete it {without}") from error
