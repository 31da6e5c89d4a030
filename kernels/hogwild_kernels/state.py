"""What the optimizers remember between steps: one object per weight, shared by every trainer thread without
locks.

The memory model, written once
------------------------------
Each thread runs the whole step for one weight: read M, V, phi and the step count, write them, write the
weight. Nothing is locked, so two threads that update the same weight at the same moment may interleave.
Allowed:

- one thread's write to an element of M, V or the weight replaces another's (that element misses one update),
- a step count that counts two simultaneous steps once, and rounding bits that are used twice,
- phi from either thread, and M and V that mix two steps or, at a projection change, two projections.

Each of these perturbs one step by no more than dropping or delaying a gradient would, which is what training
without locks has to bear (docs/why-it-converges.md). Forbidden, and not possible here: replacing, resizing or
re-typing a tensor. Every field is written in place and aligned loads and stores of these sizes do not tear
within an element.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import counter
from .config import AdamConfig, ApolloConfig

BuildProjection = Callable[[tuple[int, int], int, int, int], Tensor]
"""(name key, epoch, rank, size) -> P (rank, size) fp32: `counter.projection`, or a faster one with the same
bits."""


class UpdateResult:
    """What one update did.

    Attributes:
        numbers: (norm, skipped) as below: a pair, or one (2,) fp32 tensor of the device. Reading that one is the
            caller's synchronisation.
    """

    __slots__ = ("numbers",)

    def __init__(self, norm: float | Tensor, skipped: bool | Tensor) -> None:
        self.numbers: tuple[float | Tensor, bool | Tensor] | Tensor = (norm, skipped)

    @classmethod
    def on_device(cls, numbers: Tensor) -> UpdateResult:
        """Of an update on a device, which is queued there."""
        made = cls.__new__(cls)
        made.numbers = numbers
        return made

    def to(self, device: torch.device) -> Tensor:
        """(2,) fp32: `numbers` there, without waiting for those that are there already."""
        if isinstance(self.numbers, Tensor):
            return self.numbers
        return torch.stack([torch.as_tensor(one, dtype=torch.float32, device=device) for one in self.numbers])

    @property
    def norm(self) -> float | Tensor:
        """|dW| of the gradient part of the update (without weight decay), before rounding. 0 when skipped."""
        return self.numbers[0]

    @property
    def skipped(self) -> bool | Tensor:
        """True when an inf or NaN in x, d or a norm stopped the update before it touched anything."""
        return self.numbers[1]


class ApolloState:
    """Moments (fp32, in the projected space), step, limiter norm and skip count of one (m, n) weight."""

    def __init__(
        self,
        name: str,  # the weight's name: seeds its projections and its rounding
        shape: tuple[int, int],  # (m, n) = (out_features, in_features)
        config: ApolloConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,  # float64 in tests only
    ) -> None:
        if len(shape) != 2:
            raise ValueError(
                f"{name}: APOLLO projects 2-D weights, this one is {tuple(shape)}; use AdamState"
            )
        m, n = shape
        self.name = name
        self.shape = (int(m), int(n))
        self.config = config
        self.key = counter.name_key(config.seed, name)
        self.rank = min(config.rank, m, n)
        self.channels = max(m, n)
        compact = (self.rank, n) if m < n else (m, self.rank)
        self.exp_avg = torch.zeros(compact, dtype=dtype, device=device)
        self.exp_avg_sq = torch.zeros(compact, dtype=dtype, device=device)
        self.norm = torch.zeros(1, dtype=dtype, device=device)
        """phi, the norm of the previous limited update; 0 until the first non-zero one."""
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        """[steps applied, updates skipped]. On the device, because a skip is decided there."""
        self._projection: tuple[int, Tensor] | None = None

    @property
    def step(self) -> int:
        """Steps applied so far. On CUDA this synchronises: for logs and tests."""
        return int(self.counts[0])

    @property
    def skipped(self) -> int:
        """Updates that the non-finite guard dropped."""
        return int(self.counts[1])

    @property
    def epoch(self) -> int:
        """Which projection the next step uses."""
        return self.step // self.config.gap

    def projection(self, build: BuildProjection = counter.projection) -> Tensor:
        """P (rank, min(m, n)) fp32 of the current epoch; regenerated when the epoch changes, never saved."""
        epoch = self.epoch
        held = self._projection
        if held is None or held[0] != epoch:
            # Both fields are replaced by one reference assignment, so a reader sees an old or a new pair.
            held = (epoch, build(self.key, epoch, self.rank, min(self.shape)).to(self.norm.device))
            self._projection = held
        if held[1].is_cuda:
            # Another thread may drop it while ours still reads: its memory then waits for our stream too, and not only
            # for the one that it was made in.
            held[1].record_stream(torch.cuda.current_stream(held[1].device))
        return held[1]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be saved, for safetensors: the live tensors, not copies."""
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "norm": self.norm,
            "counts": self.counts,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved tensors in, bit for bit. ValueError lists everything that does not fit; then nothing
        is loaded."""
        _load(self.name, self.tensors(), tensors)


class AdamState:
    """Adam's fp32 moments for one tensor of any shape."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        config: AdamConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.shape = tuple(int(s) for s in shape)
        self.config = config or AdamConfig()
        self.key = counter.name_key(self.config.seed, name)
        self.exp_avg = torch.zeros(self.shape, dtype=dtype, device=device)
        self.exp_avg_sq = torch.zeros(self.shape, dtype=dtype, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def step(self) -> int:
        return int(self.counts[0])

    @property
    def skipped(self) -> int:
        return int(self.counts[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "counts": self.counts}

    def load(self, tensors: dict[str, Tensor]) -> None:
        _load(self.name, self.tensors(), tensors)


def _load(name: str, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is not expected" for key in given if key not in own]
    for key in own.keys() & given.keys():
        mine, theirs = own[key], given[key]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            problems.append(
                f"{key} is {tuple(theirs.shape)} {theirs.dtype}, not {tuple(mine.shape)} {mine.dtype}"
            )
    if problems:
        raise ValueError(f"optimizer state of {name}: " + "; ".join(sorted(problems)))
    for key, tensor in own.items():
        tensor.copy_(given[key])
