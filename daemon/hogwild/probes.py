"""Probes: what the model must go on knowing, however much it learns. Scored by the trainers every so many updates.

Two sets, each with a score of its own, the mean loss of its probes in nats a token:

    own    the model's own greedy answers to everyday questions, written before it was trained: made once, kept as
           `probes.json` in the state folder
    file   `probes.file`: lines as the spool takes them, {"prompt", "completion"}, {"messages"} or {"text"}

A score is compared with that of the last good generation. A set whose loss has risen by more than `probes.margin` (or
is not finite) has fallen: `judge.py` stops training, `trips.py` goes back.

Why the loss, and not whether an answer is right: a loss moves with every update, long before an answer flips.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hogwild import encoding, metrics, model_file, probe_file, pulse, selfreplay
from hogwild.errors import ExampleError
from hogwild.examples import Encoded, Example
from hogwild.loss import negative_log_likelihoods
from hogwild.settings import ProbesConfig

VERSION = 1
DRIFT = 0.2
"""Share of the margin by which one generation may move what the next ones are held against."""
BEGINNINGS = (
    "The capital of Italy is", "Water is made of", "Once upon a time there was", "The sun rises in the",
    "The most important thing in life is", "In the year 1969,", "To make tea, you need", "A dog is an animal that",
)  # fmt: skip
QUESTIONS = (
    "What is the capital of Italy?",
    "What colour is the sky?",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "Name three fruits.",
    "What do bees make?",
    "What is 2 plus 3?",
    "Say hello in a friendly way.",
)


@dataclass(frozen=True)
class Probe:
    """A text, and which of its tokens the model should think likely."""

    name: str
    ids: tuple[int, ...]  # (L,)
    start: int
    """The first token that counts; at least 1."""


@dataclass(frozen=True)
class Score:
    """Of one moment.

    Attributes:
        step: training steps done.
        losses: set -> mean over its probes, nats a token.
        right: set -> share of its tokens that are the likeliest ones.
    """

    step: int
    losses: dict[str, float]
    right: dict[str, float]


@dataclass(frozen=True)
class Good:
    """The last generation whose probes have passed.

    Attributes:
        losses: what later scores are held against. That generation's own, but never more than a fraction of the margin
            above the one before it: or a model could be led away a little with every generation.
    """

    generation: int
    losses: Mapping[str, float]


@dataclass
class Probes:
    """The sets, their newest score, and what it is compared with. Thread-safe.

    Attributes:
        frequencies: rotary ones of the model, where they may change (`rope.fingerprint`).
    """

    config: ProbesConfig
    frequencies: str = ""
    sets: dict[str, list[Probe]] = field(default_factory=dict)
    good: Good | None = None
    newest: Score | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _scored_at: int = 0

    @property
    def enabled(self) -> bool:
        return any(self.sets.values())

    @property
    def digest(self) -> str:
        """Of the sets: scores of other probes cannot be compared, nor those of a model that computes otherwise."""
        text = json.dumps([[name, [(p.ids, p.start) for p in probes]] for name, probes in self.sets.items()])
        return hashlib.sha256(f"{text}{self.frequencies}".encode()).hexdigest()[:16]

    def due(self, step: int) -> bool:
        """Is it time? True for one caller only."""
        every = self.config.every_updates
        if not self.enabled or not every or step - self._scored_at < every:
            return False
        with self._lock:
            if step - self._scored_at < every:
                return False
            self._scored_at = step
            return True

    def score(self, model: PreTrainedModel, step: int) -> Score:
        """Measure all of them with the weights as they are now."""
        with metrics.probe_seconds.time():
            found = {name: [measure(model, probe) for probe in probes] for name, probes in self.sets.items()}
        losses = {name: sum(loss for loss, _ in all_) / len(all_) for name, all_ in found.items() if all_}
        rights = {name: sum(right for _, right in all_) / len(all_) for name, all_ in found.items() if all_}
        self._scored_at = max(self._scored_at, step)
        score = Score(step, losses, rights)
        self._show(score)
        return score

    def went_back(self, state: Mapping[str, Any]) -> None:
        """The weights are a generation's again, and their scores what its state.json says: those that were measured
        last are of weights that are gone."""
        same = self.enabled and state.get("probes_digest") == self.digest
        self._show(Score(state["step"], state["probes"], state.get("probes_right", {})) if same else None)

    def _show(self, score: Score | None) -> None:
        self.newest = score
        metrics.probe_loss.clear()
        metrics.probe_right.clear()
        if score is not None:
            for gauge, values in ((metrics.probe_loss, score.losses), (metrics.probe_right, score.right)):
                for name, value in values.items():
                    gauge.labels(probes=name).set(value)

    def fallen(self, score: Score, good: Good | None = None) -> dict[str, tuple[float, float]]:
        """set -> (loss of the good generation, loss now), of each set that is worse by more than the margin."""
        good = good or self.good
        if good is None:
            return {}
        return {
            name: (good.losses.get(name, loss), loss)
            for name, loss in score.losses.items()
            if not loss - good.losses.get(name, loss) <= self.config.margin  # also true for NaN
        }

    def passed(self, generation: int, score: Score) -> None:
        """These scores are those of a generation that may be gone back to."""
        self.good = Good(generation, self.held_against(score))

    def held_against(self, score: Score) -> dict[str, float]:
        """What scores after this one will be held against."""
        before = self.good.losses if self.good is not None else {}
        most = self.config.margin * DRIFT
        return {name: min(loss, before.get(name, loss) + most) for name, loss in score.losses.items()}

    def about(self, score: Score | None) -> dict[str, Any]:
        """For state.json."""
        if score is None:
            return {}
        found = {
            "probes": score.losses,
            "probes_right": score.right,
            "probes_held": self.held_against(score),
        }
        rounded = {key: {name: round(x, 4) for name, x in values.items()} for key, values in found.items()}
        return {**rounded, "probes_digest": self.digest}

    def of_state(self, state: Mapping[str, Any]) -> Good | None:
        """What state.json says of a generation's probes, if these are still the same."""
        if state.get("probes_digest") != self.digest or not self.enabled:
            return None
        return Good(state["generation"], state["probes_held"])


@torch.no_grad()
def measure(model: PreTrainedModel, probe: Probe) -> tuple[float, float]:
    """(mean loss in nats a token, share of tokens that are the likeliest)."""
    pulse.beat()
    ids = torch.tensor([probe.ids], device=model.device)
    count = len(probe.ids) - probe.start
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=count).logits[0, -count:]
    targets = ids[0, probe.start :]
    loss = float(negative_log_likelihoods(logits, targets).mean())
    right = float((logits.argmax(-1) == targets).float().mean())
    return loss, right if math.isfinite(loss) else 0.0


def read(path: Path, encode: Callable[[Example], Sequence[Encoded]]) -> list[Probe]:
    """The probes of a file: one for each turn of a line that counts, as a user's turns do not, and for each window of a
    long text.

    Args:
        encode: as the learner encodes an example.

    Raises:
        ConfigError: naming every line that is not a probe.
    """
    found, problems = [], []
    for number, example in probe_file.read(path):
        try:
            name = example.id or f"line {number}"
            for encoded in encode(example):
                found += [Probe(name, tuple(encoded.ids[:end]), start) for start, end in _runs(encoded)]
        except ExampleError as error:
            problems.append(f"line {number}: {error}")
    probe_file.refuse(path, problems)
    return found


def _runs(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Where trained tokens are beside one another: (the first, after the last)."""
    place = 0
    for trained, run in groupby(encoded.trained):
        start, place = place, place + len(list(run))
        if trained:
            yield start, place


def make(
    model: PreTrainedModel, tokenizer: Any, config: ProbesConfig, stopped: Callable[[], bool]
) -> list[Probe]:
    """The model's own greedy answers and texts; half of them chats where it has a chat template."""
    given, names = [], []
    for number in range(config.own):
        chat = bool(tokenizer.chat_template) and number % 2 == 1
        turn = number // 2 if tokenizer.chat_template else number
        if chat:
            name = QUESTIONS[turn % len(QUESTIONS)]
            ids = encoding.prompt([{"role": "user", "content": name}], tokenizer)
        else:
            name = BEGINNINGS[turn % len(BEGINNINGS)]
            ids = tokenizer(name, add_special_tokens=True)["input_ids"]
        if name not in names:  # asked for more than there are
            names.append(name)
            given.append(list(ids))
    ends = selfreplay.ends(model, tokenizer)
    texts = selfreplay.make(
        model, given, ends, tokens=config.own_tokens, seed=0, stopped=stopped, greedy=True
    )
    return [
        Probe(name, text.ids, text.start)
        for name, text in zip(names, texts, strict=False)
        if len(text.ids) > text.start
    ]


def save(path: Path, base: str, probes: Sequence[Probe]) -> None:
    """See `model_file.save`."""
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    written = [{"name": p.name, "ids": p.ids, "start": p.start} for p in probes]
    model_file.save(path, VERSION, base, {"made_at": made_at, "probes": written})


def load(path: Path, base: str) -> list[Probe] | None:
    """The probes of the model with this digest; None where there are none. See `model_file.load`."""
    return model_file.load(
        path,
        VERSION,
        base,
        lambda body: [
            Probe(str(p["name"]), tuple(map(int, p["ids"])), int(p["start"])) for p in body["probes"]
        ],
        without="to have it made again",
    )
