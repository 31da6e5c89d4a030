"""The daemon as a process: what it refuses, and what its signals do. Its server is real too, all but the HTTP part."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hogwild import state_lock
from hogwild.arena import client, protocol
from hogwild.layout import Source, weight_files
from hogwild.weights import load_arena
from support import Daemon, Process, environment, free_port, wait_until
from tiny import Child
from world import World, sums

# --- a daemon to which nothing is attached: one story, told in order -------------------------------------------------


@dataclass
class Idle:
    world: World
    config: Path
    daemon: Daemon


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Idle]:
    world = World(tmp_path_factory.mktemp("idle"))
    config = world.root / "hogwild.toml"
    config.write_text("[checkpoint]\nkeep = 2\n")
    daemon = world.daemon(config=config)
    daemon.wait_for("daemon.started", pid=daemon.pid)
    yield Idle(world, config, daemon)
    world.end()


def test_the_daemon_holds_its_state_folder(idle):
    assert state_lock.holder(idle.daemon.state) == idle.daemon.pid


def test_a_second_daemon_on_the_same_state_folder_or_socket_is_refused(idle):
    seconds = {
        f"another daemon works in {idle.daemon.state}": Daemon(
            idle.world.root / "daemon", idle.world.root / "other.sock"
        ),
        f"another daemon listens on {idle.world.sock}": Daemon(idle.world.root / "second", idle.world.sock),
    }
    for reason, second in seconds.items():
        assert second.popen.wait(120) == 1
        assert reason in second.tail()
        assert "Traceback" not in second.tail()
    assert idle.daemon.alive
    assert state_lock.holder(idle.daemon.state) == idle.daemon.pid


def test_hup_takes_over_what_can_change_and_refuses_what_is_wrong(idle):
    idle.config.write_text("[checkpoint]\nkeep = 0\nkepe = 1\n")
    os.kill(idle.daemon.pid, signal.SIGHUP)
    rejected = idle.daemon.wait_for("config.rejected")
    assert "checkpoint.keep" in rejected["error"]
    assert "kepe: unknown key; did you mean `keep`?" in rejected["error"]
    assert idle.daemon.alive

    idle.config.write_text('[checkpoint]\nkeep = 5\n[log]\nlevel = "info"\n[training]\nthreads = 1\n')
    os.kill(idle.daemon.pid, signal.SIGHUP)
    reloaded = idle.daemon.wait_for("config.reloaded")
    assert set(reloaded["live"]) == {"checkpoint", "history", "governor", "log"}
    assert reloaded["needs_restart"] == ["training"], "what cannot change live is named, and only that"


def test_commands_before_there_is_anything_to_command(idle):
    for command, reason in (
        (("checkpoint",), "no server has brought its weights yet"),
        (("rollback", 3), "there is no generation 3"),
    ):
        ran = idle.daemon.command(*command)
        assert ran.returncode == 1
        assert reason in ran.stderr
        assert "Traceback" not in ran.stderr
    assert idle.daemon.alive


def test_a_command_that_nobody_waits_for_any_more_is_not_begun(idle):
    """Ctrl-C on a rollback that gets no answer: it is not done minutes later, when the daemon has time for it."""
    failed = len(idle.daemon.events("rollback.failed"))
    os.kill(idle.daemon.pid, signal.SIGSTOP)
    try:
        with socket.socket(socket.AF_UNIX) as asker:
            asker.connect(str(idle.world.sock))
            arguments = {"generation": 3, "retrain": False}
            protocol.send(
                asker,
                {"op": "command", "version": protocol.VERSION, "name": "rollback", "arguments": arguments},
            )
    finally:
        os.kill(idle.daemon.pid, signal.SIGCONT)
    assert idle.daemon.wait_for("command.dropped")["command"] == "rollback"
    assert len(idle.daemon.events("rollback.failed")) == failed


def test_the_status_before_there_is_a_server_says_what_waits_and_for_what(idle):
    idle.daemon.drop("facts.jsonl", b'{"text": "w1 w2"}\n{"txt": "w1"}\n')
    idle.daemon.wait_for("spool.accepted")
    said = wait_until(
        lambda: (one := idle.daemon.ask("status")).get("pending") and one, "what waits is counted"
    )
    assert (said["training"], said["pending"], said["rejected"]) == (False, 1, 1)
    assert said["waiting"].startswith(f"waiting for a server on {idle.world.sock}")
    shown = idle.daemon.command("status").stdout
    for part in (
        "waiting for a server",
        "hogwild vllm MODEL",
        "1 example waits",
        "1 bad line",
        str(idle.daemon.pid),
    ):
        assert part in shown, part
    said = idle.daemon.command("doctor", "--quick").stdout
    assert f"warn  daemon: process {idle.daemon.pid} waits for a server on {idle.world.sock}" in said


def test_an_arena_that_another_daemon_trained_is_refused_and_not_touched(idle):
    server = idle.world.server(trained=True)
    before = sums(server)
    refused = idle.daemon.wait_for("arena.refused")
    assert "trained by a daemon with another state folder" in refused["error"]
    assert idle.daemon.alive
    assert not idle.daemon.events("arena.attached")
    assert sums(server) == before
    wait_until(lambda: "another state folder" in idle.daemon.ask("status")["waiting"], "the status says why")
    doctor = idle.daemon.command("doctor", "--quick")
    assert doctor.returncode == 1
    assert f"FAIL  daemon: process {idle.daemon.pid} refused the server's weights: " in doctor.stdout
    server.kill()


def test_term_before_anything_is_attached_is_a_clean_end(idle):
    assert idle.daemon.terminate() == 0
    assert idle.daemon.events("daemon.stopped")[0]["code"] == 0
    assert not idle.world.sock.exists()
    assert state_lock.holder(idle.daemon.state) is None


# --- daemons that get something to do --------------------------------------------------------------------------------


def test_a_reload_knows_the_command_line_still(world):
    """A model given by --model has not changed because the file does not name it."""
    log = world.root / "daemon.log"
    command = [sys.executable, "-m", "hogwild", "serve", "--model", str(world.model)]
    env = environment(HOGWILD_STATE_DIR=str(world.root / "state"), HOGWILD_SOCKET=str(world.sock))
    daemon = Process(command, env, log)
    try:
        wait_until(lambda: b"daemon.started" in log.read_bytes(), "it starts")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: b"config.reloaded" in log.read_bytes(), "it reads the configuration again")
        line = next(line for line in log.read_bytes().splitlines() if b"config.reloaded" in line)
        assert json.loads(line)["needs_restart"] == []
    finally:
        daemon.kill()


def test_another_model_than_the_state_folder_has_learned_is_refused(world):
    server = world.server()
    daemon = world.daemon()
    attached = daemon.wait_for("arena.attached")
    assert attached["model"] == str(world.model)
    assert attached["restored"] is None
    daemon.wait_for("server.attached")  # a little later: one that is gone by then was never there
    server.kill()
    daemon.wait_for("server.lost")
    assert daemon.terminate() == 0

    server = world.server(world.make("other", seed=1))
    before = sums(server)
    daemon = world.daemon()
    refused = daemon.wait_for("arena.refused")
    assert "not the one that this state folder has learned on" in refused["error"]
    assert str(world.root / "other") in refused["problems"][0]
    assert str(world.model) in refused["problems"][0]
    refusal = wait_until(lambda: daemon.ask("status").get("refused"), "the status says why")
    assert refused["problems"][0] in refusal, "the first problem, not only that there is one"
    assert sums(server) == before
    server.kill()

    world.server()
    daemon.wait_for("arena.attached")  # the right model is still taken


def offer_without_address(pipe, folder, sock):
    """As vLLM's own `api_server` does, started with `--load-format hogwild` and $HOGWILD_SOCKET."""
    client.Offer(sock, load_arena(folder), {"url": ""}).start()
    pipe.recv()


def test_a_server_that_does_not_say_where_it_answers_is_no_riddle(world):
    """Only a status said that `GET /health` is not answered, of nobody knew whom."""
    server, daemon = Child(offer_without_address, world.model, world.sock), world.daemon()
    try:
        unchecked = daemon.wait_for("server.unchecked")
        assert (
            "does not say where it answers; start it with `hogwild vllm`, or set `server.url`"
            in unchecked["error"]
        )
        assert unchecked["error"] in daemon.ask("status")["warnings"][0]
    finally:
        server.kill()


def test_a_server_of_another_model_in_place_of_the_first_is_no_riddle(world):
    """The daemon holds the weights of the first, and learns on. Why the new one does not come, the status says."""
    arena = load_arena(world.model)
    server, daemon = world.server(arena), world.daemon()
    daemon.wait_for("server.attached")
    server.kill()
    daemon.wait_for("server.lost")
    other = world.server(world.make("other", seed=1))
    daemon.wait_for("arena.refused")
    refusal = wait_until(lambda: daemon.ask("status").get("refused"), "the status says why")
    assert f"will not drop them for a new arena filled from {world.root / 'other'}" in refusal
    assert (
        f"no server is attached, the newest one's weights were refused: {refusal}"
        in daemon.ask("status")["warnings"]
    )
    doctor = daemon.command("doctor", "--quick").stdout
    assert f"FAIL  daemon: process {daemon.pid} refused the server's weights: " in doctor
    other.kill()
    server = world.server(arena)
    wait_until(lambda: daemon.ask("status").get("server"), "the first comes back")
    assert daemon.ask("status")["refused"] == ""
    server.kill()


def test_a_checkpoint_that_cannot_be_restored_is_refused_and_comes_back_when_it_is_mended(world):
    """Nothing of it is written before all of it is known to fit, so that the same server can still have it."""
    saved, expected = world.checkpoint()
    server = world.server()
    before = sums(server)
    parts = [
        saved / "hogwild" / "state.json",
        saved / "hogwild" / "optimizer.safetensors",
        saved / "model.safetensors",
    ]
    whole = [part.read_bytes() for part in parts]
    for part, content in zip(parts, whole, strict=True):
        part.write_bytes(b'{"step": 40}' if part.suffix == ".json" else content[:-1])
    daemon = world.daemon()
    for part, content in zip(
        parts, whole, strict=True
    ):  # the server goes on offering, and one by one they are mended
        wait_until(
            lambda part=part: any(str(part) in event["error"] for event in daemon.events("arena.refused")),
            f"{part} is named",
        )
        assert not daemon.events("arena.attached")
        assert sums(server) == before
        part.write_bytes(content)
    attached = daemon.wait_for("arena.attached")
    assert attached["restored"] == str(saved)
    assert attached["step"] == 40
    assert sums(server) == expected


def test_a_status_file_that_cannot_be_written_does_not_end_the_daemon(world):
    (world.root / "daemon" / "state" / "status.json" / "in the way").mkdir(parents=True)
    world.server()
    daemon = world.daemon()
    daemon.wait_for("status.unwritten")
    assert daemon.terminate() == 0


def test_the_status_after_a_command_is_of_after_the_command(world):
    world.checkpoint()
    world.server()
    daemon = world.daemon()
    daemon.wait_for("arena.attached", step=40)
    wait_until(lambda: daemon.ask("status").get("generation") == 1, "it has a status")
    for generation in (0, 1, 0):
        assert daemon.ask("rollback", generation)["generation"] == generation
        said = daemon.ask("status")
        assert (said["generation"], said["checkpoint"]["generation"]) == (generation, generation)


def test_an_old_server_that_ends_after_a_new_one_has_come_takes_nothing_with_it(world):
    """The old one drains its requests, say. And the other way round: a new one that fails, beside the old one."""
    old = world.server()
    daemon = world.daemon()
    daemon.wait_for("server.attached", pid=old.pid)
    source = Source.of(world.model, weight_files(world.model))
    for url, ends, stays in (
        ("http://127.0.0.1:2", "new", old.pid),
        ("http://127.0.0.1:3", "old", os.getpid()),
    ):
        held = client.ask(world.sock, source, {"url": url})
        assert held is not None
        daemon.wait_for("server.attached", url=url)
        if ends == "new":
            held[1].close()
            daemon.wait_for("server.lost", url=url)
        else:
            old.kill()
            daemon.wait_for("server.lost", pid=old.pid)
        said = wait_until(
            lambda stays=stays: (one := daemon.ask("status")).get("server", {}).get("pid") == stays and one,
            "the one that is there is named",
            30,
        )
        assert "no server is attached" not in said["warnings"]
    held[1].close()
    wait_until(lambda: "no server is attached" in daemon.ask("status")["warnings"], "now there is none")


# --- daemons in which something goes wrong that nobody has foreseen ---------------------------------------------------

TIDIES = """
from hogwild import history, ledger, status
from hogwild.errors import LedgerError

def record(self):
    assert self.interrupt.wait(600)
    return []

history.History.record = record  # as long as that of a large model

def fails(*_arguments, **_named):
    raise {error}

{what} = fails
from hogwild.cli import main
main()
"""


@pytest.mark.parametrize(
    ("what", "error", "attached"),
    [
        ("status.Status.write_waiting", "RuntimeError('a bug')", False),
        ("ledger.Ledger.has_passes_to_save", "LedgerError('disk I/O error')", True),
    ],
)
def test_what_fails_unexpectedly_ends_the_daemon_in_order_and_at_once(world, what, error, attached):
    """In its loop or while it stops: not when history has been tidied, beside trainers that go on."""
    log = world.root / "daemon.log"
    env = environment(
        HOGWILD_STATE_DIR=str(world.state), HOGWILD_SOCKET=str(world.sock), HOGWILD_METRICS__PORT="0"
    )
    script = TIDIES.format(what=what, error=error)
    if attached:
        world.server()
    daemon = Process([sys.executable, "-c", script, "serve"], env, log)
    try:
        if attached:
            wait_until(lambda: b"server.attached" in log.read_bytes(), "it has something to stop")
            assert daemon.terminate() == 1
        assert daemon.popen.wait(120) == 1
    finally:
        daemon.kill()
    said = [json.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]
    (failed,) = [one for one in said if one["event"] == "daemon.failed"]
    assert failed["error"] in error
    assert ("exception" in failed) is ("bug" in error), "the place is said of what is a bug"
    assert [one["code"] for one in said if one["event"] == "daemon.stopped"] == [1]
    assert not world.sock.exists()


FULL = """
from hogwild.ledger import Ledger

make = Ledger.__init__

def make_small(self, *arguments, **named):
    make(self, *arguments, **named)
    with self._db.read() as db:
        db.execute("PRAGMA max_page_count = 100")

Ledger.__init__ = make_small
from hogwild.cli import main
main()
"""


def test_a_disk_that_is_full_as_a_file_is_taken_is_no_bug(world):
    """SQLite says of this limit what it says of a full disk. The file stays where it is."""
    log, incoming = world.root / "daemon.log", world.state / "spool" / "incoming"
    incoming.mkdir(parents=True)
    line = json.dumps({"text": "a line of some length " * 10}).encode() + b"\n"
    (incoming / "a.jsonl").write_bytes(b"".join(line for _ in range(5000)))
    env = environment(
        HOGWILD_STATE_DIR=str(world.state), HOGWILD_SOCKET=str(world.sock), HOGWILD_METRICS__PORT="0"
    )
    daemon = Process([sys.executable, "-c", FULL, "serve"], env, log)
    try:
        assert daemon.popen.wait(120) == 1
    finally:
        daemon.kill()
    said = [json.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]
    (failed,) = [one for one in said if one["event"] == "daemon.failed"]
    assert "disk is full: make room on the disk of" in failed["error"]
    assert not [one for one in said if "exception" in one], "no traceback"
    assert (incoming / "a.jsonl").exists()


LATE = """
import time
from hogwild import judge, selfreplay

def make(*_arguments, stopped, **_named):
    while not stopped():
        time.sleep(0.1)
    return []

def prepare(*_arguments):
    print("prepares", flush=True)
    time.sleep(2)

selfreplay.make, judge.Judge.prepare = make, prepare  # as long as with a large model
from hogwild.cli import main
main()
"""


def test_a_stop_does_not_wait_for_what_is_prepared_for_weights_that_were_being_taken(world):
    log = world.root / "daemon.log"
    env = environment(
        HOGWILD_STATE_DIR=str(world.state), HOGWILD_SOCKET=str(world.sock), HOGWILD_METRICS__PORT="0"
    )
    world.server()
    daemon = Process([sys.executable, "-c", LATE, "serve"], env, log)
    try:
        wait_until(lambda: b"prepares" in log.read_bytes(), "an arena is being taken")
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.popen.wait(60) == 0
    finally:
        daemon.kill()
    assert b"arena.refused" not in log.read_bytes()


BUSY = """
import time
from hogwild import recovery, spool
from hogwild.cli import main

def read(self, stop):
    print("reads", flush=True)
    while True:
        self._ledger.counts()

def take(arena, config, ledger, *_arguments):
    print("verifies", flush=True)
    while True:
        ledger.counts()

spool.Spool.run, recovery.take = read, take  # a large file, a large model
main()
"""


def test_a_stop_while_a_file_is_read_and_weights_are_verified_is_no_fault(world):
    log = world.root / "daemon.log"
    env = environment(  # Prometheus is served up to half a second longer than the ledger
        HOGWILD_STATE_DIR=str(world.state),
        HOGWILD_SOCKET=str(world.sock),
        HOGWILD_METRICS__PORT=str(free_port()),
    )
    world.server()
    daemon = Process([sys.executable, "-c", BUSY, "serve"], env, log)
    try:
        wait_until(lambda: b"reads" in log.read_bytes() and b"verifies" in log.read_bytes(), "it is at work")
        assert daemon.terminate() == 0
    finally:
        daemon.kill()
    said = [json.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]
    assert [one["event"] for one in said if one["level"] != "info"] == []
    assert said[-1]["event"] == "daemon.stopped"
