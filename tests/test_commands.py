"""Commands about what was saved, as a person gives them: to a running daemon, and without one."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from hogwild import generation
from hogwild.cli import app
from hogwild.errors import HogwildError
from hogwild.weights import read_tensors
from support import Daemon, digest, environment
from world import World, sums


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("commands"))
    yield world
    world.end()


@pytest.fixture(autouse=True, scope="module")
def logging_as_before() -> Iterator[None]:
    """These commands set up logging for a process of their own."""
    root = logging.getLogger()
    handlers, level, hook, show = root.handlers[:], root.level, sys.excepthook, warnings.showwarning
    yield
    structlog.reset_defaults()
    root.handlers, sys.excepthook, warnings.showwarning = handlers, hook, show
    root.setLevel(level)


@dataclass
class Ran:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


def command(daemon: Daemon, *arguments: object) -> Ran:
    """The command line in this process: starting one takes seconds, and there are many here."""
    ran = CliRunner().invoke(
        app, [str(a) for a in arguments], env={**daemon.settings, "COLUMNS": "200", "NO_COLOR": "1"}
    )
    if isinstance(ran.exception, HogwildError):
        return Ran(ran.exception.exit_code, ran.stdout, str(ran.exception))
    return Ran(ran.exit_code, ran.stdout, ran.stderr)


def ask(daemon: Daemon, *arguments: object) -> Any:
    """What it says with --json."""
    ran = command(daemon, *arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}


def test_a_story_of_two_generations(world: World) -> None:
    """Generation 1 has every weight doubled; a server and a daemon that has restored it."""
    saved, doubled = world.checkpoint(base_path=str(world.model))
    server = world.server()
    plain = sums(server)
    daemon = world.daemon()
    assert daemon.wait_for("arena.attached")["restored"] == str(saved)
    assert sums(server) == doubled != plain

    again = ask(daemon, "checkpoint")
    assert (again["generation"], again["unchanged"]) == (1, True), (
        "nothing was trained: there is nothing to save"
    )

    daemon.wait_for("history.recorded", generation=1)
    zero, one = ask(daemon, "history")
    assert (zero["generation"], one["generation"], one["current"]) == (0, 1, True)
    assert one["restorable"]
    assert one["bytes"] > 0
    table = command(daemon, "history").stdout
    assert "* 1" in " ".join(table.split())
    watching = [sys.executable, "-m", "hogwild", "status", "--watch"]
    for more in ([], ["--json"]):
        with subprocess.Popen(
            [*watching, *more], env=environment(**daemon.settings), stdout=subprocess.PIPE, text=True
        ) as watch:
            seen = 0
            for line in watch.stdout:  # as it comes, also into a pipe
                seen += "process" in line or line.startswith("{")
                if seen == 2:
                    break
            watch.terminate()
        assert seen == 2, more

    moved = ask(daemon, "diff", 0, 1)
    assert {round(record["change"], 6) for record in moved} == {1.0}, "|2 W - W| / |W|"
    assert all(record["layer"].startswith("model.") for record in moved)
    assert "1.000e+00  model.layers." in command(daemon, "diff", 0, 1).stdout

    done = ask(daemon, "rollback", 0)
    assert (done["generation"], done["left"], done["live"]) == (0, 1, True)
    assert sums(server) == plain, "the same server, whose weights were rewritten under it"
    assert ask(daemon, "history")[1]["undone"]
    assert "generation 1, in the served weights: 0 passes undone" in command(daemon, "rollback", 1).stdout
    assert sums(server) == doubled
    names = [event["event"] for event in daemon.events() if event["event"].startswith("rollback")]
    assert names == ["rollback.started", "rollback.done"] * 2

    target = world.root / "exported"
    assert command(daemon, "export", 1, target).returncode == 0
    assert files(target) == files(saved)
    refused = command(daemon, "export", 1, target)
    assert refused.returncode == 2
    assert f"{target} is not empty" in refused.stderr
    for words in (("export", 7, world.root / "other"), ("diff", 1, 7), ("rollback", 7)):
        refused = command(daemon, *words)
        assert refused.returncode == 1
        assert "there is no generation 7" in refused.stderr
    assert command(daemon, "rollback", -1).returncode == 2

    assert daemon.terminate() == 0
    offline(daemon)
    assert sums(server) == doubled, "no daemon, no change in memory"
    daemon = world.daemon()
    daemon.wait_for("arena.attached")
    assert sums(server) == plain, "the server that stayed is written when the daemon comes back"
    assert (
        dict(read_tensors(daemon.state / "checkpoints" / "current")).keys()
        == dict(read_tensors(world.model)).keys()
    )
    assert daemon.terminate() == 0


def offline(daemon: Daemon) -> None:
    """The same commands while no daemon runs."""
    assert len(ask(daemon, "history")) == 2
    ran = command(daemon, "rollback", 0)
    assert ran.returncode == 0, ran.stderr
    assert "generation 0, on disk" in ran.stdout
    current = daemon.state / "checkpoints" / "current"
    assert generation.verify(current.resolve())["generation"] == 0
    assert [record["generation"] for record in ask(daemon, "history") if record["current"]] == [0]
    assert command(daemon, "checkpoint").returncode == 1


def test_without_any_state_it_says_so(tmp_path: Path) -> None:
    daemon = Daemon.__new__(Daemon)
    daemon.settings = {"HOGWILD_STATE_DIR": str(tmp_path / "state"), "HOGWILD_SOCKET": str(tmp_path / "s")}
    for words in (("history",), ("diff", 0, 1), ("export", 0, tmp_path / "out"), ("rollback", 0)):
        ran = command(daemon, *words)
        assert ran.returncode == 1, ran
        assert str(tmp_path / "state") in ran.stderr
    assert json.loads(command(daemon, "history", "--json").stdout) == []
    assert not (tmp_path / "state").exists(), "looking changes nothing"
