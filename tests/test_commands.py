"""Commands about what was saved, as a person gives them: to a running daemon, and without one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hogwild import generation
from hogwild.weights import read_tensors
from support import Daemon, digest
from test_supervisor import World, checkpoint_of, sums


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("commands"))
    yield world
    world.end()


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}


def test_a_story_of_two_generations(world: World) -> None:
    """Generation 1 has every weight doubled; a server and a daemon that has restored it."""
    saved, doubled = checkpoint_of(world)
    server = world.server()
    plain = sums(server)
    daemon = world.daemon()
    assert daemon.wait_for("arena.attached")["restored"] == str(saved)
    assert sums(server) == doubled != plain

    again = daemon.ask("checkpoint")
    assert (again["generation"], again["unchanged"]) == (1, True), (
        "nothing was trained: there is nothing to save"
    )

    daemon.wait_for("history.recorded", generation=1)
    zero, one = daemon.ask("history")
    assert (zero["generation"], one["generation"], one["current"]) == (0, 1, True)
    assert one["restorable"]
    assert one["bytes"] > 0
    table = daemon.command("history").stdout
    assert "* 1" in " ".join(table.split())

    moved = daemon.ask("diff", 0, 1)
    assert {round(record["change"], 6) for record in moved} == {1.0}, "|2 W - W| / |W|"
    assert all(record["layer"].startswith("model.") for record in moved)
    assert "1.000e+00  model.layers." in daemon.command("diff", 0, 1).stdout

    done = daemon.ask("rollback", 0)
    assert (done["generation"], done["left"], done["live"]) == (0, 1, True)
    assert sums(server) == plain, "the same server, whose weights were rewritten under it"
    assert daemon.ask("history")[1]["undone"]
    assert "generation 1, in the served weights: 0 passes undone" in daemon.command("rollback", 1).stdout
    assert sums(server) == doubled
    names = [event["event"] for event in daemon.events() if event["event"].startswith("rollback")]
    assert names == ["rollback.started", "rollback.done"] * 2

    target = world.root / "exported"
    assert daemon.command("export", 1, target).returncode == 0
    assert files(target) == files(saved)
    refused = daemon.command("export", 1, target)
    assert refused.returncode == 2
    assert f"{target} is not empty" in refused.stderr
    for command in (("export", 7, world.root / "other"), ("diff", 1, 7), ("rollback", 7)):
        refused = daemon.command(*command)
        assert refused.returncode == 1
        assert "there is no generation 7" in refused.stderr
    assert daemon.command("rollback", -1).returncode == 2

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
    assert len(daemon.ask("history")) == 2
    ran = daemon.command("rollback", 0)
    assert ran.returncode == 0, ran.stderr
    assert "generation 0, on disk" in ran.stdout
    current = daemon.state / "checkpoints" / "current"
    assert generation.verify(current.resolve())["generation"] == 0
    assert [record["generation"] for record in daemon.ask("history") if record["current"]] == [0]
    assert daemon.command("checkpoint").returncode == 1


def test_without_any_state_it_says_so(tmp_path: Path) -> None:
    daemon = Daemon.__new__(Daemon)
    daemon._settings = {"HOGWILD_STATE_DIR": str(tmp_path / "state"), "HOGWILD_SOCKET": str(tmp_path / "s")}
    for command in (("history",), ("diff", 0, 1), ("export", 0, tmp_path / "out"), ("rollback", 0)):
        ran = daemon.command(*command)
        assert ran.returncode == 1, ran
        assert str(tmp_path / "state") in ran.stderr
        assert "Traceback" not in ran.stderr
    assert json.loads(daemon.command("history", "--json").stdout) == []
    assert not (tmp_path / "state").exists(), "looking changes nothing"
