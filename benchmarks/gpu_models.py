"""Models of the shapes that matter, with random weights that are made on the device: no file is read or downloaded."""

from __future__ import annotations

import functools
import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from hogwild import gpu_memory, skeleton
from hogwild.arena import devices
from hogwild.arena.client import Arena
from hogwild.arena.control import ControlPage
from hogwild.layout import Layout, Region, Source
from hogwild.settings import Config
from hogwild.weights import Weights

_LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}  # fmt: skip
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Llama 1B": (LlamaConfig, {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    }),
    "Llama 8B": (LlamaConfig, {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    }),
    "Qwen3 32B": (Qwen3Config, {
        "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }),
}  # fmt: skip
NAMES = tuple(_CONFIGS)
_TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,  # what vLLM serves on a CPU
}  # fmt: skip
_ALIGNMENT = 256


def config_of(name: str, tiny: bool) -> PretrainedConfig:
    """The configuration of one of NAMES; with `tiny` the same architecture at a thousandth of the size."""
    kind, settings = _CONFIGS[name]
    made = kind(**{**settings, **(_TINY if tiny else {})}, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    made.dtype = torch.bfloat16
    made.architectures = [kind.__name__.replace("Config", "ForCausalLM")]  # as every checkpoint says
    return made


@dataclass(frozen=True)
class Sizes:
    """What of a model costs time and memory.

    Attributes:
        linears: (m, n) of the linear weights of one layer -> how many of them.
        head: elements of an output head of its own; 0: it is tied, and frozen.
        parameters: elements of the whole model.
    """

    linears: dict[tuple[int, int], int]
    layers: int
    head: int
    parameters: int

    @property
    def layer(self) -> int:
        """Elements of the linear weights of one layer."""
        return sum(m * n * count for (m, n), count in self.linears.items())

    @property
    def nbytes(self) -> int:
        return 2 * self.parameters


@functools.cache
def sizes(folder: Path) -> Sizes:
    """Of the model whose configuration is in `folder`."""
    model = skeleton.empty(folder)
    linears = Counter(
        (module.out_features, module.in_features)
        for module in model.base_model.layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    )
    tied = model.config.tie_word_embeddings
    return Sizes(
        linears=dict(linears),
        layers=len(model.base_model.layers),
        head=0 if tied else model.lm_head.weight.numel(),
        parameters=sum(parameter.numel() for parameter in stored(folder).values()),
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of the model has, without memory: a tied head is none of them."""
    model = skeleton.empty(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: parameter for name, parameter in model.named_parameters() if name not in tied}


def folder_of(name: str, tiny: bool, root: Path) -> Path:
    """A folder with the model's configuration and nothing else, made if it is not there."""
    folder = root / name.replace(" ", "-")
    if not folder.exists():
        config_of(name, tiny).save_pretrained(folder)
    return folder


def make_arena(folder: Path, device: torch.device, seed: int = 0) -> Arena:
    """New shared memory on `device` with the model's tensors one after the other, random.

    Raises:
        ArenaError: there is no room for it.
    """
    regions, offset = {}, 0
    for name, parameter in stored(folder).items():
        shape = tuple(parameter.shape)
        regions[name] = Region(offset, shape, parameter.contiguous().stride(), "bfloat16")
        offset = -(-regions[name].end // _ALIGNMENT) * _ALIGNMENT
    held = devices.allocate(offset, device)
    source = Source(str(folder), (), hashlib.sha256((folder / "config.json").read_bytes()).hexdigest())
    layout = Layout(offset, regions, {}, regions, source, device=held.device_id, parts=held.parts)
    arena = Arena(held, ControlPage.create(layout.fingerprint()), layout)
    fill(arena, seed)
    return arena


def fill(arena: Arena, seed: int) -> None:
    """Random weights, the same for the same seed: N(0, 0.02), norms about one."""
    weights = Weights(arena)
    generator = torch.Generator(arena.weights.device).manual_seed(seed)
    for name in weights.names:
        view = weights.view(name)
        view.normal_(0, 0.02, generator=generator)
        if view.ndim == 1:
            view.add_(1)


def bits(arena: Arena) -> int:
    """A sum over the bits of all tensors: equal for equal weights, in every process."""
    weights = Weights(arena)
    sums = [weights.view(name).view(torch.int16).sum(dtype=torch.int64) for name in weights.names]
    return int(torch.stack(sums).sum())


@dataclass(frozen=True)
class Example:
    """Tokens, and which of them are trained (hogwild.batch.Encoded)."""

    ids: list[int]
    trained: list[bool]


def example(vocabulary: int, context: int, trained: int, seed: int) -> Example:
    """Random tokens, of which the last `trained` are trained."""
    dice = random.Random(seed)
    ids = [dice.randrange(3, vocabulary) for _ in range(context + trained)]
    return Example(ids, [False] * context + [True] * trained)


def predicted(arena: Arena, rank: int, tokens: int, vocabulary: int, activation_mib: int) -> gpu_memory.Needs:
    """What `hogwild doctor` says of one trainer thread with passes of `tokens` tokens, without protection."""
    layout = arena.layout.tensors
    tables = [region.shape for name, region in layout.items() if "embed" in name]
    trained = {name: region.shape for name, region in layout.items() if "embed" not in name}
    layers = sum(name.endswith("q_proj.weight") for name in layout)
    config = Config.model_validate(
        {
            "training": {
                "threads": 1,
                "batch_tokens": tokens,
                "max_tokens": tokens,
                "activation_mib": activation_mib,
            },
            "optimizer": {"rank": rank},
            "replay": {"protected_rank": 0},
        }
    )
    model = gpu_memory.Model(trained, 0, vocabulary, tables[0][1], layers)
    return gpu_memory.predict(model, config)
