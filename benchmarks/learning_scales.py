"""How well do channel scales from a random projection stand in for those of full-rank Adam? On real
gradients.

    python benchmarks/learning_scales.py

The small model trains with AdamW on the text of perl-doc; for two of its weights the full-rank Adam moments
and compact ones of several ranks see the same gradients. Printed: s_j(compact) * sqrt(min(m, n) / r) over
s_j(full), its median over channels and steps, and its spread (half the distance between the 16th and the
84th percentile, over the median).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hogwild_kernels import counter
from learning_model import Model, load_text
from learning_setup import SHAPE

RANKS = (1, 4, 16, 64, 128)
STEPS = 120
SKIP = 20
"""Steps before anything is recorded: the moments start empty."""


class Moments:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean, self.square = torch.zeros(shape), torch.zeros(shape)

    def scales(self, g: Tensor, axis: int) -> Tensor:
        self.mean.mul_(0.9).add_(g, alpha=0.1)
        self.square.mul_(0.999).addcmul_(g, g, value=0.001)
        return (self.mean / (self.square.sqrt() + 1e-6)).norm(dim=axis) / (g.norm(dim=axis) + 1e-8)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = load_text("perl-doc", SHAPE.context, 16)
    model = Model(SHAPE)
    watched = {f.name: f.weight for f in model.linears() if f.name in ("blocks.2.q", "blocks.3.up")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    full = {name: Moments(tuple(w.shape)) for name, w in watched.items()}
    compact: dict[tuple[str, int], tuple[Tensor, Moments]] = {}
    for name, w in watched.items():
        m, n = w.shape
        for rank in RANKS:
            p = counter.projection(counter.name_key(0, name), 0, rank, min(m, n))
            compact[name, rank] = (p, Moments((rank, n) if m < n else (m, rank)))
    ratios: dict[tuple[str, int], list[Tensor]] = {key: [] for key in compact}
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(text.batch(4, SHAPE.context, generator)).backward()
        for name, w in watched.items():
            g, axis = w.grad, 0 if w.shape[0] < w.shape[1] else 1
            assert g is not None
            truth = full[name].scales(g, axis)
            for rank in RANKS:
                p, moments = compact[name, rank]
                s = moments.scales(p @ g if axis == 0 else g @ p.T, axis) * (min(w.shape) / rank) ** 0.5
                if step >= SKIP:
                    ratios[name, rank].append(s / truth)
        optimizer.step()
    print("| weight | rank | median ratio | spread |\n|---|---|---|---|")
    for (name, rank), found in ratios.items():
        low, middle, high = torch.cat(found).quantile(torch.tensor([0.16, 0.5, 0.84])).tolist()
        shape = "x".join(map(str, watched[name].shape))
        print(f"| {name} {shape} | {rank} | {middle:.3f} | {(high - low) / 2 / middle:.1%} |")


if __name__ == "__main__":
    main()
