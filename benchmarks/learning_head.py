"""Why does APOLLO-Mini end above AdamW in table (i)? One change at a time, on a model small enough for that.

    python benchmarks/learning_head.py

0.8M parameters, fp32, the first 120 of 400 steps of table (i)'s schedule, where its gap opens; seed 0. Printed: the
validation loss after them. The method of the output head and that of all other linear weights are set apart; the
embedding and the norms are Adam's, as everywhere. About three minutes of one core. The tables are in docs/learning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hogwild_kernels import ApolloConfig, ApolloState, apollo_update
from learning_model import Linear, Model, Shape, Text, load_text
from learning_setup import BATCH, STEPS, schedule, validate

SMALL = Shape(width=128, ffn=344, layers=4)
SEEN = 120

ADAM = None
MINI = ApolloConfig(rank=1)
QUARTER = ApolloConfig(rank=32)  # a quarter of the width, as 64 is in table (i)


@dataclass(frozen=True)
class Variant:
    name: str
    head: ApolloConfig | None
    rest: ApolloConfig | None
    lr: float = 3e-3


VARIANTS = (
    Variant("AdamW, lr 0.001", ADAM, ADAM, lr=1e-3),
    Variant("AdamW", ADAM, ADAM),
    Variant("r=32", QUARTER, QUARTER),
    Variant("Mini", MINI, MINI),
    Variant("Mini, limiter off", ApolloConfig(rank=1, gamma=0.0), ApolloConfig(rank=1, gamma=0.0)),
    Variant("r=32, but one scale a weight", *2 * [ApolloConfig(rank=32, scaling="tensor")]),
    Variant("AdamW, head by Mini", MINI, ADAM),
    Variant("Mini, head by rank 1, a scale a token", ApolloConfig(rank=1, scaling="channel"), MINI),
    Variant("Mini, head by r=32", QUARTER, MINI),
    Variant("Mini, head by Adam", ADAM, MINI),
    Variant("r=32, head by Adam", ADAM, QUARTER),
)


def train(text: Text, variant: Variant) -> float:
    torch.manual_seed(0)
    model, rate, states = Model(SMALL, torch.float32), [0.0], dict[str, ApolloState]()

    def update(layer: Linear, x: Tensor, d: Tensor, _: object) -> None:
        assert not apollo_update(layer.weight.data, x, d, states[layer.name], lr=rate[0]).skipped

    taken = set[int]()
    for linear in model.linears():
        config = variant.head if linear is model.head else variant.rest
        if config is not None:
            states[linear.name] = ApolloState(linear.name, tuple(linear.weight.shape), config)
            linear.hook = update
            taken.add(id(linear.weight))
    trained = [p for p in model.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1000)
    for step in range(SEEN):
        rate[0] = adam.param_groups[0]["lr"] = schedule(step, STEPS, variant.lr)
        model(text.batch(BATCH, SMALL.context, generator)).backward()
        if not states:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
    return validate(model, text)


def main() -> None:
    torch.set_num_threads(1)
    text = load_text("perl-doc", SMALL.context, 128)
    print("| method | loss after 120 steps |\n|---|---|")
    for variant in VARIANTS:
        print(f"| {variant.name} | {train(text, variant):.4f} |", flush=True)


if __name__ == "__main__":
    main()
