"""The command line as a user meets it: in a process of its own, by its exit code and what it prints."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hogwild import __version__, openmp, state_lock
from hogwild.cli import app
from hogwild.errors import ConfigError, HogwildError, UsageError
from hogwild.vllm_plugin import launch
from support import environment
from tiny import Child, llama, tokenizer

COMMANDS = (
    "serve", "vllm", "status", "checkpoint", "history", "diff", "export", "rollback", "check", "train", "demo",
    "report", "quarantine", "config", "doctor", "install", "uninstall", "version",
)  # fmt: skip


def hogwild(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    env = environment(**{f"HOGWILD_{key.upper()}": str(value) for key, value in settings.items()})
    return subprocess.run(
        [sys.executable, "-m", "hogwild", *map(str, arguments)],
        env={**env, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", ["serve", "train"])
def test_threads_inside_an_operator_sleep_instead_of_spinning(tmp_path, command):
    """Beside a busy server, spinning ones make the daemon ten times slower. OpenMP says itself what it has read."""
    (file := tmp_path / "facts.jsonl").write_text('{"text": "a"}\n')  # without a line, `train` loads nothing
    (tmp_path / "config.json").write_text("{}")
    train = [file, "--model", tmp_path, "--out", tmp_path / "out"]
    arguments = {"serve": [], "train": train}[command]
    env = environment(OMP_DISPLAY_ENV="verbose", HOGWILD_STATE_DIR=str(tmp_path / "state"))
    for name in openmp.PASSIVE:
        env.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-m", "hogwild", command, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = next((line for line in process.stdout if "GOMP_SPINCOUNT" in line), "it ended")
        process.kill()
    assert said.strip() == "GOMP_SPINCOUNT = '0'"


def test_help_names_every_command():
    ran = hogwild("--help")
    assert ran.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    ran = CliRunner().invoke(app, [command, "--help"])
    assert ran.exit_code == 0
    assert "Usage" in ran.stdout


def test_version():
    assert hogwild("version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["unheard-of"],
        ["serve", "--unheard-of"],
        ["check"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_2(arguments):
    ran = hogwild(*arguments)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert ran.stderr.strip()


def vllm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], Result]:
    """What of these arguments reaches `vllm serve`, the model first; and how the command ended."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    reached: list[str] = []
    monkeypatch.setattr(os, "execve", lambda _program, command, _environment: reached.extend(command[4:]))
    ran = CliRunner().invoke(app, ["vllm", *arguments])
    ours = launch.command("", [])[5:]
    assert reached[1 : 1 + len(ours)] == ours[: len(reached)]
    return [one for one in reached if one not in ours], ran


@pytest.mark.parametrize(
    "arguments",
    [
        ["-cc", '{"mode": 0}'], ["-cc.mode=0"], ["-ac", "{}"], ["-tp", "1", "-dph", "x"], ["-O3", "-q", "fp8"],
        ["--port=1", "--x", "-1.5"],
    ],
)  # fmt: skip
def test_every_argument_of_vllm_is_passed_on(monkeypatch, tmp_path, arguments):
    (config := tmp_path / "hogwild.toml").write_text('model = "/m"\n')
    assert vllm(monkeypatch, "m", *arguments, "-c", str(config))[0] == ["m", *arguments]
    assert vllm(monkeypatch, "-c", str(config), *arguments)[0] == ["/m", *arguments]


def test_a_file_of_vllm_names_the_model_where_nobody_else_does(monkeypatch, tmp_path):
    (theirs := tmp_path / "vllm.yaml").write_text("model: /theirs\nport: 9000\n")
    (config := tmp_path / "hogwild.toml").write_text("")
    ours = ["-c", str(config)]
    assert vllm(monkeypatch, *ours, "--", "--config", str(theirs))[0] == ["/theirs", "--config", str(theirs)]
    assert vllm(monkeypatch, *ours, "m", "--", "--config", str(theirs))[0] == ["m", "--config", str(theirs)]
    reached, ran = vllm(monkeypatch, "m", "--config", str(theirs))
    assert not reached
    assert "hogwild vllm MODEL -- --config FILE" in str(ran.exception)


def test_a_folder_that_is_not_there_is_said_before_vllm_takes_it_for_a_name(monkeypatch, tmp_path):
    for model in ("/models/typo", "./typo", "../typo"):
        reached, ran = vllm(monkeypatch, model)
        assert not reached
        assert f"{model}: there is no such folder" in str(ran.exception)
    assert vllm(monkeypatch, "org/name")[0] == ["org/name"]
    assert vllm(monkeypatch, str(tmp_path))[0] == [str(tmp_path)]
    (config := tmp_path / "hogwild.toml").write_text('model = "/models/late"\n')
    reached, ran = vllm(monkeypatch, "-c", str(config))
    assert reached[:1] == ["/models/late"], "a service tries again, and its disk may have come"
    assert "/models/late: there is no such folder" in ran.output


def test_a_model_that_is_named_after_options_is_asked_for_before_them(monkeypatch):
    reached, ran = vllm(monkeypatch, "--port", "8000", "m")
    assert not reached
    assert isinstance(ran.exception, ConfigError)
    assert "before any option of vLLM" in str(ran.exception)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--load_format=auto", "--load-format auto: nothing could be trained"),
        ("--uds=/run/vllm.sock", "--uds: the daemon asks the server over TCP"),
        ("--port=0", "--port 0: the daemon has to know where the server answers"),
    ],
)
def test_a_server_whose_weights_could_not_be_trained_is_not_started(monkeypatch, argument, says):
    reached, ran = vllm(monkeypatch, "m", argument)
    assert not reached
    assert isinstance(ran.exception, UsageError)
    assert says in str(ran.exception)


@pytest.mark.parametrize("command", ["serve", "checkpoint"])
def test_a_bad_configuration_is_exit_78_and_lists_what_is_wrong(tmp_path, command):
    path = tmp_path / "bad.toml"
    path.write_text("modle = 3\n[training]\nthreads = 0\n")
    ran = hogwild(command, "--config", path, state_dir=tmp_path / "state")
    assert ran.returncode == 78
    assert "modle: unknown key; did you mean `model`?" in ran.stderr
    assert "training.threads" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", [["serve"], ["config", "--check"]])
def test_a_file_of_probes_that_is_none_is_exit_78(tmp_path, command):
    """Before a server comes, whose weights would be refused for it."""
    config, probes = tmp_path / "hogwild.toml", tmp_path / "probes.jsonl"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n[probes]\nfile = "{probes}"\n')
    ran = hogwild(*command, "--config", config)
    assert ran.returncode == 78
    assert f"probes.file: {probes}: No such file or directory" in ran.stderr
    probes.write_text('{"text": "a"}\n{"txt": "b"}\n')
    ran = hogwild(*command, "--config", config)
    assert ran.returncode == 78
    assert "line 2: txt: " in ran.stderr


def test_a_configuration_that_is_not_there_is_exit_78(tmp_path):
    ran = hogwild("serve", "--config", tmp_path / "absent.toml")
    assert ran.returncode == 78
    assert "absent.toml" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_state_folder_that_cannot_be_made_is_exit_78(tmp_path):
    (tmp_path / "file").write_text("")
    ran = hogwild("serve", state_dir=tmp_path / "file" / "state")
    assert ran.returncode == 78
    assert f"state_dir {tmp_path}/file/state cannot be used" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_socket_folder_that_cannot_be_made_is_exit_1(tmp_path):
    (tmp_path / "file").write_text("")
    ran = hogwild("serve", state_dir=tmp_path / "state", socket=tmp_path / "file" / "arena.sock")
    assert ran.returncode == 1
    assert "cannot listen on" in ran.stderr
    assert "Traceback" not in ran.stderr


# --- which process is the daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "checkpoint"])
def test_without_a_daemon_it_says_so(tmp_path, command):
    ran = hogwild(command, state_dir=tmp_path / "state")
    assert ran.returncode == 1
    assert f"no daemon is running with the state folder {tmp_path}/state" in ran.stderr
    assert ran.stdout == ""
    assert not (tmp_path / "state").exists(), "looking changes nothing"


def hold(pipe, state_dir: Path) -> None:
    """What the daemon does: takes the lock, and counts the signals."""
    signal.signal(signal.SIGUSR1, lambda *_: pipe.send(("asked", None)))
    state_lock.take(state_dir)
    pipe.send(("holds", None))
    while True:
        signal.pause()


def test_a_recycled_process_id_is_not_taken_for_the_daemon(tmp_path):
    """A daemon was killed; its number, in status.json and in the lock file, now belongs to somebody else."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "status.json").write_text(json.dumps({"pid": bystander.pid, "step": 5}))
        (tmp_path / "daemon.lock").write_text(f"{bystander.pid}\n")
        for command in ("status", "checkpoint"):
            ran = hogwild(command, state_dir=tmp_path)
            assert ran.returncode == 1
            assert "no daemon is running" in ran.stderr
        assert bystander.poll() is None, "nobody sent it a signal"
    finally:
        bystander.kill()
        bystander.wait()


def test_the_running_daemon_is_asked_and_reported(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"pid": 1, "step": 5}))
    daemon = Child(hold, tmp_path)
    daemon.hear("holds")
    ran = hogwild("checkpoint", state_dir=tmp_path, socket=tmp_path / "arena.sock")
    assert ran.returncode == 1
    assert f"the daemon on {tmp_path / 'arena.sock'} cannot be asked" in ran.stderr
    said = json.loads(hogwild("status", "--json", state_dir=tmp_path).stdout)
    assert said == {"pid": daemon.pid, "training": False}, "what an earlier daemon wrote is not reported"
    for half in ("", '{"pid": '):  # what a power cut may leave of it
        (tmp_path / "status.json").write_text(half)
        assert json.loads(hogwild("status", "--json", state_dir=tmp_path).stdout) == said
    (tmp_path / "status.json").write_text(json.dumps({"pid": daemon.pid, "step": 6}))
    assert json.loads(hogwild("status", "--json", state_dir=tmp_path).stdout)["step"] == 6
    assert "6" in hogwild("status", state_dir=tmp_path).stdout
    daemon.kill()
    assert hogwild("checkpoint", state_dir=tmp_path).returncode == 1


def test_the_lock_goes_with_its_process_and_names_it(tmp_path):
    assert state_lock.holder(tmp_path) is None
    first = Child(hold, tmp_path)
    first.hear("holds")
    assert state_lock.holder(tmp_path) == first.pid
    with pytest.raises(HogwildError, match="another daemon works in"):
        state_lock.take(tmp_path)
    assert state_lock.holder(tmp_path) == first.pid, "a refused one does not write its name"
    first.kill()
    assert state_lock.holder(tmp_path) is None
    fd = state_lock.take(tmp_path)
    assert state_lock.holder(tmp_path) == os.getpid()
    os.close(fd)


def test_somebody_who_looks_does_not_keep_a_daemon_from_starting(tmp_path):
    def look(pipe) -> None:
        fd = os.open(tmp_path / state_lock.NAME, os.O_RDONLY | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        pipe.send(("looking", None))
        pipe.poll(0.2)

    child = Child(look)
    child.hear("looking")
    os.close(state_lock.take(tmp_path))


def test_a_state_folder_that_is_a_file_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        state_lock.take(tmp_path / "file")
    assert state_lock.holder(tmp_path / "file") is None


# --- check ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "w1 w2 w3"}\n{"prompt": "w1", "completion": " w2"}\n')
    bad.write_text('{"text": "w1 w2"}\n{"txet": 1}\n')
    return [good, bad]


def test_check_is_0_when_every_line_is_good_and_1_when_one_is_not(files):
    good = hogwild("check", files[0])
    assert good.returncode == 0
    assert "2 of 2 lines" in good.stdout
    both = hogwild("check", *files)
    assert both.returncode == 1
    assert "bad.jsonl:2 txet: unknown field; did you mean `text`?" in both.stdout


@pytest.mark.parametrize(
    "arguments", [["check", "good.jsonl"], ["check", "--json", "good.jsonl"], ["config", "--json"]]
)
def test_a_full_disk_below_stdout_is_told_as_that(files, arguments):
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "hogwild", *arguments], cwd=files[0].parent, env=environment(),
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr == "hogwild: No space left on device: what was written is not complete\n"


def test_check_prints_one_json_object_a_line_and_nothing_else(files):
    ran = hogwild("check", "--json", *files)
    assert ran.returncode == 1
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(Path(r["file"]).name, r["line"], r["ok"]) for r in records] == [
        ("good.jsonl", 1, True),
        ("good.jsonl", 2, True),
        ("bad.jsonl", 1, True),
        ("bad.jsonl", 2, False),
    ]
    assert records[3]["field"] == "txet"
    assert ran.stderr == ""


def test_check_with_a_model_counts_tokens(files, tmp_path):
    tokenizer(llama(tmp_path / "model"))
    ran = hogwild("check", "--json", "--model", tmp_path / "model", files[0])
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    assert (first["tokens"], first["trained_tokens"]) == (4, 3)
    assert (second["tokens"], second["trained_tokens"]) == (3, 2)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("arguments", [["absent.jsonl"], ["--model", "absent", "good.jsonl"]], ids=str)
def test_check_of_something_that_is_not_there_is_a_usage_error(tmp_path, arguments):
    names = [tmp_path / name if name[:2] != "--" else name for name in arguments]
    ran = hogwild("check", *names)
    assert ran.returncode == 2
    assert "absent" in ran.stderr
    assert "Traceback" not in ran.stderr


# --- what a terminal and a shell see --------------------------------------------------------------------------------


WORK = """
import sys
from pathlib import Path
from hogwild import files, progress
with progress.writing("generation 7"), progress.waiting("something"):
    files.new_file(Path(sys.argv[1]), lambda sink: sink.write(bytes(5_000_000)))
"""


def test_long_work_moves_on_a_terminal_and_is_silent_elsewhere(tmp_path):
    import pty

    elsewhere = subprocess.run([sys.executable, "-c", WORK, tmp_path / "1"], capture_output=True, check=True)
    assert (elsewhere.stdout, elsewhere.stderr) == (b"", b"")
    ours, theirs = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="120")
    ran = subprocess.run([sys.executable, "-c", WORK, tmp_path / "2"], env=env, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # how a terminal says that the other end is closed
    os.close(ours)
    assert ran.stdout is None
    assert b"generation 7" in shown
    assert b"5.0 MB" in shown


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("hogwild roll", "rollback"),
        ("hogwild config --pre", "--preset"),
        ("hogwild config training.th", "training.threads"),
        ("hogwild install --preset gpu-2", "gpu-24gb"),
    ],
)
def test_the_shell_completes_commands_options_keys_and_presets(words, found):
    env = environment(COMP_WORDS=words, COMP_CWORD=str(words.count(" ")), _HOGWILD_COMPLETE="complete_bash")
    code = "import sys; sys.argv[0] = 'hogwild'; from hogwild.cli import app; app(prog_name='hogwild')"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert found in ran.stdout.split(), ran.stdout + ran.stderr
