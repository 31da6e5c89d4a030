import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from hogwild.config import field_paths, load
from hogwild.errors import ConfigError
from hogwild.settings import Config, default_state_dir

EXAMPLE = Path(__file__).parent.parent / "config" / "hogwild.toml"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hogwild.toml"
    path.write_text(text)
    return path


def test_the_documented_file_has_every_key_and_its_default():
    documented = tomllib.loads(EXAMPLE.read_text())
    keys = {
        (name, key) if isinstance(value, dict) else (name,)
        for name, value in documented.items()
        for key in (value if isinstance(value, dict) else [None])
    }
    assert keys == set(field_paths())
    assert load(EXAMPLE) == load() == Config()


def test_every_key_of_the_documented_file_has_a_comment_above_it():
    lines = EXAMPLE.read_text().splitlines()
    bare = [line for above, line in pairwise(lines) if " = " in line and line[0] != "#" and above[:1] != "#"]
    assert not bare


def test_all_problems_are_in_one_error_with_file_key_and_the_nearest_name(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        'modle = "x"\nlr = 3\n[spool]\nrescan_intervall_s = 2\nsettle_s = nan\n[training]\nthreads = "two"\n'
        "[optimiser]\nlr = 1\n",
    )
    monkeypatch.setenv("HOGWILD_TRAINING__PASES", "3")
    with pytest.raises(ConfigError) as caught:
        load(path, {"log.level": "loud", "checkpoint": {"keep": 0}})
    message = str(caught.value)
    for part in (
        f"{path}: modle: unknown key; did you mean `model`?",
        f"{path}: lr: unknown key; did you mean `optimizer.lr`?",
        f"{path}: spool.rescan_intervall_s: unknown key; did you mean `rescan_interval_s`?",
        f"{path}: spool.settle_s: ",
        f"{path}: training.threads: ",
        f"{path}: optimiser: unknown key; did you mean `optimizer`?",
        "$HOGWILD_TRAINING__PASES: training.pases: unknown key; did you mean `passes`?",
        "command line: log.level: ",
        "command line: checkpoint.keep: ",
    ):
        assert part in message
    assert "9 found" in message
    assert caught.value.exit_code == 78


def test_later_sources_win(tmp_path, monkeypatch):
    path = write(tmp_path, "[training]\nthreads = 3\npasses = 3\nseed = 3\n")
    monkeypatch.setenv("HOGWILD_TRAINING__PASSES", "5")
    monkeypatch.setenv("HOGWILD_TRAINING__SEED", "5")
    monkeypatch.setenv("HOGWILD_OPTIMIZER__BETAS", "[0.8, 0.9]")
    monkeypatch.setenv("HOGWILD_OPTIMIZER__ROUNDING", "nearest")
    config = load(path, {"training": {"seed": 7, "threads": None}})
    assert (config.training.threads, config.training.passes, config.training.seed) == (3, 5, 7)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.rounding == "nearest"


def test_foreign_environment_variables_are_left_alone_but_a_bad_value_is_not(monkeypatch):
    monkeypatch.setenv("HOGWILD_API_KEY", "secret")
    assert load() == Config()
    monkeypatch.setenv("HOGWILD_OPTIMIZER__BETAS", "[0.8")
    with pytest.raises(ConfigError, match=r"\$HOGWILD_OPTIMIZER__BETAS: optimizer.betas: "):
        load()


def test_paths_follow_systemd_then_xdg_then_the_state_folder(monkeypatch, tmp_path):
    assert load().state_dir == default_state_dir() == tmp_path / "state" / "hogwild"
    assert load().socket == load().state_dir / "arena.sock"
    assert load().spool.dir == load().state_dir / "spool"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert load().socket == Path("/run/user/1/hogwild/arena.sock")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/hogwild:/var/lib/more")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/hogwild")
    config = load(overrides={"spool.dir": "~/drop"})
    assert config.state_dir == Path("/var/lib/hogwild")
    assert config.socket == Path("/run/hogwild/arena.sock")
    assert config.spool.dir == Path.home() / "drop"
    assert load(overrides={"state_dir": "relative"}).state_dir == Path.cwd() / "relative"


def test_a_socket_path_that_the_kernel_cannot_take_is_refused_before_it_is_used():
    just_fits = "/" + "a" * 106
    assert load(overrides={"socket": just_fits}).socket == Path(just_fits)
    with pytest.raises(ConfigError, match=r"socket: .* 108 bytes long, Unix sockets allow 107"):
        load(overrides={"socket": just_fits + "a", "model": 3})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model = ", "is not TOML"),
        ("[model]\nx = 1\n", "model: "),
        ("spool = 3\n", "spool: "),
        ("log = []\n", "log: "),
    ],
)
def test_a_file_of_the_wrong_shape_is_one_clear_error(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        load(write(tmp_path, text), {"spool.settle_s": 1})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml")
