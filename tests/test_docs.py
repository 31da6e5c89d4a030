"""The documentation and the code name the same commands, options, keys, metrics and files.

Events are compared in test_events.py, the configuration's defaults in test_config.py.
"""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main

from hogwild import presets
from hogwild.cli import app
from hogwild.config import field_paths
from studio import Studio, model

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group


def test_every_command_is_in_the_table_of_operations_and_no_other() -> None:
    documented = re.findall(r"^\| `hogwild ([a-z]+)` \|", OPERATIONS, re.MULTILINE)
    assert sorted(documented) == sorted(COMMANDS)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_and_options_that_the_documentation_uses_exist(path: Path) -> None:
    text = path.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [*re.findall(r"`([^`\n]+)`", text), *(line for block in blocks for line in block.splitlines())]
    for command, rest in (
        found for line in lines for found in re.findall(r"^(?:sudo )?hogwild ([a-z]+)([^|#;&]*)", line)
    ):
        assert command in COMMANDS
        options = {name for one in COMMANDS[command].params for name in one.opts}
        if command == "vllm":
            continue  # takes those of `vllm serve`
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest):
            assert option in options, f"hogwild {command} {option}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_keys_that_the_documentation_names_exist(path: Path) -> None:
    keys = {".".join(one) for one in field_paths()}
    tables = {key.split(".")[0] for key in keys if "." in key}
    named = set(re.findall(rf"`((?:{'|'.join(sorted(tables))})\.[a-z_]+)`", path.read_text()))
    events = set(re.findall(r"`([a-z]+\.[a-z_]+)`", (REPOSITORY / "docs" / "events.md").read_text()))
    files = {name for name in named if name.endswith((".py", ".sqlite", ".json"))}
    assert named - keys - events - files == set()


def test_every_metric_is_documented() -> None:
    source = REPOSITORY / "daemon" / "hogwild" / "metrics.py"
    tree = ast.parse(source.read_text()) if source.exists() else ast.Module([], [])
    names = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"hogwild_[a-z_]+", str(node.value))
    }
    said = "\n".join(path.read_text() for path in DOCS)
    assert {name for name in names if not re.search(rf"\b{name}(_total)?\b", said)} == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_make_targets_that_the_documentation_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert named - targets == set(), path.name


def test_every_preset_and_every_unit_is_in_operations() -> None:
    for name in (
        *presets.names(),
        *(path.name for path in (REPOSITORY / "systemd").glob("*.*") if path.is_file()),
    ):
        assert name.removesuffix(".service") in OPERATIONS


def test_the_backup_takes_everything_that_cannot_be_made_again(tmp_path: Path) -> None:
    """What a daemon leaves in its state folder, against what the runbook's command leaves out."""
    (command,) = re.findall(r"^rsync -a --delete (.*) /var/lib/hogwild/ /backup/$", OPERATIONS, re.MULTILINE)
    left_out = [one.removeprefix("/") for one in re.findall(r"--exclude='?([^\s']+)'?", command)]
    model(tmp_path / "model")
    studio = Studio(tmp_path)
    studio.drop("a", 2)
    studio.train()
    studio.save()
    studio.learner.wait_for_own_texts()
    there = {path.name for path in studio.config.state_dir.iterdir()}
    studio.close()
    taken = {name for name in there if not any(fnmatch(name, pattern) for pattern in left_out)}
    assert taken == {"checkpoints", "history", "selfreplay.json", "probes.json", "protected.safetensors"}
    for name in taken - {"checkpoints", "history"}:
        assert f"`{name}`" in OPERATIONS
    assert 'sqlite3 /var/lib/hogwild/ledger.sqlite ".backup' in OPERATIONS, "which a plain copy would tear"
