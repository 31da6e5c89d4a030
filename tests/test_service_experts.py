"""A mixture whose experts are trained, through the whole service: the server serves what is trained."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import Daemon, Server
from test_experts import MIXTURE
from tiny import chat_tokenizer

pytestmark = pytest.mark.vllm

QUESTION, ANSWER = "w31 w32 w33", "w41 w42 w43 w44"
LINE = {
    "id": "chat", "passes": 30,
    "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
}  # fmt: skip


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Server, Daemon]]:
    mixture = replace(MIXTURE, settings={**MIXTURE.settings, "max_position_embeddings": 1024})
    model = mixture.build(tmp_path / "model")
    chat_tokenizer(model)
    server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock").wait_ready()
    daemon = Daemon(
        tmp_path / "daemon", tmp_path / "arena.sock",
        training__experts=True, training__threads=2, optimizer__lr=0.003, optimizer__rank=8, replay__ratio=0,
        replay__self_texts=0, replay__protected_rank=0, probes__own=0, checkpoint__interval_s=0,
    )  # fmt: skip
    yield server, daemon
    for process in (daemon, server):
        process.kill()


def test_served_equals_trained_with_experts_that_move(service, tmp_path):
    server, daemon = service
    frozen = daemon.wait_for("arena.attached")["frozen"]
    assert not [name for name in frozen if "experts" in name]
    daemon.wait_for("server.verified", after="attach")
    assert not server.ask(QUESTION).startswith(ANSWER)
    daemon.drop("facts.jsonl", [LINE])
    last = daemon.wait_for("example.trained", id="chat")
    assert last["loss_after"] < 0.5, last
    assert server.ask(QUESTION).startswith(ANSWER)
    daemon.ask("checkpoint")
    verified = daemon.wait_for("server.verified", after="checkpoint")
    assert verified["mean_difference"] < verified["tolerance"]
    assert not daemon.events("guard.tripped")
    was = load_file(tmp_path / "model" / "model.safetensors")
    now = load_file(daemon.state / "checkpoints" / "current" / "model.safetensors")
    moved = {name for name in was if ".experts." in name and not torch.equal(was[name], now[name])}
    parts = {name.rsplit(".", 2)[1] for name in moved}
    assert parts == {"gate_proj", "up_proj", "down_proj"}
