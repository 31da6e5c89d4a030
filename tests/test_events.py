"""docs/events.md names every event that the daemon can log, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LOGS = {"debug", "info", "warning", "error", "exception", "critical", "_say_once"}
EVENT = re.compile(r"[a-z]+\.[a-z_]+")


def logged() -> Iterator[str]:
    """Strings that look like an event, among the first two arguments of a call that logs."""
    for path in (REPOSITORY / "daemon" / "hogwild").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LOGS:
                for part in (leaf for argument in node.args[:2] for leaf in ast.walk(argument)):
                    if isinstance(part, ast.Constant) and EVENT.fullmatch(str(part.value)):
                        yield str(part.value)


def test_every_event_is_documented_and_every_documented_event_exists() -> None:
    rows = [
        line
        for line in (REPOSITORY / "docs" / "events.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    documented = [event for row in rows for event in re.findall(r"`([a-z]+\.[a-z_]+)`", row.split("|")[1])]
    assert len(documented) == len(set(documented))
    assert set(documented) == set(logged())
