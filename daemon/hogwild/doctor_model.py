"""`hogwild doctor --model DIR`: what would be trained of a model, frozen and refused, and why. Imports no torch.

It asks vLLM itself: the model is loaded once, as a server would load it, in a process of its own that serves nothing.
Another process builds the trainer's model around what came of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hogwild import gpu_memory, openmp
from hogwild.doctor import Finding, Subject, fail, ok, warn
from hogwild.plural import counted
from hogwild.settings import Config
from hogwild.vllm_plugin.arguments import in_full

_SHOWN = 3  # names of frozen tensors that are written out


def model(folder: Path, subject: Subject) -> Iterator[Finding]:
    """Everything about the model in `folder`."""
    if not (folder / "config.json").is_file():
        yield fail("model", f"{folder} has no config.json", "give the folder of a Hugging Face model")
        return
    with tempfile.TemporaryDirectory(prefix="hogwild-") as scratch:
        out = Path(scratch) / "layout.json"
        arguments = _without_place(in_full(subject.config.server.arguments))
        ran = _python("hogwild.vllm_plugin.try_model", out, folder.absolute(), *arguments)
        if not out.is_file():
            yield fail(
                "model", f"vLLM ended with {ran.returncode}: {ran.stderr[-500:].strip()}", _WHAT_VLLM_SAYS
            )
            return
        found = json.loads(out.read_text())
        if "refused" in found:
            for problem in found["problems"]:
                yield fail("refused", problem, f"{found['refused']}; hogwild vllm would say the same")
            return
        replay = subject.config.replay
        options = {
            "--embeddings": subject.config.training.embeddings,
            "--experts": subject.config.training.experts,
            "--protected": replay.protected_rank and replay.self_texts and replay.ratio,
        }
        chosen = [option for option, wanted in options.items() if wanted]
        asked = _python("hogwild.coverage", folder.absolute(), out, *chosen)
        if asked.returncode:
            ended = f"what builds the trainers' model ended with {asked.returncode}"  # killed for want of memory, say
            *_, said = ended, *asked.stderr.strip().splitlines()
            yield fail("refused", said, "report it, with the model's config.json")
            return
        about = json.loads(asked.stdout)
        yield from _covered(about)
        if about["device"] != "cpu":
            yield from _fits(about, subject.config)


def _covered(about: dict[str, Any]) -> Iterator[Finding]:
    share = 100 * about["trained_elements"] / max(about["elements"], 1)
    tensors = counted(about["trained"], "tensor")
    trained = f"{tensors} of {about['model']}, {share:.1f}% of {about['elements']:,} weights"
    yield (
        ok("trained", trained)
        if about["trained"]
        else fail("trained", trained, "nothing could be learned: see what is frozen, and why")
    )
    for why, names in about["frozen"]:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        said = f"{', '.join(names[:_SHOWN])}{more}: {why}"
        expected = "embeddings" in why or why.startswith(("not of the language model", "protected"))
        yield (
            ok("frozen", said)
            if expected
            else warn("frozen", said, "it stays as it is; the rest learns without it")
        )


def _fits(about: dict[str, Any], config: Config) -> Iterator[Finding]:
    """What training will take of the GPU, against what it may take and what the server leaves."""
    sizes = gpu_memory.Model(**about["sizes"])
    needs = gpu_memory.predict(sizes, config)
    most = config.training.most_trained
    trained = "all trained" if most == config.training.max_tokens else f"{most} of them trained"
    found = (
        f"beside {gpu_memory.gib(about['weights_nbytes'])} GiB of weights, training takes at most {needs}, with "
        f"examples of training.max_tokens = {config.training.max_tokens} tokens, {trained}"
    )
    if scan := config.training.threads * gpu_memory.scan(sizes, config):
        found += f"; {gpu_memory.gib(scan)} of the activations are for the scans of its recurrent layers"
    elif sizes.scans:
        found += "; what the scans of its recurrent layers take for a moment is not in it"
    less = (
        "lower training.threads, training.max_trained_tokens, training.max_tokens or training.activation_mib"
    )
    own = needs.total - needs.context  # what the setting is about
    if 0 < config.training.gpu_memory_gib * 2**30 < own:
        allowed = f"training.gpu_memory_gib allows {config.training.gpu_memory_gib:g}"
        yield warn("gpu memory", f"{found}; {allowed}", f"allow {_up(own)}, or {less}")
    elif about["gpu_nbytes"] and needs.total > (
        left := gpu_memory.left(about["gpu_nbytes"], in_full(config.server.arguments))
    ):
        share = max(1 - needs.total / about["gpu_nbytes"], 0)
        yield warn(
            "gpu memory",
            f"{found}; vLLM leaves {gpu_memory.gib(left)} of {gpu_memory.gib(about['gpu_nbytes'])}",
            f"serve with --gpu-memory-utilization {int(share * 100) / 100:g}, or {less}",
        )
    else:
        yield ok("gpu memory", found)


def _up(nbytes: int) -> int:
    """Whole GiB."""
    return -(-nbytes // 2**30)


_WHAT_VLLM_SAYS = "start `vllm serve` on it, which says more"


def _without_place(arguments: tuple[str, ...] | list[str]) -> list[str]:
    """Arguments of the server that say something about the model: not where it listens."""
    kept, skip = [], False
    for one in arguments:
        if skip:
            skip = False
        elif one in ("--port", "--host", "--api-key", "--served-model-name"):
            skip = True
        else:
            kept.append(one)
    return kept


def _python(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**openmp.PASSIVE, **env},
    )  # fmt: skip
