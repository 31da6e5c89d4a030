"""Section 5: a server and a trainer, two processes on one copy of the weights: what each gets, alone and together."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gpu_models
import gpu_server
import gpu_vllm
from gpu_bench import Bench, Peer, listen, wait_for
from gpu_step import optimizer_of, trainer_of
from hogwild import streams
from hogwild.arena.hub import Hub
from hogwild.governor import Governor, prepare_gpu
from hogwild.settings import GovernorConfig, TrainingConfig
from hogwild.trainer import Item, Progress, Trainer

MODELS = ("Llama 8B", "Llama 1B")
"""The first that there is room for is served; vLLM, which takes minutes to compile a large one, has the last."""
_BATCH, _LENGTH = 16, 512
_TOKENS = 64
_POLICIES: tuple[Literal["off", "share", "strict"], ...] = ("off", "share", "strict")
_SECONDS, _ROUNDS = 1.5, 2
"""Of each policy, in turns, for what a server does alone varies by some percent from one moment to the next."""
_SERVED_EQUALS_TRAINED, _MOST_STEPS = 0.05, 300  # nats a token, for both compute in bf16


@dataclass
class Training:
    """A trainer thread that goes on until it is stopped."""

    trainer: Trainer
    governor: Governor
    items: list[Item]
    steps: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def during(self, server: Peer, seconds: float) -> tuple[dict[str, Any], float]:
        """What the server measures while a thread trains; training steps a second."""
        stop, before = threading.Event(), self.steps

        def loop() -> None:
            try:
                for item in itertools.cycle(self.items):
                    if stop.is_set():
                        return
                    self.trainer.step([item])
                    self.steps += 1
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        began = time.perf_counter()
        measured = server.ask("measure", seconds)
        took, done = time.perf_counter() - began, self.steps - before
        stop.set()
        self.governor.hurry()
        thread.join(60)
        self.governor.hurry(False)
        if self.failures:
            raise self.failures[0]
        return measured, done / took


@dataclass
class Measured:
    """What the server measured once, and training steps a second meanwhile."""

    said: dict[str, Any]
    steps: float

    @property
    def rate(self) -> float:
        """Served tokens a second."""
        return float(self.said["tokens"] / self.said["seconds"])


def run(bench: Bench) -> None:
    sock = bench.folder / "arena.sock"
    choices = []
    for name in MODELS:
        folder = gpu_models.folder_of(name, bench.tiny, bench.folder)
        choices.append((name, folder, gpu_models.sizes(folder).nbytes))
    hub = listen(sock)
    batch, length = (2, 24) if bench.tiny else (_BATCH, _LENGTH)
    lack = gpu_vllm.why_not()
    wanted = bench.vllm and bench.name == "serving"
    vllm = wanted and not lack
    if wanted and lack:
        bench.out.leave_out(f"{lack}; a loop over a Hugging Face model takes its place")
    work = gpu_vllm.serve if vllm else gpu_server.serve
    server = bench.start(work, sock, choices, bench.device, batch, length)
    prepare_gpu(
        TrainingConfig(), os.environ
    )  # the server has its environment, and CUDA has not read ours yet
    try:
        name, why_not = server.hear("ready", max(bench.left_s(), 60))
    except RuntimeError as error:
        raise RuntimeError(f"{error}{gpu_vllm.last_words(sock)}") from error
    kind = f"vLLM {gpu_vllm.version()}" if vllm else "a Hugging Face model under CUDA graphs"
    if why_not:
        kind = "a Hugging Face model, eager"
        bench.out.leave_out(f"CUDA graphs: {why_not}")
    folder = next(folder for one, folder, _ in choices if one == name)
    try:
        _together(bench, hub, server, folder, f"{kind}, {name}")
    finally:
        server.kill()
        hub.stop()


def _together(bench: Bench, hub: Hub, server: Peer, folder: Path, what: str) -> None:
    arena = wait_for(lambda: hub.arena)
    before = gpu_models.bits(arena)
    bench.out.check("the trainer's process maps what the server has loaded", server.ask("bits") == before)
    governor = Governor(GovernorConfig(policy="off"), arena.control, partial(streams.settle, bench.device))
    progress = Progress(arena.control, 8)
    trainer = trainer_of(
        folder, arena, optimizer_of(arena, bench.tiny), progress, between_layers=governor.between_layers
    )
    vocabulary = trainer.model.config.vocab_size
    tokens = 8 if bench.tiny else _TOKENS
    items = [Item(gpu_models.example(vocabulary, 1, tokens, seed)) for seed in range(8)]
    training = Training(trainer, governor, items)
    unseen = Item(gpu_models.example(vocabulary, 1, tokens, len(items)))
    _same(bench, server, trainer, unseen, "before training")
    trainer.step([items[0]])  # finds the fastest kernels
    seconds = 0.2 if bench.tiny else _SECONDS
    server.ask("measure", seconds / 4)  # warms up
    found: dict[str, list[Measured]] = {training_: [] for training_ in ("none", *map(_of_policy, _POLICIES))}
    for round_ in range(_ROUNDS):
        if round_ and bench.left_s() < (len(_POLICIES) + 2) * seconds:
            bench.out.leave_out(f"round {round_ + 1} of {_ROUNDS}: no time was left")
            break
        found["none"].append(Measured(server.ask("measure", seconds), 0.0))
        for policy in _POLICIES:
            governor.configure(GovernorConfig(policy=policy))
            found[_of_policy(policy)].append(Measured(*training.during(server, seconds)))
        governor.configure(GovernorConfig(policy="off"))
    found["none"].append(Measured(server.ask("measure", seconds), 0.0))
    _rows(bench, what, found, tokens)
    bench.out.check(
        "both processes have the same weights at the end", server.ask("bits") == gpu_models.bits(arena)
    )
    bench.out.check("and they are others than at the beginning", gpu_models.bits(arena) != before)
    bench.out.check("the server sees every step on the control page", server.ask("steps") == progress.steps)
    _learn(trainer, unseen)
    _same(bench, server, trainer, unseen, "after it")


def _learn(trainer: Trainer, item: Item) -> None:
    """Move its loss by more than what passes for the same."""
    before = trainer.loss(item.encoded)
    for _ in range(_MOST_STEPS):
        if before - trainer.loss(item.encoded) > 3 * _SERVED_EQUALS_TRAINED:
            return
        trainer.step([item])
    raise RuntimeError(f"the loss of an example has not moved in {_MOST_STEPS} steps")


def _same(bench: Bench, server: Peer, trainer: Trainer, item: Item, when: str) -> None:
    served, trained = server.ask("loss", list(item.encoded.ids)), trainer.loss(item.encoded)
    bench.out.check(
        f"server and trainer give an example the same loss, {when}",
        abs(served - trained) < _SERVED_EQUALS_TRAINED,
        f"{served:.4f} and {trained:.4f} nats a token",
    )


def _of_policy(policy: str) -> str:
    return f"policy {policy!r}"


def _rows(bench: Bench, what: str, found: dict[str, list[Measured]], tokens: int) -> None:
    """Each kind of training against the mean of the times without any."""
    alone = statistics.mean(one.rate for one in found["none"])
    for training, measured in found.items():
        times = sorted(itertools.chain.from_iterable(one.said["token_s"] for one in measured))
        if any(one.said["out_of_range"] for one in measured):
            bench.out.check("every token that was served is one", False, f"training: {training}")
        bench.out.row(
            f"{what}; training {tokens} tokens a step",
            training=training,
            **{
                "served tokens/s": statistics.mean(one.rate for one in measured),
                "of those alone": statistics.mean(one.rate for one in measured) / alone,
                "each time": " ".join(f"{one.rate / alone:.2f}" for one in measured),
                "token, ms (median)": 1000 * statistics.median(times),
                "token, ms (p99)": 1000 * times[min(int(0.99 * len(times)), len(times) - 1)],
                "trained tokens/s": tokens * statistics.mean(one.steps for one in measured),
            },
        )
