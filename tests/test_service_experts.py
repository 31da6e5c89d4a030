"""A mixture whose experts are trained, through the whole service: the server serves what is trained."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from test_experts import MIXTURE
from test_service_embeddings import learn, service
from tiny import chat_tokenizer

pytestmark = pytest.mark.vllm


def test_served_equals_trained_with_experts_that_move(tmp_path):
    mixture = replace(MIXTURE, settings={**MIXTURE.settings, "max_position_embeddings": 1024})
    model = mixture.build(tmp_path / "model")
    chat_tokenizer(model)
    with service(tmp_path, model, experts=True, threads=2) as (server, daemon):
        frozen = daemon.wait_for("arena.attached")["frozen"]
        assert not [name for name in frozen if "experts" in name]
        now = learn(server, daemon)
    was = load_file(model / "model.safetensors")
    moved = {name for name in was if ".experts." in name and not torch.equal(was[name], now[name])}
    parts = {name.rsplit(".", 2)[1] for name in moved}
    assert parts == {"gate_proj", "up_proj", "down_proj"}
