"""The architecture matrix: is what vLLM serves what a trainer in another process sees and moves?

    python tests/matrix.py [name ...]      print the table; all of them, or those whose name contains one of these

Each architecture: a tiny random checkpoint; vLLM loads it through hogwild's loader and offers its arena; this
process takes the arena as the daemon does, builds the Hugging Face skeleton on it and compares log-probabilities of
prefill and decode, before and after it has moved every bound weight in place. Then each weight alone: an answer that
does not change by a bit is a weight that vLLM does not read.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from architectures import ARCHITECTURES, Architecture
from hogwild import disagreement, skeleton
from hogwild.arena.client import Arena
from hogwild.arena.hub import Hub
from hogwild.weights import Weights, verify_bits
from support import environment

PROMPTS = [
    [3, 17, 40, 9, 88, 23, 51, 5, 60, 12, 33, 71, 8, 94, 27, 45, 66, 19, 80, 14, 37, 52, 90, 6],
    [70, 11, 29, 84, 48],
]
DECODE = 6
FLOOR = 0.01
"""Nats: below it nothing is concluded. Above it, what the service itself accepts (disagreement.py)."""
EXACT = 1e-4
"""Nats: the largest mean difference in fp32. Measured: up to 6e-6."""


class ServerProcess:
    """matrix_server.py, and the daemon's end of its arenas."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.log = folder / "server.log"
        self._folder, self._count, self._hub = folder, 0, None
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("matrix_server.py"))],
                env=environment(**{"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **env}),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def load(self, model: Path, **settings: Any) -> Arena:
        """Serve `model`, and take its arena.

        Raises:
            RefusedError: with the server's own words.
        """
        self._count += 1
        self._drop()
        socket = self._folder / f"{self._count}.sock"
        offered: queue.Queue[Arena] = queue.Queue()
        self._hub = Hub(socket, offered.put, lambda _server, _begins: None)
        self._hub.start()
        self.say({"load": str(model), "socket": str(socket), "settings": settings})
        return offered.get(timeout=60)

    def load_stock(self, model: Path, **settings: Any) -> None:
        """Serve `model` as vLLM itself would."""
        self.say({"load": str(model), "socket": "", "settings": settings})

    def ask(self, prompts: Sequence[Sequence[int]] = PROMPTS, decode: int = DECODE) -> "Answers":
        said = self.say({"ask": [list(prompt) for prompt in prompts], "decode": decode})
        texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, said["tokens"], strict=True)]
        return Answers(texts, [torch.tensor(one) for one in said["logprobs"]])

    def say(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line:
            raise AssertionError(f"vLLM has ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer

    def end(self) -> None:
        self._drop()
        self.popen.kill()
        self.popen.wait()

    def _drop(self) -> None:
        if self._hub is not None:
            self._hub.stop()
            self._hub = None


class RefusedError(Exception):
    """The server does not serve this model, and says why."""


@dataclass(frozen=True)
class Answers:
    """Whole texts, and the log-probability of each of their tokens but the first as vLLM gave it, prefill and
    decode."""

    texts: list[list[int]]
    logprobs: list[torch.Tensor]

    def same(self, other: "Answers") -> bool:
        """To the last bit."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.texts == other.texts and all(torch.equal(a, b) for a, b in pairs)


@dataclass
class Outcome:
    """What came of one architecture.

    Attributes:
        bound: parameters of the Hugging Face model that lie in the arena.
        frozen: checkpoint tensor -> why it is not trained.
        before, after: how server and trainer differ, as loaded and with every weight moved.
        exact: by how much they differ in fp32, in nats, with every weight moved; None: not asked, or not to be had.
        moved: by how much the weights' move changed the answers, in nats: what a dead model would be off by.
        dead: bound parameters that vLLM does not read.
        unplaced: parameters whose tensors are all served live, and that the trainer has a copy of.
        refused: what the server said, if it did not serve.
    """

    bound: int = 0
    frozen: dict[str, str] = field(default_factory=dict)
    before: "Difference | None" = None
    after: "Difference | None" = None
    exact: float | None = None
    moved: float = float("nan")
    dead: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)
    refused: str = ""
    seconds: float = 0.0

    def problems(self, expected: Architecture) -> list[str]:
        """What is not as it should be."""
        found = self._found(expected)
        if not expected.unserved:
            return found
        known = any(expected.unserved in one for one in found)
        return [] if known else [*found, f"expected {expected.unserved!r}: vLLM may serve it by now"]

    def _found(self, expected: Architecture) -> list[str]:
        if expected.refused or self.refused:
            if expected.refused and expected.refused in self.refused:
                return []
            return [f"expected {expected.refused or 'to serve'!r}, got {self.refused or 'served'!r}"]
        assert self.before is not None
        assert self.after is not None
        found = [f"{name}: vLLM does not read it" for name in self.dead]
        found += [f"{name}: the trainer has a copy of what is served live" for name in self.unplaced]
        found += [f"differs by {one} as loaded" for one in self.before.problems()]
        found += [f"differs by {one} once every weight has moved" for one in self.after.problems()]
        if self.exact is not None and not self.exact <= EXACT:
            found.append(f"differs by {self.exact:.0e} nats in fp32 (limit {EXACT:.0e})")
        if not self.moved > 2 * max(self.after.limits):  # a dead model would be off by that then
            found.append(
                f"moving every weight changed the answers by {self.moved:.3f} nats: nothing is proved"
            )
        for name, why in self.frozen.items():
            if not any(part in name for part in expected.frozen):
                found.append(f"{name} is frozen: {why}")
        return found


def examine(
    server: ServerProcess, architecture: Architecture, folder: Path, *, each: bool = True, exact: bool = False
) -> Outcome:
    """Serve it, move its weights, compare. `each`: also every weight alone. `exact`: also in fp32."""
    began, outcome = time.monotonic(), Outcome()
    architecture.build(folder)
    try:
        arena = server.load(folder, **architecture.vllm)
    except RefusedError as error:
        outcome.refused, outcome.seconds = str(error), time.monotonic() - began
        return outcome
    weights = Weights(arena)
    verify_bits(weights, folder)
    model = skeleton.build(folder, weights)
    bound = skeleton.bound(model)
    outcome.bound, outcome.frozen = len(bound), dict(arena.layout.frozen)
    live = arena.layout.tensors.keys()
    outcome.unplaced = [
        name
        for name, recipe in model.arena_recipes.items()
        if name not in bound and live >= set(recipe.names)
    ]
    for name, region in bound.items():
        place, parameter = weights.at(region), model.get_parameter(name)
        assert (place.data_ptr(), place.shape, place.stride()) == (
            parameter.data_ptr(), parameter.shape, parameter.stride(),
        ), f"{name} lies elsewhere than the skeleton says"  # fmt: skip
    first = server.ask()
    outcome.before = compare(model, first)
    with moved(model, list(bound)):
        second = server.ask()
        outcome.after = compare(model, second)
        outcome.moved = float((first.logprobs[0] - second.logprobs[0])[: len(PROMPTS[0]) - 1].abs().mean())
    assert server.ask().same(first), "the weights are back, the answers are not"
    if each:
        for name in bound:
            with moved(model, [name], scale=2.0):
                if server.ask(PROMPTS[:1], 2).same(Answers([first.texts[0][:26]], [first.logprobs[0][:25]])):
                    outcome.dead.append(name)
    if exact:
        try:
            outcome.exact = in_fp32(server, architecture, folder.with_name(f"{folder.name}-fp32"))
        except RefusedError as error:
            if "requires BF16" not in str(error):  # Gated DeltaNet on a CPU
                raise
    outcome.seconds = time.monotonic() - began
    return outcome


@torch.no_grad()
def in_fp32(server: ServerProcess, architecture: Architecture, folder: Path) -> float:
    """Mean difference in nats between vLLM and the model where rounding hides nothing, with every weight moved."""
    architecture.build(folder, torch.float32)
    arena = server.load(folder, dtype="float32", **architecture.vllm)
    model = skeleton.build(folder, Weights(arena))
    with moved(model, list(skeleton.bound(model))):
        return max(compare(model, server.ask()).means)


@dataclass(frozen=True)
class Difference:
    """Between vLLM and the model, in nats: of prefill, and of decode.

    Attributes:
        means: over tokens.
        limits: that the service sets for them.
        noise: what rounding every layer's output once more makes.
    """

    means: tuple[float, float]
    limits: tuple[float, float]
    noise: float

    def problems(self) -> list[str]:
        """Which of the means are above their limits."""
        return [
            f"{mean:.3f} nats in {part} (limit {limit:.3f})"
            for part, mean, limit in zip(("prefill", "decode"), self.means, self.limits, strict=True)
            if not mean <= limit
        ]


@torch.no_grad()
def compare(model: Any, answers: Answers) -> Difference:
    """What vLLM answered against what the model computes."""
    noise = disagreement.noise(model, answers.texts, log_probabilities)
    parts: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...] = [], []
    for text, served in zip(answers.texts, answers.logprobs, strict=True):
        own, read = log_probabilities(model, text), len(text) - DECODE
        parts[0].append(
            (served[:read], own[:read])
        )  # the last of them is of the first token that was generated
        parts[1].append((served[read:], own[read:]))
    means, limits = [], []
    for part in parts:
        served, own = (torch.cat(one) for one in zip(*part, strict=True))
        means.append(float((served - own).abs().mean()))
        limits.append(max(FLOOR, disagreement.allowed(disagreement.FACTOR * noise, own)))
    return Difference((means[0], means[1]), (limits[0], limits[1]), noise)


def log_probabilities(model: Any, text: Sequence[int]) -> torch.Tensor:
    """(L - 1,) of each token of `text` after the first."""
    ids = torch.tensor([list(text)])
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@contextmanager
def moved(model: Any, names: Sequence[str], scale: float = 1.0) -> Iterator[None]:
    """While this is open, these weights of the arena are others, written in place."""
    generator, before = torch.Generator().manual_seed(0), []
    for name in names:
        live = model.get_parameter(name).data
        before.append((live, live.clone()))
        noise = torch.randn(live.shape, generator=generator)
        step = 0.3 * (live.float().std() if live.numel() > 1 and float(live.float().std()) > 0 else 1.0)
        live.copy_(live.float() + scale * step * noise)
    try:
        yield
    finally:
        for live, old in before:
            live.copy_(old)


def table(rows: Sequence[tuple[Architecture, Outcome]]) -> Iterator[str]:
    """As docs/models.md shows it."""
    yield "| Architecture | Bound | Frozen | Difference (noise) as loaded, moved | In fp32 | Result |"
    yield "|---|---|---|---|---|---|"
    for architecture, outcome in rows:
        problems = outcome.problems(architecture)
        if architecture.unserved and not problems:
            yield f"| {architecture.name} | | | | | not served by vLLM on a CPU: {architecture.unserved} |"
            continue
        if outcome.refused:
            said = outcome.refused.strip().splitlines()[-1].strip(" -")
            result = f"refused: {said}" if not problems else f"**{problems[0]}**"
            yield f"| {architecture.name} | | | | | {result} |"
            continue
        parts = sorted(part for part in architecture.frozen if any(part in name for name in outcome.frozen))
        frozen = f"{len(outcome.frozen)}: {', '.join(parts)}" if parts else "none"
        result = "live, agrees" if not problems else f"**{'; '.join(problems)}**"
        assert outcome.before is not None
        assert outcome.after is not None
        said = ", ".join(f"{max(one.means):.3f} ({one.noise:.3f})" for one in (outcome.before, outcome.after))
        exact = "-" if outcome.exact is None else f"{outcome.exact:.0e}"
        yield f"| {architecture.name} | {outcome.bound} | {frozen} | {said} | {exact} | {result} |"


def main(wanted: Sequence[str]) -> int:
    chosen = [a for a in ARCHITECTURES if not wanted or any(w.lower() in a.name.lower() for w in wanted)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        server = ServerProcess(Path(name))
        try:
            for number, architecture in enumerate(chosen):
                try:
                    outcome = examine(server, architecture, Path(name) / f"model-{number}", exact=True)
                except Exception as error:  # the other rows say something all the same
                    if os.environ.get("MATRIX_TRACE"):
                        raise
                    outcome = Outcome(refused=f"{type(error).__name__}: {error}")
                rows.append((architecture, outcome))
                problems = outcome.problems(architecture)
                print(
                    f"{architecture.name}: {outcome.seconds:.0f} s {problems or 'as expected'}",
                    outcome.before, outcome.after, file=sys.stderr,
                )  # fmt: skip
        finally:
            server.end()
    print("\n".join(table(rows)))
    served = sum(not (outcome.refused or architecture.unserved) for architecture, outcome in rows)
    bad = sum(bool(outcome.problems(architecture)) for architecture, outcome in rows)
    print(
        f"\n{len(rows)} architectures: {served} served, {len(rows) - served} refused or unserved, {bad} not as expected"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
