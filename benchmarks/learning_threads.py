"""HOGWILD on the small model: T threads, one set of bf16 weights, one optimizer state, one stream, no
locks."""

from __future__ import annotations

import copy
import itertools
import statistics
import threading
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hogwild_kernels import AdamConfig, AdamState, ApolloConfig, ApolloState, adam_update, apollo_update
from learning_model import Linear, Model, Text
from learning_setup import BATCH, EVERY, FINE_TUNING_STEPS, SHAPE, THREAD_STEPS, schedule, validate

LR = 1e-3
"""From scratch: AdamW's best of table (i)."""

FINE_TUNING_LRS = (5e-5, 2e-4)
"""The second is the one that hogwild ships with (config/hogwild.toml)."""


def hogwild(
    text: Text, threads: int, seed: int, lr: float, pretrained: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """From scratch with the usual schedule, which peaks at `lr`, or from a pretrained model at a constant `lr`; bf16
    weights.

    Staleness of an update: the updates that others made to the same weight between this thread's forward pass
    (which read it) and this thread's own update of it.
    """
    torch.manual_seed(seed)
    shared = Model(SHAPE)
    if pretrained is not None:
        shared.load_state_dict(pretrained)
    for linear in shared.linears():
        linear.weight.data = linear.weight.data.bfloat16()
    config = ApolloConfig(rank=64, seed=seed)
    states = {f.name: ApolloState(f.name, tuple(f.weight.shape), config) for f in shared.linears()}
    small = {name: AdamState(name, tuple(p.shape), AdamConfig(seed=seed)) for name, p in shared.rest()}
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = THREAD_STEPS if pretrained is None else FINE_TUNING_STEPS
    stream = [text.batch(BATCH, SHAPE.context, generator) for _ in range(steps)]
    taken, finished = (
        itertools.count(),
        itertools.count(1),
    )  # next() is atomic: the interpreter lock covers it
    staleness: list[Counter[int]] = [Counter() for _ in range(threads)]
    curve: list[tuple[int, float]] = [(0, validate(shared, text))]
    failures: list[BaseException] = []

    def trainer(number: int) -> None:
        model = replica(shared)
        rate = [0.0]

        def update(layer: Linear, x: Tensor, d: Tensor, read_at: int) -> None:
            state = states[layer.name]
            staleness[number][state.step - read_at] += 1
            assert not apollo_update(layer.weight.data, x, d, state, lr=rate[0], seed=number).skipped

        for linear in model.linears():
            linear.hook = update
            linear.tag = lambda state=states[linear.name]: state.step  # type: ignore[misc]
        rest = model.rest()
        while (step := next(taken)) < len(stream):
            rate[0] = schedule(step, steps, lr) if pretrained is None else lr
            gradients = torch.autograd.grad(model(stream[step]), [p for _, p in rest])
            for (name, parameter), gradient in (
                zip(rest, gradients, strict=True) if pretrained is None else ()
            ):
                adam_update(parameter.data, gradient, small[name], lr=rate[0], seed=number)
            count = next(finished)
            if count % EVERY == 0:
                curve.append((count, validate(model, text)))

    def guarded(number: int) -> None:
        torch.set_num_threads(1)
        try:
            trainer(number)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    seconds = time.perf_counter() - start
    curve.sort()
    total = sum(staleness, Counter())
    flat = list(total.elements())
    return {
        "curve": curve,
        "final": validate(shared, text),
        "staleness": {
            "mean": statistics.fmean(flat),
            "max": max(flat),
            "histogram": dict(sorted(total.items())),
        },
        "lost": len(stream) - min(s.step for s in states.values()),
        "seconds": seconds,
        "text": text.digest,
    }


def replica(shared: Model) -> Model:
    """A thread's own modules over the shared memory. `.data` aliases have version counters of their own, so
    that another thread's in-place write is not mistaken for an error by autograd.
    """
    model = copy.deepcopy(shared)
    for mine, theirs in zip(model.parameters(), shared.parameters(), strict=True):
        mine.data = theirs.data
    return model
