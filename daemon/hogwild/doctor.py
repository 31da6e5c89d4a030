"""Checks."""

from pathlib import Path


def examine(config: Path | None, *, quick: bool, as_json: bool) -> int:
    raise NotImplementedError
