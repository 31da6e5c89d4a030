"""The server as a process, before it serves."""

import contextlib
import json
import signal
from pathlib import Path

import httpx
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


def test_a_server_that_is_told_to_end_while_it_loads_ends(tmp_path: Path) -> None:
    server = Server(chat_model(tmp_path / "model"), tmp_path / "server.log", tmp_path / "arena.sock")
    try:
        wait_until(lambda: engine(server), "its engine is started")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(60) == 128 + signal.SIGTERM, server.tail()
    finally:
        server.kill()


def test_a_draft_model_is_not_what_is_trained(tmp_path: Path) -> None:
    """It came with a configuration of its own, and was given an arena beside that of the model, which was refused."""
    model, draft = chat_model(tmp_path / "model"), chat_model(tmp_path / "draft", seed=1)
    speculate = json.dumps({"model": str(draft), "num_speculative_tokens": 2})
    server = Server(
        model, tmp_path / "server.log", tmp_path / "arena.sock", more=["--speculative-config", speculate]
    )
    try:
        server.wait_ready()
        assert httpx.get(f"{server.url}/hogwild/status").json()["model"] == str(model)
        assert server.ask("w5 w6")
    finally:
        server.kill()
