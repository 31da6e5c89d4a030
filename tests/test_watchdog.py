"""What systemd is told, heard on a real socket; threads that hang are real threads."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hogwild import pulse, status_line
from hogwild.notify import Notifier
from hogwild.watchdog import Watchdog
from support import wait_until


class Systemd:
    """The other end of $NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.setblocking(False)
        self.environment = {
            "NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000", "WATCHDOG_PID": str(os.getpid()),
        }  # fmt: skip

    def heard(self) -> list[str]:
        lines = []
        while True:
            try:
                lines += self._sock.recv(65536).decode().split("\n")
            except BlockingIOError:
                return lines

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify")
    yield systemd
    systemd.close()


def test_without_systemd_nothing_is_sent_and_nothing_fails() -> None:
    silent = Notifier({})
    assert not silent.listening
    assert silent.watchdog_s is None
    assert silent.send("READY=1") is False
    assert Notifier({"NOTIFY_SOCKET": "/nowhere/at/all"}).send("READY=1") is False


def test_one_datagram_with_its_lines_and_abstract_addresses(systemd: Systemd) -> None:
    assert Notifier(systemd.environment).send("READY=1", "STATUS=two\nlines")
    assert systemd.heard() == ["READY=1", "STATUS=two lines"]
    name = f"hogwild-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        assert Notifier({"NOTIFY_SOCKET": f"@{name}"}).send("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_a_watchdog_of_another_process_is_not_ours(systemd: Systemd) -> None:
    assert Notifier(systemd.environment).watchdog_s == 0.4
    assert Notifier({**systemd.environment, "WATCHDOG_PID": "1"}).watchdog_s is None


def test_ready_comes_once_everything_is_there_and_time_is_asked_for_until_then(systemd: Systemd) -> None:
    there = threading.Event()
    watchdog = Watchdog(Notifier(systemd.environment), there.is_set, lambda: "waiting")
    watchdog.turn()
    heard = systemd.heard()
    assert "READY=1" not in heard
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in heard)
    assert "STATUS=waiting" in heard
    there.set()
    watchdog.turn()
    assert "READY=1" in systemd.heard()
    watchdog.turn()
    heard = systemd.heard()
    assert "READY=1" not in heard
    assert not any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in heard)


def test_a_thread_that_hangs_starves_the_watchdog_and_is_named_with_its_place(
    systemd: Systemd, capfd: pytest.CaptureFixture[str]
) -> None:
    from hogwild import log

    log.configure("info", "json")
    entered, let_go = threading.Event(), threading.Event()

    def hang_here() -> None:
        with pulse.watched("trainer-7"):
            entered.set()
            let_go.wait()
            while not ended.is_set():
                pulse.beat()
                time.sleep(0.01)

    ended = threading.Event()
    thread = threading.Thread(target=hang_here)
    thread.start()
    entered.wait()
    watchdog = Watchdog(Notifier(systemd.environment), lambda: True, lambda: "well")

    def hangs() -> bool:
        systemd.heard()
        watchdog.turn()
        return "WATCHDOG=1" not in systemd.heard() and bool(pulse.silent(watchdog.limit_s))

    wait_until(hangs, "the thread is seen to hang")
    for _ in range(5):
        time.sleep(0.1)  # a quarter of the period: it would be fed each time
        watchdog.turn()
        assert "WATCHDOG=1" not in systemd.heard()
    said = capfd.readouterr().out
    assert '"event":"thread.hangs"' in said
    assert said.count("thread.hangs") == 1
    assert "hang_here" in said
    let_go.set()

    def fed() -> bool:
        watchdog.turn()
        return "WATCHDOG=1" in systemd.heard()

    wait_until(fed, "it is fed again")
    ended.set()
    thread.join()
    assert "thread.recovered" in capfd.readouterr().out
    assert not pulse.silent(-1), "a thread that has ended is not watched"


def test_waiting_that_was_announced_is_no_hang() -> None:
    with pulse.watched("a") as one:
        pulse.beat(within_s=60)
        assert one.silent_s == 0
        with pulse.away():
            assert pulse.silent(0) == []
            with pulse.away():
                pulse.beat()  # it reads a checkpoint, say, before it waits for the disk
            time.sleep(0.1)
            assert pulse.silent(0) == []
        wait_until(lambda: one.silent_s > 0, "it is silent again once it is back")
        with pulse.watched("inner", patience_s=60) as inner:
            pulse.beat()
            assert inner.silent_s == 0
        before = one.silent_s
        pulse.beat()
        assert one.silent_s < before, "the outer one is this thread's again"


SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def test_waiting_for_a_processor_is_no_hang() -> None:
    """Beside a process that takes all of the only core that it may use, a thread is silent, and does not hang."""
    before = os.sched_getaffinity(0)
    core = min(before)
    spinner = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
    try:
        os.sched_setaffinity(0, {core})  # of this thread alone
        with pulse.watched("a") as one:
            counted = [one.silent_s]
            began, waited_s = time.monotonic(), pulse.runqueue_wait_s(threading.get_native_id())
            while pulse.runqueue_wait_s(threading.get_native_id()) - waited_s < 0.5:
                counted.append(one.silent_s)
            silent_s = one.silent_s
            assert silent_s <= time.monotonic() - began - 0.4
    finally:
        os.sched_setaffinity(0, before)
        spinner.kill()
        spinner.wait()


def test_threads_that_nobody_watches_may_beat() -> None:
    pulse.beat()


STATUS = {"pending": 2, "trained": 1, "durable": 4, "step": 30, "generation": 3}
SITUATION = {
    "attached": True, "training": True, "server": "http://x", "refused": "", "scanned": True, "saving": False,
    "stopping": False, "socket": "/run/arena.sock",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "training, 2 examples to go; 5 learned; step 30; generation 3; server http://x"),
        ({"server": None}, "training, 2 examples to go; 5 learned; step 30; generation 3; no server"),
        ({"attached": False}, "waiting for a server on /run/arena.sock"),
        (
            {"attached": False, "refused": "another model"},
            "refused, see arena.refused in the log: another model",
        ),
        (
            {"server": None, "refused": "another model"},
            "no server: the newest one's weights were refused, see arena.refused in the log: another model",
        ),
        ({"scanned": False}, "the spool cannot be used"),
        ({"training": False}, "not training: the server has not been verified"),
        ({"saving": True}, "writing a checkpoint"),
        ({"stopping": True}, "stopping"),
    ],
)
def test_the_status_says_what_it_waits_for(changes: dict[str, object], line: str) -> None:
    assert line in status_line.compose(STATUS, **{**SITUATION, **changes})  # type: ignore[arg-type]
