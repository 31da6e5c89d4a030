"""Hyper-parameters of the two optimizers. Plain frozen dataclasses: they carry no tensors and import no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rounding = Literal["stochastic", "nearest"]
Form = Literal["auto", "factored", "plain"]
Scaling = Literal["auto", "channel", "tensor"]


@dataclass(frozen=True)
class ApolloConfig:
    """One linear weight's APOLLO step (arXiv:2412.05270); every default is the published one unless it says
    why."""

    rank: int = 64
    """Rank r of the random projection, clamped to min(m, n), where nothing is projected. Rank 1 is APOLLO-Mini: one
    scale for the whole tensor. An output head learns badly with one scale for the rows of all tokens, frequent and
    rare: give it a higher rank, or Adam, as published (docs/learning.md)."""

    scaling: Scaling = "auto"
    """One scale per channel or one for the tensor. "auto" is per channel unless the clamped rank is 1,
    where a channel's scale would rest on a single number and vary by a factor of 2 to 18."""

    lr: float = 1e-5
    """Learning rate, in the sense it has in AdamW (see `scale`)."""

    scale: float | None = None
    """The published alpha, whose root multiplies the update. None is min(m, n)/rank: it undoes the
    shrinking of the compact space, so that `lr` means the same for every rank. (The published default is a
    constant.)"""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments, per step."""

    eps: float = 1e-6
    """Added to sqrt(V)."""

    weight_decay: float = 0.0
    """Decoupled: W shrinks by lr * weight_decay per step, after the update and before rounding."""

    gap: int = 200
    """Steps between two projections; the count of projections so far is the epoch."""

    gamma: float = 1.01
    """Norm-growth limiter: the update's norm may grow by this factor per step. 0 switches the limiter off."""

    limiter_floor: float = 0.99
    """The remembered norm falls at most to this fraction per step, and not at all on an all-zero gradient:
    it falls about as fast as it may rise. 0 is the published behaviour, under which one near-zero gradient
    throttles the tensor for over a thousand steps, and a norm that varies by 30% from step to step
    throttles it to 59% for good
    (with 0.99: to 86%)."""

    rounding: Rounding = "stochastic"
    """How an fp32 result becomes a bf16 or fp16 weight. fp32 and fp64 weights are not rounded."""

    form: Form = "auto"
    """Whether G = D^T X is formed ("plain") or not ("factored"); "auto" asks the cost model in `plan.py`."""

    seed: int = 0
    """Seeds the projections and the rounding, together with the weight's name."""

    def by_tensor(self, rank: int) -> bool:
        """Whether the clamped rank calls for one scale for the whole tensor."""
        return self.scaling == "tensor" or (self.scaling == "auto" and rank == 1)

    def alpha(self, size: int, rank: int) -> float:
        """The published scale, for min(m, n) = size and the clamped rank."""
        return size / rank if self.scale is None else self.scale

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank is {self.rank}, must be at least 1")
        if self.gap < 1:
            problems.append(f"gap is {self.gap}, must be at least 1")
        if not all(0.0 <= b < 1.0 for b in self.betas):
            problems.append(f"betas are {self.betas}, must be in [0, 1)")
        if self.scale is not None and self.scale <= 0.0:
            problems.append(f"scale is {self.scale}, must be positive")
        if self.gamma != 0.0 and self.gamma < 1.0:
            problems.append(f"gamma is {self.gamma}, must be 0 (off) or at least 1")
        if not 0.0 <= self.limiter_floor < 1.0:
            problems.append(f"limiter_floor is {self.limiter_floor}, must be in [0, 1)")
        if self.rounding not in ("stochastic", "nearest"):
            problems.append(f"rounding is {self.rounding!r}, must be 'stochastic' or 'nearest'")
        if self.scaling not in ("auto", "channel", "tensor"):
            problems.append(f"scaling is {self.scaling!r}, must be 'auto', 'channel' or 'tensor'")
        if self.form not in ("auto", "factored", "plain"):
            problems.append(f"form is {self.form!r}, must be 'auto', 'factored' or 'plain'")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class AdamConfig:
    """Adam in fp32 for what is not a 2-D linear weight: norms, biases, 3-D convolution weights."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    rounding: Rounding = "stochastic"
    seed: int = 0
