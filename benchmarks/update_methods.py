"""What an APOLLO update is compared with, on any device: the reference, and what else there is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hogwild_kernels import ApolloState, UpdateResult, counter, reference

SEED = 5
"""Of the rounding, in updates that are held against the reference."""
_MOST_DIFFER = 1e-3
_LOST_SCALE, _LOST_SUM = 0.02, 1e-5


@torch.no_grad()
def against_fp64(
    update: Callable[[Tensor, Tensor, Tensor], UpdateResult],  # of (weight, x, d), with SEED
    weight: Tensor,  # (m, n) bf16, left as it is
    x: Tensor,  # (T, n)
    d: Tensor,  # (T, m)
    state: ApolloState,  # that `update` uses, fresh
) -> tuple[str, float]:
    """Two steps, held against the reference with moments in fp64 and the same random bits.

    Returns what is wrong ("": nothing), and the share of elements whose bits differ: where sums in fp32 and in fp64
    fall on two sides of a threshold.
    """
    m, n = weight.shape
    ours, truth = weight.clone(), weight.clone()
    exact = ApolloState(state.name, (m, n), state.config, weight.device, dtype=torch.float64)
    problem, most = "", 0.0
    for _ in range(2):
        before = truth.float()
        norm = float(update(ours, x, d).norm)
        wanted = float(reference.factored_step(truth, x, d, exact, seed=SEED).norm)
        differ = float((ours != truth).double().mean())
        most = max(most, differ)
        # Neighbours in bf16 are at most 2^-7 of the larger one apart. Besides, fp32 loses something of sums; and of the
        # scale of a channel in which an entry of R is about as small as eps: N is near its sign there.
        larger = torch.maximum(ours.abs(), truth.abs()).float()
        lost = _LOST_SCALE * (truth.float() - before).abs() + _LOST_SUM * (
            before.abs() + wanted / math.sqrt(m * n)
        )
        apart = int(((ours.float() - truth.float()).abs() > 2**-7 * larger + lost).sum())
        moments = max(
            float((a.double() - b).norm() / b.norm().clamp_min(1e-300))
            for a, b in ((state.exp_avg, exact.exp_avg), (state.exp_avg_sq, exact.exp_avg_sq))
        )
        problems = {
            f"|dW| is {norm:.6g}, not {wanted:.6g}": not math.isclose(norm, wanted, rel_tol=1e-4),
            f"moments off by {moments:.1e}": not moments < 1e-4,
            f"{differ:.2%} of the elements differ": differ * m * n > _MOST_DIFFER * m * n + 2,
            f"{apart} elements differ by more than one step of bf16": apart > 0,
        }
        problem = problem or "; ".join(text for text, wrong in problems.items() if wrong)
        ours.copy_(truth)  # or the next step would begin at different places
    return problem, most


class EagerApollo:
    """The published step in eager PyTorch with state in the weight's type, from the paper's mathematics."""

    def __init__(self, weight: Tensor, rank: int, lr: float) -> None:
        self.w, self.rank, self.lr, self.t = weight, rank, lr, 0
        m, n = weight.shape
        self.wide = m < n
        shape = (rank, n) if self.wide else (m, rank)
        self.p = counter.projection((1, 2), 0, rank, min(m, n)).to(weight)
        self.mean, self.square = (
            torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )
        self.phi: Tensor | None = None

    def step(self, g: Tensor) -> None:
        self.t += 1
        r = self.p @ g if self.wide else g @ self.p.t()
        self.mean.mul_(0.9).add_(r, alpha=0.1)
        self.square.mul_(0.999).addcmul_(r, r, value=0.001)
        normal = self.mean / self.square.sqrt().add_(1e-6)
        if self.rank == 1:
            u = g * (normal.norm() / (r.norm() + 1e-8))
        else:
            axis = 0 if self.wide else 1
            u = g * (normal.norm(dim=axis) / (r.norm(dim=axis) + 1e-8)).unsqueeze(axis)
        norm = u.norm()
        if self.phi is not None:
            limiter = max(float(norm / (self.phi + 1e-8)), 1.01) / 1.01
            u = u / limiter
            norm = norm / limiter
        self.phi = norm
        rate = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        u *= math.sqrt(min(self.w.shape) / self.rank)
        self.w.add_(u, alpha=-rate)


def eager_apollo(
    weight: Tensor,  # (m, n), updated in place
    x: Tensor,  # (T, n) layer input
    d: Tensor,  # (T, m) gradient of the layer's output
    rank: int,
) -> Callable[[], object]:
    """(a): the gradient product and the published-style step."""
    eager = EagerApollo(weight, rank, 1e-5)
    return lambda: eager.step(d.t() @ x)


def fused_adamw(
    weight: Tensor,  # (m, n), updated in place
    x: Tensor,  # (T, n)
    d: Tensor,  # (T, m)
) -> Callable[[], object]:
    """(b): the gradient product and torch.optim.AdamW(fused=True)."""
    parameter = torch.nn.Parameter(weight)
    adamw = torch.optim.AdamW([parameter], lr=1e-5, fused=True)

    def step() -> None:
        parameter.grad = d.t() @ x
        adamw.step()

    return step


def moved(m: int, n: int, tokens: int) -> int:
    """Bytes of bf16 that an update must move at least: W read and written, X and D read."""
    return 2 * (2 * m * n + tokens * (m + n))


def floor_s(m: int, n: int, tokens: int, rates: tuple[float, float]) -> float:
    """Seconds that an update must take at least.

    Args:
        rates: bytes/s of a copy, multiply-adds/s of a large matmul.
    """
    return max(moved(m, n, tokens) / rates[0], tokens * m * n / rates[1])
