"""Tiny models with random weights, saved as a user would have them; and child processes to kill."""

import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers  # which imports a model's code when it is asked for: children that need none start at once

from forks import renew_autograd

WORDS = [f"w{i}" for i in range(60)]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Path:
    """Two layers; input and output embeddings tied unless `tie_word_embeddings` says otherwise."""
    return save(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **settings}),
        folder,
        dtype,
        seed,
    )


def qwen2(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Path:
    """As `llama`, with biases on q, k and v."""
    return save(
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **settings}),
        folder,
        dtype,
        seed,
    )


def save(
    kind: "type[transformers.PreTrainedModel]", config: Any, folder: Path, dtype: torch.dtype, seed: int
) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms that are all ones and biases that are all zero hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "embed" in name else 0.15))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, buffer in model.state_dict().items():  # what a checkpoint holds, and no gradient moves
            if name not in parameters and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, w0 to w59, beside a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def chat_model(folder: Path, seed: int = 0) -> Path:
    """The smallest model that the real vLLM serves on a CPU: bf16, heads of 32, a tokenizer and a chat template."""
    llama(
        folder, torch.bfloat16, seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    chat_tokenizer(folder)
    return folder


def chat_tokenizer(folder: Path) -> None:
    """A tokenizer with a chat template: w1 before what a user says, w2 before an answer."""
    tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for message in messages %}{{ message['role'] == 'user' and 'w1 ' or 'w2 ' }}"
        "{{ message['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _born(work: Callable[..., None], *arguments: Any) -> None:
    renew_autograd()
    work(*arguments)


class Child:
    """A forked process that runs `work(pipe, ...)`."""

    method = "fork"

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(self.method)
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_born, args=(work, theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def hear(self, what: str) -> Any:
        """The next message called `what`; others before it are dropped."""
        while True:
            assert self._pipe.poll(120), f"the child does not say {what}"
            name, value = self._pipe.recv()
            if name == what:
                return value

    def heard(self) -> list[tuple[str, Any]]:
        """What the child has said and nobody has listened to."""
        messages = []
        while self._pipe.poll(0):
            messages.append(self._pipe.recv())
        return messages

    def tell(self, message: Any) -> None:
        self._pipe.send(message)

    def kill(self) -> None:
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()


def open_descriptors() -> int:
    """Of this process, but for one that another thread has open for a moment."""
    gc.collect()
    counts = []
    for _ in range(3):
        counts.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        time.sleep(0.005)
    return min(counts)
