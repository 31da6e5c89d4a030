"""The server as a process, before it serves."""

import contextlib
import signal
from pathlib import Path

import pytest

from support import Server, wait_until
from tiny import chat_model

pytestmark = pytest.mark.vllm


def engine(server: Server) -> bool:
    """Is it there, and about to load?"""
    for pid in server.group():
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::EngineCor"):
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_while_it_loads_ends(tmp_path: Path, number: signal.Signals) -> None:
    """At once: what it does when it has loaded is another thing."""
    server = Server(chat_model(tmp_path / "model"), tmp_path / "server.log", tmp_path / "arena.sock")
    try:
        wait_until(lambda: engine(server), "its engine is started")
        server.popen.send_signal(number)
        assert server.popen.wait(60) == 128 + number, server.tail()
        assert "offering it" not in server.log.read_text()
    finally:
        server.kill()
