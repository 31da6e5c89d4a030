"""A model with a tied head whose embedding is trained, through the whole service: the server serves what is trained."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import Daemon, Server
from tiny import chat_model

pytestmark = pytest.mark.vllm

TABLE = "model.embed_tokens.weight"
QUESTION, ANSWER = "w31 w32 w33", "w41 w42 w43 w44"
LINE = {
    "id": "chat", "passes": 30,
    "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
}  # fmt: skip


@contextlib.contextmanager
def service(root: Path, model: Path, **training: Any) -> Iterator[tuple[Server, Daemon]]:
    """A server and a daemon that trains it, on their own in `root`; `training`: settings of that section."""
    server = Server(model, root / "server.log", root / "arena.sock").wait_ready()
    daemon = Daemon(
        root / "daemon", root / "arena.sock", optimizer__lr=0.003, optimizer__rank=8, replay__ratio=0,
        replay__self_texts=0, replay__protected_rank=0, probes__own=0, checkpoint__interval_s=0,
        **{f"training__{name}": value for name, value in training.items()},
    )  # fmt: skip
    try:
        yield server, daemon
    finally:
        for process in (daemon, server):
            process.kill()


def learn(server: Server, daemon: Daemon) -> dict[str, torch.Tensor]:
    """One line, until it is served, and what is served is seen to be what is trained; the checkpoint's tensors."""
    assert daemon.wait_for("server.verified", after="attach")["tokens"] > 20
    assert not server.ask(QUESTION).startswith(ANSWER)
    daemon.drop("facts.jsonl", [LINE])
    last = daemon.wait_for("example.trained", id="chat")
    assert last["loss_after"] < 0.5, last
    assert server.ask(QUESTION).startswith(ANSWER)
    daemon.ask("checkpoint")
    verified = daemon.wait_for("server.verified", after="checkpoint")
    assert verified["mean_difference"] < verified["tolerance"]
    assert not daemon.events("guard.tripped")
    return load_file(daemon.state / "checkpoints" / "current" / "model.safetensors")


def test_served_equals_trained_with_embeddings_that_move(tmp_path):
    model = chat_model(tmp_path / "model")
    with service(tmp_path, model, embeddings=True, threads=1) as (server, daemon):
        assert daemon.wait_for("arena.attached")["frozen"] == {}
        now = learn(server, daemon)
    assert not torch.equal(load_file(model / "model.safetensors")[TABLE], now[TABLE])
