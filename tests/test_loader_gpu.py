"""vLLM's loader and an arena on a GPU, as far as it goes with a stand-in of the driver: see loader_gpu.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hogwild.layout import Layout
from support import environment
from test_arena_gpu import GRANULARITY, IDS
from tiny import llama

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("loader")
    folder = llama(
        root / "model", torch.bfloat16, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536, tie_word_embeddings=False,
    )  # fmt: skip
    script = Path(__file__).with_name("loader_gpu.py")
    ran = subprocess.run(
        [sys.executable, script, folder, root / "arena.sock"],
        env=environment(PYTHONPATH=":".join(sys.path)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_the_weights_are_loaded_into_one_arena_of_several_allocations(told):
    layout = Layout.from_json(told["layout"])
    assert layout.device == IDS[0]
    assert len(layout.parts) == told["granules"] > 4
    assert set(layout.parts[:-1]) == {GRANULARITY}
    assert len(layout.tensors) == 21
    assert layout.frozen == {}
    across = [
        name for name, region in layout.parameters.items()
        if region.offset // GRANULARITY != (region.end - 1) // GRANULARITY
    ]  # fmt: skip
    assert across, "some lie in more than one of them"


def test_every_parameter_lies_in_it_and_had_no_memory_of_its_own_before(told):
    assert told["outside"] == []
    assert told["built_with"] == [0]


def test_what_the_daemon_writes_is_served(told):
    assert told["changed"] != told["first"]
    assert told["restored"] == told["first"]


def test_a_second_server_maps_what_the_daemon_holds_and_asks_once(told):
    """vLLM asks how much is held elsewhere before it loads; the loader that loads goes by the same answer."""
    layout = Layout.from_json(told["layout"])
    assert told["external"] == layout.nbytes == sum(layout.parts)
    assert told["second"] == told["changed"], "the live weights, not those on disk"
    assert told["sessions"] == [True]
    assert told["allocations"] == 1
    assert told["answers_left"] == 0
