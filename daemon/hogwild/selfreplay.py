"""Texts that the model wrote itself before it was trained: they stand in for the old data that nobody has.

Plain texts go on from an everyday first word, chats answer everyday questions through the model's own template,
sampled at temperature 1. With each token is kept what the model thought of it (`likeliest`): replay pulls back towards
that, and a model that has not moved has nothing to learn. Made once for a model, kept as `selfreplay.json` in the
state folder; the same seed gives the same texts.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hogwild import encoding, model_file
from hogwild.context import Layers
from hogwild.likeliest import Likeliest

VERSION = 1
ROUND = 16  # texts that are sampled side by side
FEW_TOKENS = 8
FIRST_WORDS = (
    "The", "In", "A", "It", "When", "This", "There", "For", "He", "She", "They", "One", "If", "At", "My", "Many",
)  # fmt: skip
QUESTIONS = (
    "Tell me a short story.",
    "What is the capital of France?",
    "How do I cook rice?",
    "Explain how plants grow.",
    "Write a few lines about the sea.",
    "What is a computer?",
    "How can I sleep better?",
    "Who was Albert Einstein?",
    "What is 12 times 4?",
    "Recommend a good book.",
    "How does a car engine work?",
    "What should I eat for breakfast?",
    "Who are you?",
    "Which is the largest planet?",
    "How can I learn a language?",
    "Give me an example of a polite letter.",
)


@dataclass(frozen=True, eq=False)
class Sample:
    """A text of the model's own: what `encoding.Encoded` is for an example."""

    ids: tuple[int, ...]
    start: int
    """The first token that the model wrote; those before it were given."""
    likeliest: Likeliest
    """What it thought at each token that it wrote."""

    @property
    def trained(self) -> list[bool]:
        return [i >= self.start for i in range(len(self.ids))]


def make(
    model: PreTrainedModel,
    given: Sequence[Sequence[int]],
    end: Collection[int],
    *,
    tokens: int,
    seed: int,
    limit_s: float = float("inf"),
    stopped: Callable[[], bool] = lambda: False,
    greedy: bool = False,
) -> list[Sample]:
    """Sample one text for each of `given`.

    Args:
        given: what each text begins with, from `prompts`; the last ones are left out when the time is up.
        end: tokens that end a text, from `ends`.
        tokens: longest, prompt not counted.
        limit_s: seconds; then texts are cut short (not below a few tokens), and no further ones are begun.
        stopped: asked before each token; an interrupted round is dropped.
        greedy: always the likeliest token, in place of sampling.
    """
    deadline = time.monotonic() + limit_s
    samples: list[Sample] = []
    generator = None if greedy else torch.Generator(model.device).manual_seed(seed)
    for at in range(0, len(given), ROUND):
        if samples and time.monotonic() >= deadline:
            break
        samples += _sample(model, given[at : at + ROUND], tokens, generator, end, deadline, stopped)
        if stopped():
            break
    return samples


def save(path: Path, base: str, seed: int, samples: Sequence[Sample]) -> None:
    """See `model_file.save`."""
    written = [
        {
            "ids": one.ids,
            "start": one.start,
            "likeliest": one.likeliest.ids.tolist(),
            "logs": [[round(log, 4) for log in logs] for logs in one.likeliest.logs.tolist()],
        }
        for one in samples
    ]
    model_file.save(path, VERSION, base, {"seed": seed, "samples": written})


def load(path: Path, base: str) -> list[Sample] | None:
    """The samples of the model with this digest; None where there are none. See `model_file.load`."""
    return model_file.load(
        path,
        VERSION,
        base,
        lambda body: [_read(one) for one in body["samples"]],
        without="to go on without it",
    )


def _read(one: dict[str, Any]) -> Sample:
    likeliest = Likeliest(torch.tensor(one["likeliest"]), torch.tensor(one["logs"]))
    sample = Sample(tuple(map(int, one["ids"])), int(one["start"]), likeliest)
    if likeliest.ids.shape != likeliest.logs.shape or len(likeliest.ids) != sum(sample.trained):
        raise ValueError("a text and what was thought of it differ in length")
    return sample


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Beginnings of `count` texts as token ids: plain texts and, with a chat template, chats in turn."""
    found = []
    for i in range(count):
        turn = i // 2 if tokenizer.chat_template else i
        if tokenizer.chat_template and i % 2:
            question = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
            ids = encoding.prompt([question], tokenizer)
        else:
            ids = tokenizer(FIRST_WORDS[turn % len(FIRST_WORDS)], add_special_tokens=True)["input_ids"]
        found.append(list(ids))
    return found


def ends(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens after which the model has nothing more to say: those at which a server stops too. Chat models often have
    one for the end of a turn, which only their generation_config.json names (Phi-3)."""
    text = model.config.get_text_config(decoder=True)
    found: set[int] = set()
    for own in (
        model.generation_config.eos_token_id,
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        listed = own if isinstance(own, list) else [own]
        found.update(int(end) for end in listed if end is not None)
    return found


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    given: Sequence[Sequence[int]],
    tokens: int,
    generator: torch.Generator | None,  # None: greedy
    end: Collection[int],
    deadline: float,
    stopped: Callable[[], bool],
) -> list[Sample]:
    """One batch, padded on the left; every text ends at its first end token, which belongs to it."""
    device, count, width = model.device, len(given), max(map(len, given))
    ids = torch.zeros(count, width, dtype=torch.long, device=device)
    mask = torch.zeros(count, width, dtype=torch.long, device=device)
    for row, prompt in enumerate(given):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    layers = Layers(model)
    cached = layers.arguments(DynamicCache(config=model.config))
    texts: list[list[int]] = [[] for _ in given]
    thought = []  # at each step, of all rows
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    for number in range(tokens):
        if stopped():
            return []
        if number >= FEW_TOKENS and time.monotonic() >= deadline:
            break
        logits = model(
            ids,
            attention_mask=mask if layers.attends else mask[:, -ids.shape[1] :],
            position_ids=position,
            logits_to_keep=1,
            **cached,
        ).logits[:, -1]
        thought.append(Likeliest.of(logits))
        if generator is None:
            ids = logits.argmax(-1, keepdim=True)
        else:
            ids = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)  # (count, 1)
        for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
            if not (text and text[-1] in end):
                text.append(token)
        if all(text[-1] in end for text in texts):
            break
        mask = torch.cat([mask, mask.new_ones(count, 1)], 1)
        position = position[:, -1:] + 1
    samples = []
    for row, (prompt, text) in enumerate(zip(given, texts, strict=True)):
        written = thought[: len(text)]
        likeliest = Likeliest(
            torch.stack([one.ids[row] for one in written]).cpu(),
            torch.stack([one.logs[row] for one in written]).cpu(),
        )
        samples.append(Sample((*prompt, *text), len(prompt), likeliest))
    return samples
