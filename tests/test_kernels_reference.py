"""The reference against the published algorithm and against what can be worked out by hand, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hogwild_kernels import ApolloConfig, ApolloState, reference

F64 = torch.float64


class Published:
    """The published step written a second time, straight from the paper: G, moments, scaled G, norms of
    what was formed.

    P is drawn m x r or r x n as the paper has it; here the caller hands in the matrix, so that both sides
    use one.
    """

    def __init__(self, w: Tensor, rank: int, lr: float, alpha: float, decay: float, tensor: bool) -> None:
        self.w, self.lr, self.alpha, self.decay, self.tensor = w.clone(), lr, alpha, decay, tensor
        m, n = w.shape
        self.wide = m < n
        shape = (rank, n) if self.wide else (m, rank)
        self.m, self.v, self.t, self.phi = (
            torch.zeros(shape, dtype=F64),
            torch.zeros(shape, dtype=F64),
            0,
            None,
        )

    def step(self, g: Tensor, p: Tensor) -> None:  # p (rank, min(m, n))
        self.t += 1
        r = p @ g if self.wide else g @ p.T
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r**2
        normal = self.m / (self.v.sqrt() + 1e-6)
        if self.tensor:
            u = g * (normal.norm() / (r.norm() + 1e-8))
        elif self.wide:
            u = g * (normal.norm(dim=0) / (r.norm(dim=0) + 1e-8))[None, :]
        else:
            u = g * (normal.norm(dim=1) / (r.norm(dim=1) + 1e-8))[:, None]
        norm = u.norm()
        if self.phi is not None:
            limiter = max(norm / (self.phi + 1e-8), 1.01) / 1.01
            u = u / limiter
            norm = norm / limiter
        self.phi = norm
        rate = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        self.w = self.w - rate * math.sqrt(self.alpha) * u
        self.w = self.w - self.lr * self.decay * self.w


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4])
def test_450_steps_equal_the_published_algorithm(m: int, n: int, rank: int) -> None:
    torch.manual_seed(m + rank)
    config = ApolloConfig(rank=rank, lr=0.01, weight_decay=0.1, gap=150, limiter_floor=0.0)
    start = torch.randn(m, n, dtype=F64)
    factored, formed = start.clone(), start.clone()
    states = [ApolloState("layer", (m, n), config, dtype=F64) for _ in range(2)]
    truth = Published(start, rank, 0.01, min(m, n) / rank, 0.1, tensor=rank == 1)
    limited, epochs = 0, []
    for step in range(450):
        # Norms that swing by a factor of five make the limiter both bind and let pass.
        x = torch.randn(5, n, dtype=F64) * math.exp(0.8 * math.sin(step))
        d = torch.randn(5, m, dtype=F64)
        p = states[0].projection().to(F64)
        epochs.append(states[0].epoch)
        before = truth.phi
        truth.step(d.T @ x, p)
        limited += before is not None and bool(truth.phi >= 1.0099 * before)
        reference.factored_step(factored, x, d, states[0])
        reference.published_step(formed, d.T @ x, states[1])
    assert sorted(set(epochs)) == [0, 1, 2]
    assert 10 < limited < 440  # both branches of the limiter were taken
    assert (truth.w - start).norm() > 0.1 * start.norm()  # a step that does nothing would pass anything
    for weight in (factored, formed):
        assert (weight - truth.w).norm() <= 1e-12 * truth.w.norm()


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_identity_projection_first_step_has_adam_sized_channels(m: int, n: int) -> None:
    """With P = I the first N is a matrix of signs (after bias correction), so each channel moves by lr *
    sqrt(r)."""
    size = min(m, n)
    config = ApolloConfig(rank=size, lr=1.0, eps=0.0)
    w = torch.zeros(m, n, dtype=F64)
    state = ApolloState("layer", (m, n), config, dtype=F64)
    x, d = torch.randn(7, n, dtype=F64), torch.randn(7, m, dtype=F64)
    reference.factored_step(w, x, d, state, projection=torch.eye(size, dtype=F64))
    norms = w.norm(dim=0 if m < n else 1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(size)), rtol=1e-6, atol=0)


def test_one_column_without_momentum_is_adamw() -> None:
    """An (n, 1) weight with P = 1 and b1 = 0: every channel is one element and its own gradient, which is
    AdamW."""
    n = 11
    config = ApolloConfig(
        rank=1, scaling="channel", lr=0.01, betas=(0.0, 0.999), eps=0.0, weight_decay=0.1, gamma=0.0
    )
    w = torch.randn(n, 1, dtype=F64)
    other = torch.nn.Parameter(w.clone())
    adamw = torch.optim.AdamW([other], lr=0.01, betas=(0.0, 0.999), eps=1e-300, weight_decay=0.1)
    state = ApolloState("layer", (n, 1), config, dtype=F64)
    for _ in range(20):
        x, d = torch.randn(1, 1, dtype=F64), torch.randn(1, n, dtype=F64)
        reference.factored_step(w, x, d, state, projection=torch.ones(1, 1, dtype=F64))
        other.grad = d.T @ x
        adamw.step()
    # AdamW decays before it steps and APOLLO after: they differ by lr * decay * |step|, not by rounding.
    torch.testing.assert_close(w, other.detach(), rtol=0, atol=20 * 0.01 * 0.1 * 0.011)
    undecayed = replace(config, weight_decay=0.0)
    w, other.data = other.detach().clone(), other.detach().clone()
    fresh = ApolloState("layer", (n, 1), undecayed, dtype=F64)
    plain = torch.optim.AdamW([other], lr=0.01, betas=(0.0, 0.999), eps=1e-300, weight_decay=0.0)
    for _ in range(20):
        x, d = torch.randn(1, 1, dtype=F64), torch.randn(1, n, dtype=F64)
        reference.factored_step(w, x, d, fresh, projection=torch.ones(1, 1, dtype=F64))
        other.grad = d.T @ x
        plain.step()
    torch.testing.assert_close(
        w, other.detach(), rtol=1e-6, atol=1e-8
    )  # the 1e-8 beside |R| is all that is left


def _run(
    start: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    config: ApolloConfig,
    projection: Tensor | None = None,
) -> Tensor:
    w = start.clone()
    state = ApolloState("layer", (w.shape[0], w.shape[1]), config, dtype=F64)
    for x, d in batches:
        reference.factored_step(w, x, d, state, projection=projection)
    return w


def _batches(m: int, n: int, tokens: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(tokens, n, dtype=F64), torch.randn(tokens, m, dtype=F64)) for _ in range(count)]


@pytest.mark.parametrize("rank", [1, 3])
def test_scaling_the_gradient_changes_nothing(rank: int) -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=0.1, eps=0.0)
    w = torch.randn(8, 10, dtype=F64)
    batches = _batches(8, 10, 4, 10)
    louder = [(x, 1000 * d) for x, d in batches]
    torch.testing.assert_close(_run(w, louder, config), _run(w, batches, config), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_transposing_the_problem_transposes_the_update(rank: int) -> None:
    torch.manual_seed(1)
    config = ApolloConfig(rank=rank, lr=0.1, weight_decay=0.1)
    w = torch.randn(8, 10, dtype=F64)
    batches = _batches(8, 10, 4, 10)
    p = torch.randn(rank, 8, dtype=F64)
    turned = _run(w.T.contiguous(), [(d, x) for x, d in batches], config, p)
    torch.testing.assert_close(turned.T, _run(w, batches, config, p), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), tokens=st.integers(1, 9), rank=st.integers(1, 20),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_both_forms_agree_for_any_shape(m: int, n: int, tokens: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = ApolloConfig(rank=rank, lr=0.01, weight_decay=0.01)
    factored = torch.randn(m, n, dtype=F64)
    formed = factored.clone()
    a, b = (ApolloState("layer", (m, n), config, dtype=F64) for _ in range(2))
    assert a.rank == min(rank, m, n)
    for x, d in _batches(m, n, tokens, 3):
        one = reference.factored_step(factored, x, d, a)
        two = reference.published_step(formed, d.T @ x, b)
        assert one.norm == pytest.approx(two.norm, rel=1e-9)
    torch.testing.assert_close(factored, formed, rtol=1e-10, atol=1e-12)


def test_lr_means_the_same_for_every_rank() -> None:
    """The default scale, min(m, n)/rank, undoes the shrinking of the compact space: update sizes stay
    within 15%."""
    torch.manual_seed(2)
    norms = {}
    for rank in (16, 32, 64, 96):
        w = torch.zeros(96, 128, dtype=F64)
        state = ApolloState("layer", (96, 128), ApolloConfig(rank=rank, lr=1.0, gamma=0.0), dtype=F64)
        torch.manual_seed(3)
        norms[rank] = [reference.factored_step(w, x, d, state).norm for x, d in _batches(96, 128, 32, 20)][-1]
    sizes = [float(v) for v in norms.values()]
    assert max(sizes) < 1.15 * min(sizes), norms


def test_reported_norm_is_the_norm_of_the_change() -> None:
    torch.manual_seed(4)
    w = torch.randn(10, 7, dtype=F64)
    state = ApolloState("layer", (10, 7), ApolloConfig(rank=3, lr=0.01), dtype=F64)
    for x, d in _batches(10, 7, 4, 5):
        before = w.clone()
        result = reference.factored_step(w, x, d, state)
        assert result.norm == pytest.approx(float((w - before).norm()), rel=1e-9)
