"""`hogwild config`, presets, and where the file is looked for."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hogwild import config as configuration
from hogwild import presets
from hogwild.cli import app
from hogwild.config import field_paths, load
from hogwild.errors import ConfigError
from hogwild.settings import Config


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "HOGWILD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(configuration, "SYSTEM_FILE", tmp_path / "etc.toml")


def run(*arguments: object, code: int = 0) -> str:
    ran = CliRunner().invoke(app, ["config", *map(str, arguments)])
    assert ran.exit_code == code, ran.output
    return ran.stdout


def test_every_value_and_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hogwild.toml"
    path.write_text('state_dir = ""\n[training]\nthreads = 3\npasses = 4\n')
    monkeypatch.setenv("HOGWILD_TRAINING__PASSES", "7")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/hogwild")
    found = {one["key"]: (one["value"], one["origin"]) for one in json.loads(run("--json", "-c", path))}
    assert set(found) == {".".join(keys) for keys in field_paths()}
    assert found["training.threads"] == (3, str(path))
    assert found["training.passes"] == (7, "$HOGWILD_TRAINING__PASSES")
    assert found["training.seed"] == (0, "default")
    assert found["state_dir"] == ("/var/lib/hogwild", "$STATE_DIRECTORY")
    assert run("training.passes", "-c", path) == "7\n"
    changed = json.loads(run("--json", "--changed", "-c", path))
    assert [one["key"] for one in changed] == ["state_dir", "training.threads", "training.passes"]


def test_what_it_prints_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "again.toml"
    path.write_text(run())
    assert load(path) == load()


def test_a_path_with_any_character_can_be_read_back(tmp_path: Path) -> None:
    (path := tmp_path / "hogwild.toml").write_text(presets.file(None, {("model",): "/srv/😀/模型"}), "utf-8")
    assert load(path).model == "/srv/😀/模型"
    path.write_text(run("-c", path), "utf-8")
    assert load(path).model == "/srv/😀/模型"


def test_check_says_nothing_or_exits_with_78(tmp_path: Path) -> None:
    path = tmp_path / "hogwild.toml"
    path.write_text("[optimizer]\nlr = 1e-5\n")
    assert run("--check", "-c", path) == ""
    path.write_text("[optimizer]\nlrr = 1e-5\n")
    ran = CliRunner().invoke(app, ["config", "--check", "-c", str(path)])
    assert ran.exception is not None
    assert "did you mean `lr`" in str(ran.exception)
    assert getattr(ran.exception, "exit_code", 0) == 78


def test_a_key_that_does_not_exist_names_the_nearest() -> None:
    ran = CliRunner().invoke(app, ["config", "training.thread"])
    assert "did you mean `threads`" in str(ran.exception)


def test_a_tables_name_shows_the_table(tmp_path: Path) -> None:
    path = tmp_path / "hogwild.toml"
    path.write_text("[optimizer]\nrank = 8\n[training]\nseed = 1\n")
    shown = run("optimizer", "-c", path)
    assert tomllib.loads(shown) == {"optimizer": load(path).model_dump(mode="json")["optimizer"]}
    assert f"# {path}" in shown
    wanted = [".".join(keys) for keys in field_paths() if keys[0] == "optimizer"]
    assert [one["key"] for one in json.loads(run("optimizer", "--json", "-c", path))] == wanted
    assert [one["key"] for one in json.loads(run("optimizer", "--json", "--changed", "-c", path))] == [
        "optimizer.rank"
    ]
    ran = CliRunner().invoke(app, ["config", "optimiser"])
    assert "did you mean `optimizer`" in str(ran.exception)
    assert run("server.model") == "\n", "and a key is a key, where a table has one of that name"
    assert run("model") == "\n"


def test_the_file_of_the_user_then_of_the_machine(tmp_path: Path) -> None:
    assert run("training.threads") == "2\n"
    (tmp_path / "etc.toml").write_text("[training]\nthreads = 5\n")
    assert run("training.threads") == "5\n"
    own = tmp_path / "config" / "hogwild" / "hogwild.toml"
    own.parent.mkdir(parents=True)
    own.write_text("[training]\nthreads = 6\n")
    assert run("training.threads") == "6\n"


def test_what_the_units_load_beside_the_machines_file_counts_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they run with it. What a person says in their own shell counts for more, and with another file it does not."""
    machine, other, beside = tmp_path / "etc.toml", tmp_path / "other.toml", tmp_path / "environment"
    for path in (machine, other):
        path.write_text("[training]\nthreads = 5\n")
    beside.write_text(
        '# ours\n; and\nHOGWILD_TRAINING__THREADS=7\nHOGWILD_MODEL="/srv/my \\"own\\" model"\n\nVLLM_API_KEY=k\n'
        "HOGWILD_API_KEY='k k'\nHOGWILD_SOCKET=/run/\\\nx.sock \r\n  HOGWILD_TRAINING__PASSES = 9\n"
    )
    found = {one["key"]: (one["value"], one["origin"]) for one in json.loads(run("--json"))}
    assert found["training.threads"] == (7, f"{beside}: $HOGWILD_TRAINING__THREADS")
    assert found["model"] == ('/srv/my "own" model', f"{beside}: $HOGWILD_MODEL")
    assert found["socket"][0] == "/run/x.sock"
    assert found["training.passes"] == (3, "default"), "systemd takes no space there"
    assert run("training.threads", "-c", machine) == "7\n"
    assert run("training.threads", "-c", other) == "5\n"
    monkeypatch.setenv("HOGWILD_TRAINING__THREADS", "8")
    assert run("training.threads") == "8\n"
    beside.write_text("HOGWILD_TRAINING_THREADS=7\n")
    with pytest.raises(ConfigError, match=rf"{beside}: \$HOGWILD_TRAINING_THREADS: names no setting"):
        load(machine)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_complete_commented_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(run("--preset", name))
    given = presets.values(name)
    loaded = load(path).model_dump(mode="json")
    defaults = Config().model_dump(mode="json")
    for keys in field_paths():
        value, default = loaded, defaults
        for key in keys:
            value, default = value[key], default[key]
        assert value == given.get(keys, default), keys
    # Every default is there to be uncommented: doing so changes nothing.
    text = path.read_text()
    uncommented = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in text.splitlines()
    )
    tomllib.loads(uncommented)
    path.write_text(uncommented)
    again = load(path).model_dump(mode="json")
    assert again == loaded


def test_a_preset_that_does_not_exist_names_those_that_do() -> None:
    ran = CliRunner().invoke(app, ["config", "--preset", "gpu-24"])
    assert "gpu-24gb" in str(ran.exception)
    assert getattr(ran.exception, "exit_code", 0) == 2
