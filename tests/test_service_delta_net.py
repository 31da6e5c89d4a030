"""A model of Qwen3.5's shape (Gated DeltaNet and attention in turn) through the whole service, nothing replaced but
its size."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import matrix
from architectures import ARCHITECTURES
from support import Daemon, Server
from tiny import chat_tokenizer

pytestmark = pytest.mark.vllm

QUESTION = "w31 w32 w33"
ANSWER = "w41 w42 w43 w44"
LONG = " ".join(f"w{3 + 7 * i % 50}" for i in range(150))
"""A context that is read beforehand, in pieces, and enters as keys and values and as recurrent state."""
LINES = [
    {"id": "chat", "passes": 30, "messages": [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER},
    ]},
    {"id": "long", "passes": 30, "prompt": LONG, "completion": " w55 w56 w57"},
]  # fmt: skip
SETTINGS = {
    "training__threads": 1, "training__batch_tokens": 64, "optimizer__lr": 0.003, "optimizer__rank": 8,
    "replay__ratio": 0, "replay__self_texts": 0, "replay__protected_rank": 0, "probes__own": 0,
    "checkpoint__interval_s": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (found,) = (one for one in ARCHITECTURES if one.name == "Qwen3.5 dense text")
    settings = {**found.settings, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    folder = replace(found, settings=settings).build(tmp_path_factory.mktemp("delta-net") / "model")
    chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Daemon]]:
    root = tmp_path_factory.mktemp("service")
    server = Server(model, root / "server.log", root / "arena.sock").wait_ready()
    daemon = Daemon(root / "daemon", root / "arena.sock", **SETTINGS)
    yield server, daemon
    for process in (daemon, server):
        process.kill()


def test_it_learns_a_dropped_file_and_stock_vllm_reads_the_checkpoint(service, tmp_path):
    server, daemon = service
    attached = daemon.wait_for("arena.attached")
    assert not [name for name in attached["frozen"] if "embed_tokens" not in name], (
        "all but the embeddings is trained"
    )
    assert daemon.wait_for("server.verified", after="attach")["tokens"] > 20
    before = server.ask(QUESTION)
    assert not before.startswith(ANSWER)
    daemon.drop("facts.jsonl", LINES)
    for name in ("chat", "long"):
        last = daemon.wait_for("example.trained", id=name)
        assert last["loss_after"] < 0.5, last
    assert not daemon.events("context.not_frozen")
    answer = server.ask(QUESTION)
    assert answer.startswith(ANSWER), answer
    daemon.ask("checkpoint")
    assert daemon.wait_for("server.verified", after="checkpoint")
    assert not daemon.events("guard.tripped")
    saved = daemon.state / "checkpoints" / "current"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    stock = matrix.ServerProcess(tmp_path)
    try:
        stock.load_stock(saved.resolve(), max_model_len=512, max_num_batched_tokens=512)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
        )
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (chat, LONG)]
        said = [
            tokenizer.decode(text[len(prompt) :])
            for prompt, text in zip(prompts, stock.ask(prompts, 4).texts, strict=True)
        ]
    finally:
        stock.end()
    assert said[0].startswith(ANSWER)
    assert said[1].startswith("w55 w56 w57")
