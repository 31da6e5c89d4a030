"""What the learning experiments share: sizes, the schedule, and how a model is judged."""

from __future__ import annotations

import math
import statistics

import torch

from learning_model import Model, Shape, Text

SHAPE = Shape()
STEPS = 400
FINE_TUNING_STEPS = 120
THREAD_STEPS = 200
BATCH = 4
WARMUP = 40
EVERY = 40


def schedule(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


@torch.no_grad()
def validate(model: Model, text: Text) -> float:
    """Mean nats per byte over the held-out sequences."""
    return statistics.fmean(float(model(part)) for part in text.valid.split(16))
