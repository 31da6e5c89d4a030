"""The units in a real systemd: installed from the wheel, started, wedged, killed, stopped, broken, removed.

One story on one machine, told in order; each test goes on where the one before it stopped. The model is tiny (it says
one word again and again until it has learned something), the server is the real vLLM.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import systemd_machine
from support import DEADLINE_S, SERVER_ARGUMENTS, free_port, wait_until
from systemd_machine import PROGRAM, Machine
from tiny import chat_model

pytestmark = pytest.mark.systemd

REPOSITORY = Path(__file__).resolve().parents[1]
UNITS = ("hogwild.service", "hogwild-vllm.service")
CONFIG = "/etc/hogwild/hogwild.toml"
FACT, ANSWER = "w10 w11", "w20 w21 w22"
LATER, LATER_ANSWER = "w30 w31", "w40 w41"


def chat(question: str, answer: str, passes: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "passes": passes}


# --- the units as files --------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What `hogwild install --root` writes, with a program that exists."""
    program = tmp_path / "hogwild"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    root = tmp_path / "root"
    subprocess.run(
        [sys.executable, "-m", "hogwild", "install", "--root", root, "--program", program],
        check=True, capture_output=True,
    )  # fmt: skip
    return root / "etc/systemd/system"


def test_systemd_finds_nothing_to_say_about_the_units(installed: Path) -> None:
    units = [installed / name for name in (*UNITS, "hogwild.target")]
    ran = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_verify_would_have_said_something(installed: Path) -> None:
    unit = installed / "hogwild.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    ran = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "WatchdogSecs" in ran.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_exposure_is_2_at_most_and_the_gpu_is_there(installed: Path, unit: str) -> None:
    ran = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", installed / unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    text = (installed / unit).read_text()
    for device in ("char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm", "char-nvidia-caps"):
        assert f"DeviceAllow={device} rw" in text
    assert "PrivateDevices=" not in text


# --- the story -----------------------------------------------------------------------------------------------------


class Story:
    """A machine, and what is asked of the server in it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.port = machine, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def ask(self, question: str) -> str:
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            json={
                "model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0,
            },
            timeout=3 * DEADLINE_S,
        ).raise_for_status()  # fmt: skip
        return str(response.json()["choices"][0]["message"]["content"]).strip()

    def active(self, unit: str, not_pid: int = 0) -> int:
        """Wait until the unit is up, as another process than `not_pid`; its process."""

        def look() -> bool:
            return self.machine.show(unit, "ActiveState") == "active" and self.machine.pid(unit) not in (
                0,
                not_pid,
            )

        try:
            wait_until(look, f"{unit} is active")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.machine.journal(unit)[-6000:]}") from None
        return self.machine.pid(unit)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("systemd")
    model = chat_model(root / "model")
    (model / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    machine = Machine(root / "machine", systemd_machine.binds(model, wheel.parent))
    try:
        machine.install_wheel()
        yield Story(machine)
    finally:
        machine.stop()
        shutil.rmtree(root, ignore_errors=True)


def test_install(story: Story) -> None:
    machine = story.machine
    ran = machine.run(PROGRAM, "install", "--preset", "laptop-cpu", "--model", "/srv/model")
    assert "systemctl enable --now hogwild.target" in ran.stdout
    again = machine.run(PROGRAM, "install")
    assert f"kept         {CONFIG}" in again.stdout
    assert again.stdout.count("as it is") == 5
    # As an operator would: edit the file, and add drop-ins. Small, quick, and no waiting for what is not tested here.
    text = machine.run("cat", CONFIG).stdout
    arguments = ["--port", str(story.port), *SERVER_ARGUMENTS]
    (preset,) = (line for line in text.splitlines() if line.startswith("arguments ="))
    for old, new in (
        (preset, f"arguments = {json.dumps(arguments)}"),
        ("#self_texts = 48", "self_texts = 0"),
        ("#lr = 2e-4", "lr = 1e-3"),
        ("#margin = 0.25", "margin = 100.0"),  # whatever this model says besides is lost at this rate
        ("#settle_s = 1.0", "settle_s = 0.2"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    machine.write(CONFIG, text)
    machine.write("/etc/hogwild/environment", "VLLM_ENABLE_V1_MULTIPROCESSING=0\n")
    # A short watchdog, which takes a fair share of a busy machine: as shipped, training only gets what is left over.
    quick = "[Service]\nWatchdogSec=30s\nNice=0\nCPUSchedulingPolicy=other\n"
    machine.write("/etc/systemd/system/hogwild.service.d/test.conf", quick)
    machine.run("systemctl", "daemon-reload")
    machine.run("useradd", "--create-home", "--groups", "hogwild", "ann")
    machine.run("useradd", "--create-home", "ben")


def test_start_means_that_it_learns(story: Story) -> None:
    machine = story.machine
    machine.run("systemctl", "enable", "hogwild.target")
    daemon = machine.start("systemctl", "start", "hogwild")
    wait_until(
        lambda: "waiting for a server" in machine.show("hogwild", "StatusText"), "a status that says why"
    )
    assert machine.show("hogwild", "ActiveState") == "activating", "READY comes with the weights, not before"
    machine.run("systemctl", "start", "hogwild.target")
    assert daemon.wait(timeout=DEADLINE_S) == 0
    story.active("hogwild-vllm")
    machine.wait_for("arena.attached")
    for unit in ("hogwild", "hogwild-vllm"):
        assert machine.run("ps", "-o", "user=", "-p", str(machine.pid(unit))).stdout.strip() == "hogwild"


def test_somebody_of_the_group_drops_a_file_and_the_answer_changes(story: Story) -> None:
    machine = story.machine
    assert ANSWER not in story.ask(FACT)
    refused = machine.run("runuser", "-u", "ben", "--", "ls", "/var/lib/hogwild/spool/incoming", check=False)
    assert refused.returncode != 0, "who is not in the group is kept out"
    machine.drop("ann", "facts.jsonl", [chat(FACT, ANSWER, 8), chat(f"{FACT} w12", ANSWER, 8)])
    for line in (1, 2):
        machine.wait_for("example.trained", file="facts.jsonl", line=line)
    assert ANSWER in story.ask(FACT)
    listed = machine.run("runuser", "-u", "ann", "--", "ls", "/var/lib/hogwild/spool/done").stdout
    assert "facts.jsonl" in listed
    ledger = "/var/lib/hogwild/ledger.sqlite"
    spoilt = machine.run("runuser", "-u", "ann", "--", "truncate", "--size=0", ledger, check=False)
    assert "Permission denied" in spoilt.stderr


def test_status_and_every_line_of_the_log(story: Story) -> None:
    machine = story.machine
    wait_until(lambda: "2 learned" in machine.show("hogwild", "StatusText"), "the status counts")
    status = machine.run("systemctl", "status", "--no-pager", "hogwild").stdout
    assert 'Status: "idle, everything dropped so far is learned; 2 learned' in status
    for line in machine.journal("hogwild").splitlines():
        assert isinstance(json.loads(line), dict)
    said = json.loads(
        machine.run("hogwild", "status", "--json").stdout
    )  # as root, found by its link and its place
    assert said["pid"] == machine.pid("hogwild")
    saved = json.loads(machine.run("hogwild", "checkpoint", "--json").stdout)
    assert saved["generation"] == 1
    owners = machine.run("find", "/var/lib/hogwild", "!", "-user", "hogwild", "!", "-user", "ann").stdout
    assert owners == "", "root has left nothing that the daemon cannot write"


def test_reload(story: Story) -> None:
    machine = story.machine
    pid, text = machine.pid("hogwild"), machine.run("cat", CONFIG).stdout
    machine.write(CONFIG, text.replace("#interval_s = 300.0", "interval_s = 200.0"))
    machine.run("systemctl", "reload", "hogwild")
    machine.wait_for("config.reloaded", needs_restart=[])
    machine.write(CONFIG, text.replace("#interval_s = 300.0", "intervall_s = 200.0"))
    assert machine.run("systemctl", "reload", "hogwild", check=False).returncode != 0
    assert "did you mean `interval_s`" in machine.journal("hogwild")
    machine.write(CONFIG, text)
    assert story.active("hogwild") == pid


def test_a_restart_of_the_daemon_leaves_the_server_alone(story: Story) -> None:
    machine = story.machine
    server, daemon = machine.pid("hogwild-vllm"), machine.pid("hogwild")
    machine.run("systemctl", "restart", "hogwild")
    fresh = story.active("hogwild", daemon)
    assert machine.wait_for("arena.attached", fresh)["restored"] is None, (
        "the server's memory outlived the daemon"
    )
    assert machine.events("daemon.stopped", daemon)[0]["code"] == 0
    assert machine.pid("hogwild-vllm") == server
    assert ANSWER in story.ask(FACT)


def test_a_thread_that_hangs_restarts_the_daemon_and_nothing_else(story: Story) -> None:
    machine = story.machine
    server, daemon = machine.pid("hogwild-vllm"), machine.pid("hogwild")
    machine.wait_for("training.started", daemon)
    machine.drop("ann", "long.jsonl", [chat("w50 w51", "w52 w53", 4000)])  # 80 s: it has to be at work
    machine.wait_for("example.pass", daemon, file="long.jsonl")
    (comm,) = machine.run("sh", "-c", f"grep -lx trainer-0 /proc/{daemon}/task/*/comm").stdout.split()
    tid = comm.split("/")[4]
    machine.write("/run/stop_thread.py", systemd_machine.STOPS_A_THREAD)
    tracer = machine.start("/opt/hogwild/bin/python", "/run/stop_thread.py", str(daemon), tid, story.url)
    assert tracer.stdout is not None
    if (said := tracer.stdout.readline()) != "stopped\n":
        raise AssertionError(said + tracer.stdout.read())
    fresh = story.active("hogwild", daemon)
    tracer.wait(timeout=60)
    machine.wait_for("thread.hangs", daemon)  # the journal may lag behind
    (hang,) = machine.events("thread.hangs", daemon)
    assert hang["thread"] == "trainer-0"
    assert any("learner.py" in frame for frame in hang["stack"]), "where it hangs, and how it came there"
    assert "Watchdog timeout" in machine.about("hogwild")
    assert machine.pid("hogwild-vllm") == server
    machine.wait_for("arena.attached", fresh)
    assert ANSWER in story.ask(FACT)


def test_a_kill_of_the_daemon(story: Story) -> None:
    machine = story.machine
    server, daemon = machine.pid("hogwild-vllm"), machine.pid("hogwild")
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "hogwild")
    fresh = story.active("hogwild", daemon)
    assert machine.wait_for("arena.attached", fresh)["restored"] is None
    assert machine.pid("hogwild-vllm") == server
    machine.drop("ann", "later.jsonl", [chat(LATER, LATER_ANSWER, 8), chat(f"{LATER} w32", LATER_ANSWER, 8)])
    for line in (1, 2):
        machine.wait_for("example.trained", fresh, file="later.jsonl", line=line)
    assert LATER_ANSWER in story.ask(LATER)


def test_a_restart_and_a_kill_of_the_server_keep_what_was_learned(story: Story) -> None:
    """Both times the new server takes the weights from the daemon, which goes on."""
    machine = story.machine
    daemon, server = machine.pid("hogwild"), machine.pid("hogwild-vllm")
    machine.run("systemctl", "restart", "hogwild-vllm")  # returns when it answers
    assert machine.pid("hogwild-vllm") != server
    assert LATER_ANSWER in story.ask(LATER)
    server = machine.pid("hogwild-vllm")
    machine.run("systemctl", "kill", "--signal=KILL", "hogwild-vllm")
    story.active("hogwild-vllm", server)
    assert ANSWER in story.ask(FACT)
    assert LATER_ANSWER in story.ask(LATER)
    assert machine.journal("hogwild-vllm").count("no weights were read from disk") == 2
    assert machine.pid("hogwild") == daemon
    assert machine.show("hogwild", "NRestarts") == "2", "one hang, one kill"


def test_stop_and_start_of_everything(story: Story) -> None:
    machine = story.machine
    daemon = machine.pid("hogwild")
    machine.run("systemctl", "stop", "hogwild.target")
    for unit in ("hogwild", "hogwild-vllm"):
        wait_until(lambda unit=unit: machine.show(unit, "ActiveState") == "inactive", f"{unit} has stopped")
        assert machine.show(unit, "Result") == "success"
    assert machine.show("hogwild", "ExecMainStatus") == "0"
    assert machine.events("checkpoint.saved", daemon), "what was learned is on disk"
    assert machine.events("daemon.stopped", daemon)[0]["code"] == 0
    machine.run("systemctl", "start", "hogwild.target")
    for unit in ("hogwild", "hogwild-vllm"):
        story.active(unit)
    assert ANSWER in story.ask(FACT)
    assert LATER_ANSWER in story.ask(LATER)


def test_a_wrong_configuration_is_no_restart_loop(story: Story) -> None:
    machine = story.machine
    text = machine.run("cat", CONFIG).stdout
    machine.write(CONFIG, text.replace("lr = 1e-3", "lrr = 1e-3"))
    restarts = machine.show("hogwild", "NRestarts")
    assert machine.run("systemctl", "restart", "hogwild", check=False).returncode != 0
    assert machine.show("hogwild", "ActiveState") == "failed"
    assert machine.show("hogwild", "ExecMainStatus") == "78"
    assert machine.show("hogwild", "NRestarts") == restarts
    said = json.loads(machine.journal("hogwild").splitlines()[-1])
    assert (said["event"], said["code"]) == ("daemon.failed", 78)
    assert f"{CONFIG}: optimizer.lrr: unknown key; did you mean `lr`?" in said["error"]
    assert "did you mean `lr`" in machine.run("systemctl", "status", "hogwild", check=False).stdout
    assert ANSWER in story.ask(FACT), "the server does not mind"
    machine.write(CONFIG, text)


def test_a_server_that_ends_by_itself_is_started_again(story: Story) -> None:
    """As vLLM's API server does when its engine has died: with exit code 0 (vLLM 0.32)."""
    machine, folder = story.machine, "/etc/systemd/system/hogwild-vllm.service.d"
    machine.write(f"{folder}/test.conf", "[Service]\nType=exec\nExecStart=\nExecStart=/bin/sleep 1\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "hogwild-vllm")
    restarts = int(machine.show("hogwild-vllm", "NRestarts"))
    wait_until(lambda: int(machine.show("hogwild-vllm", "NRestarts")) > restarts, "it is started again")
    machine.run("systemctl", "stop", "hogwild-vllm")
    machine.run("rm", "-r", folder)
    machine.run("systemctl", "daemon-reload")


def test_uninstall_keeps_what_was_learned(story: Story) -> None:
    machine = story.machine
    ran = machine.run("hogwild", "uninstall")
    assert "/var/lib/hogwild (everything that was learned)" in ran.stdout
    for unit in UNITS:
        assert machine.show(unit, "LoadState") in ("not-found", "masked")
        assert machine.show(unit, "ActiveState") == "inactive"
    left = machine.run("sh", "-c", "find /etc /usr/local/bin -name '*hogwild*' | sort").stdout.split()
    assert left == ["/etc/hogwild", CONFIG, "/etc/systemd/system/hogwild.service.d"]
    assert machine.run("ls", "/var/lib/hogwild/checkpoints/current/model.safetensors").returncode == 0
