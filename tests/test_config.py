import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from hogwild.config import field_paths, load, usable
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


NUMBERS = [
    keys
    for keys in field_paths()
    if len(keys) == 2 and type(getattr(getattr(Config(), keys[0]), keys[1])) in (int, float)
]


@pytest.mark.parametrize("keys", NUMBERS, ids=".".join)
@pytest.mark.parametrize("too_much", [10**40, -(10**40), 1e300, float("nan"), float("inf")])
def test_a_number_that_neither_the_ledger_nor_a_wait_could_hold_is_refused(keys, too_much):
    with pytest.raises(ConfigError, match=re.escape(f"command line: {'.'.join(keys)}: ")):
        load(overrides={".".join(keys): too_much})


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
    monkeypatch.setenv("HOGWILD_OPTIMIZER__BETAS", "[0.8, 2]")
    with pytest.raises(ConfigError, match=r"\$HOGWILD_OPTIMIZER__BETAS: optimizer.betas.1: .*less than 1"):
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


@pytest.mark.parametrize("key", ["state_dir", "socket", "spool.dir", "probes.file"])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("~nobody-at-all/x", "nobody knows the home folder ~nobody-at-all"),
        ("/a\0b", "a path has no NUL in it"),
    ],
)
def test_a_path_that_cannot_be_one_is_refused_with_its_key(key, path, says):
    with pytest.raises(ConfigError) as caught:
        load(None, {key: path})
    assert f"(1 found):\n  - command line: {key}: {says}" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "127.0.0.1:8000", "http://", "http://::1:8000", "http://a:port"]
)
def test_a_url_of_the_server_that_cannot_be_asked_is_refused(tmp_path, url):
    path = write(tmp_path, f'[server]\nurl = "{url}"\n')
    with pytest.raises(
        ConfigError, match=f"server.url: must be like http://127.0.0.1:8000, not '{re.escape(url)}'"
    ):
        load(path)
    for good in ("http://127.0.0.1:8000", "https://[::1]/behind/a/proxy"):
        assert load(None, {"server.url": good}).server.url == good


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


def test_a_model_in_ones_home_is_found_there_and_one_on_the_hub_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load(write(tmp_path, 'model = "~/models/m"\n[server]\nmodel = "~/models/n"\n'))
    assert (config.model, config.server.model) == ("/home/ann/models/m", "/home/ann/models/n")
    config = load(None, {"model": "org/m"})
    assert (config.model, config.server.model) == ("org/m", "")


def test_a_file_of_an_editor_that_begins_it_with_a_byte_order_mark_is_read(tmp_path):
    path = write(tmp_path, '\ufeffmodel = "m"\n')
    assert load(path).model == "m"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("table", "line", "says"),
    [
        ("training", "threads = true", "training.threads: input should be a valid integer, not True"),
        ("training", 'threads = "2"', "training.threads: input should be a valid integer, not '2'"),
        ("training", "threads = 2.0", "training.threads: input should be a valid integer, not 2.0"),
        ("training", "low_priority = 1", "training.low_priority: input should be a valid boolean, not 1"),
        ("training", 'low_priority = "no"', "training.low_priority: input should be a valid boolean, not 'no'"),
        ("optimizer", 'lr = "0.1"', "optimizer.lr: input should be a valid number, not '0.1'"),
        ("optimizer", "lr = true", "optimizer.lr: input should be a valid number, not True"),
        ("optimizer", 'betas = ["0.9", 0.999]', "optimizer.betas.0: input should be a valid number, not '0.9'"),
        ("server", 'arguments = "--port 8000"', "server.arguments: input should be a valid array"),
        ("server", "arguments = [8000]", "server.arguments.0: input should be a valid string, not 8000"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_not_guessed_at(tmp_path, table, line, says):
    path = write(tmp_path, f"[{table}]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert says in str(caught.value)


def test_whole_numbers_are_numbers_and_text_of_the_environment_is_read_as_what_the_key_holds(
    tmp_path, monkeypatch
):
    path = write(tmp_path, "[optimizer]\nlr = 1\nbetas = [0, 0.5]\n[checkpoint]\ninterval_s = 300\n")
    for name, text in {
        "TRAINING__THREADS": "3", "TRAINING__LOW_PRIORITY": "False", "OPTIMIZER__EPS": "1e-5", "SPOOL__SETTLE_S": "2",
        "SERVER__ARGUMENTS": '["--port", "1"]', "PROBES__FILE": "/etc/probes.jsonl", "SERVER__MODEL": "7",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"HOGWILD_{name}", text)
    config = load(path)
    assert (config.optimizer.lr, config.optimizer.betas, config.checkpoint.interval_s) == (
        1.0,
        (0.0, 0.5),
        300.0,
    )
    assert (config.training.threads, config.training.low_priority, config.optimizer.eps) == (3, False, 1e-5)
    assert (config.spool.settle_s, config.server.arguments) == (2.0, ("--port", "1"))
    assert (config.probes.file, config.server.model) == (Path("/etc/probes.jsonl"), "7")
    monkeypatch.setenv("HOGWILD_TRAINING__THREADS", "three")
    with pytest.raises(ConfigError, match=r"\$HOGWILD_TRAINING__THREADS: training.threads: .*integer"):
        load(path)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("HOGWILD_STATEDIR", "HOGWILD_STATE_DIR"),
        ("HOGWILD_TRAINING_THREADS", "HOGWILD_TRAINING__THREADS"),
        ("HOGWILD_LR", "HOGWILD_OPTIMIZER__LR"),
        ("HOGWILD_API_KYE", "HOGWILD_API_KEY"),
    ],
)
def test_a_variable_that_names_no_setting_is_refused_and_the_nearest_is_named(monkeypatch, name, nearest):
    monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HOGWILD_ZZZ", "7")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "$HOGWILD_ZZZ: names no setting: unset it" in str(caught.value)
    assert f"${name}: names no setting; did you mean ${nearest}" in str(caught.value)


def test_variables_that_a_service_called_hogwild_has_in_kubernetes_are_nobodys_mistake(monkeypatch):
    for name in (
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_HTTP",
        "PORT",
        "PORT_8000_TCP",
        "PORT_8000_TCP_ADDR",
    ):
        monkeypatch.setenv(f"HOGWILD_{name}", "tcp://10.0.0.1:8000")
    assert load().training.threads == 2
    monkeypatch.setenv("HOGWILD_PORTS", "7")
    with pytest.raises(ConfigError, match="HOGWILD_PORTS"):
        load()


def test_the_variable_that_holds_the_servers_key_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOGWILD_VLLM_SECRET", "s")
    with pytest.raises(ConfigError, match="HOGWILD_VLLM_SECRET"):
        load()
    load(write(tmp_path, '[server]\napi_key_env = "HOGWILD_VLLM_SECRET"\n'))
    monkeypatch.setenv("HOGWILD_SERVER__API_KEY_ENV", "HOGWILD_VLLM_SECRET")
    load()


def test_every_variable_that_hogwild_itself_reads_or_sets_is_known(monkeypatch):
    repository = EXAMPLE.parents[1]
    settings = {"HOGWILD_" + "__".join(keys).upper() for keys in field_paths()}
    named = set()
    for folder in ("daemon", "kernels", "benchmarks", "scripts", "systemd", "config", "docs"):
        for path in (repository / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".service", ".toml", ".md"):
                named |= set(re.findall(r"\bHOGWILD_[A-Z]\w*[A-Z]\b(?!_)", path.read_text()))
    assert named >= {"HOGWILD_CONFIG", "HOGWILD_API_KEY", "HOGWILD_SERVER_URL", "HOGWILD_TRAINING__THREADS"}
    for name in named - settings:
        monkeypatch.setenv(name, "1")
    load()


def test_what_is_wrong_can_be_left_out_to_look_at_the_rest(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        'modle = "x"\nmodel = "/m"\nlog = []\n[training]\nthreads = true\npasses = 7\n[optimizer]\n'
        "betas = [0.9, true]\n"
        "[optimiser]\nlr = 1\n",
    )
    monkeypatch.setenv("HOGWILD_TRAINING__SEDE", "3")
    monkeypatch.setenv("HOGWILD_STATEDIR", "/s")
    config = usable(path)
    assert (config.model, config.training.passes, config.training.threads) == ("/m", 7, 2)
    assert config.optimizer == Config().optimizer
    assert usable(write(tmp_path, "model = ")) == Config()
    monkeypatch.setenv("HOGWILD_STATE_DIR", "/" + "a" * 200)
    monkeypatch.delenv("HOGWILD_STATEDIR")
    with pytest.raises(ConfigError, match="Unix sockets allow"):
        usable(None)


def test_two_settings_that_exclude_each_other_are_named_and_the_rest_can_be_looked_at(tmp_path):
    path = write(tmp_path, 'model = "/m"\n[optimizer]\nweight_decay = 0.1')
    with pytest.raises(
        ConfigError, match=rf"{path}: optimizer: weight_decay shrinks .* replay.protected_rank"
    ):
        load(path)
    config = usable(path)
    assert (config.model, config.optimizer) == ("/m", Config().optimizer)
