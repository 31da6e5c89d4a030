"""`hogwild doctor --model DIR`: what would be trained of a model, asked of vLLM itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES
from support import environment

pytestmark = pytest.mark.vllm


def examine(name: str, root: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    (architecture,) = (one for one in ARCHITECTURES if one.name == name)
    folder = architecture.build(root / "model")
    config = root / "hogwild.toml"
    config.write_text(f'state_dir = "{root}/state"\n[server]\narguments = {json.dumps(list(arguments))}\n')
    ran = subprocess.run(
        [sys.executable, "-m", "hogwild", "doctor", "--json", "-c", config, "--model", folder],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran.returncode, json.loads(ran.stdout)


def test_what_is_trained_and_what_is_frozen_and_why(tmp_path: Path) -> None:
    code, findings = examine("Qwen3.5-VL text", tmp_path, "--port", "8000", "--language-model-only")
    assert code == 0, findings
    (trained,) = (one for one in findings if one["what"] == "trained")
    assert "31 tensors of Qwen3_5ForCausalLM" in trained["found"]
    frozen = [one["found"] for one in findings if one["what"] == "frozen"]
    assert any("model.embed_tokens.weight: embeddings are frozen" in one for one in frozen)
    assert any("visual" in one and "not of the language model" in one for one in frozen)
    (protected,) = (one for one in frozen if one.endswith(": protected: it acts on every text alike"))
    assert "model.layers.0.linear_attn" in protected, frozen
    assert len(frozen) == 3


def test_what_is_refused_and_what_would_work(tmp_path: Path) -> None:
    code, findings = examine("Llama, fp8", tmp_path)
    assert code == 1
    (refused,) = (one for one in findings if one["what"] == "refused")
    assert (
        "fp8 weights are not the weights that are trained: serve the model that they were made from"
        in refused["found"]
    )
    assert refused["fix"]
