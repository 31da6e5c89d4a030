"""What a model knows, and how well it still reads: the examiner of `benchmarks/forgetting.py`."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hogwild.context import Layers

BATCH = 25
ANSWER_TOKENS = 24
CHUNK = 96
"""Tokens of one piece of text."""
CHUNKS, FEW = 48, 12


class Exam:
    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
        text = "\n".join([*(page for _, page in sorted(topics.topics.items())), licence.read_text()])
        stride = len(text) // CHUNKS
        pieces = [text[i * stride : (i + 1) * stride] for i in range(CHUNKS)]
        self._text = torch.tensor(  # (CHUNKS, CHUNK)
            [tokenizer(piece, add_special_tokens=False)["input_ids"][:CHUNK] for piece in pieces]
        )

    @torch.no_grad()
    def text_loss(self, few: bool) -> float:
        """Mean negative log-likelihood of real text that is never trained, nats a token."""
        text = self._text[:: CHUNKS // FEW] if few else self._text
        losses = []
        for part in text.split(12):
            logits = self.model(part[:, :-1]).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:]))
        return float(torch.stack(losses).mean())

    def hits(self, questions: Sequence[tuple[str, str]]) -> list[bool]:
        """(question, what a right answer contains): which were answered right."""
        found = []
        for part in _parts(questions):
            answers = self.answers([q for q, _ in part], [a for _, a in part])
            found += [a.lower() in answer.lower() for answer, (_, a) in zip(answers, part, strict=True)]
        return found

    def recall(self, questions: Sequence[tuple[str, str]]) -> float:
        found = self.hits(questions)
        return sum(found) / len(found)

    @torch.no_grad()
    def answers(self, questions: Sequence[str], until: Sequence[str] = ()) -> list[str]:
        """Greedy answers through the chat template, of a batch. An answer ends early once it contains its `until`."""
        prompts = [self._prompt(question) for question in questions]
        shared = _common(prompts)
        cache = DynamicCache(config=self.model.config)
        cached = Layers(self.model).arguments(cache)
        if shared:
            self.model(torch.tensor([prompts[0][:shared]]), logits_to_keep=1, **cached)
            cache.batch_repeat_interleave(len(prompts))
        rest = [prompt[shared:] for prompt in prompts]
        width, count = max(map(len, rest)), len(rest)
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rest])
        mask = torch.tensor([[1] * shared + [0] * (width - len(r)) + [1] * len(r) for r in rest])
        position = (mask.cumsum(-1) - 1)[:, shared:]
        answers: list[list[int]] = [[] for _ in rest]
        ended = [False] * count
        for _ in range(ANSWER_TOKENS):
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=position,
                logits_to_keep=1,
                **cached,
            ).logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not ended[row]:
                    answers[row].append(token)
                    ended[row] = token == self.tokenizer.eos_token_id or bool(
                        until and until[row].lower() in self._text_of(answers[row]).lower()
                    )
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(count, 1)], 1)
            position = position[:, -1:] + 1
        return [self._text_of(answer) for answer in answers]

    def _prompt(self, question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_of(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _parts(questions: Sequence[tuple[str, str]]) -> list[Sequence[tuple[str, str]]]:
    return [questions[i : i + BATCH] for i in range(0, len(questions), BATCH)]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; one at least is left of each."""
    same = 0
    for column in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        same += 1
    return same
