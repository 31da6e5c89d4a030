"""Stochastic rounding and the counter-based generator: unbiased, exact where it can be, the same bits
everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hogwild_kernels import counter, cpu
from hogwild_kernels import numba_kernels as loops
from hogwild_kernels.rounding import round_to

HALVES = [torch.bfloat16, torch.float16]
DRAWS = 100_000


def draws(value: float, dtype: torch.dtype, backend: str, stream: tuple[int, int] = (17, 23)) -> Tensor:
    """The same fp32 value rounded with 100,000 consecutive counters of one stream, as fp64."""
    return rounded(torch.full((DRAWS,), value, dtype=torch.float32), dtype, backend, stream).double()


def rounded(values: Tensor, dtype: torch.dtype, backend: str, stream: tuple[int, int] = (17, 23)) -> Tensor:
    a, b = stream
    if backend == "torch":
        return round_to(values, dtype, counter.rounding_bits(1, len(values), a, b)[0])
    out = torch.empty(len(values), dtype=dtype)
    marker = loops.BFLOAT16 if dtype == torch.bfloat16 else loops.FLOAT16
    loops.round_values(values.data_ptr(), out.data_ptr(), marker, len(values), np.uint32(a), np.uint32(b))
    return out


def gap(value: float, dtype: torch.dtype) -> float:
    """The distance between the two neighbours of `value` in `dtype`."""
    exponent = max(np.frexp(abs(value))[1] - 1, -126 if dtype == torch.bfloat16 else -14)
    return float(2.0 ** (exponent - (7 if dtype == torch.bfloat16 else 10)))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.0123, -0.0123, 1.001, 0.99951, -3.14159, 1e-3 / 3, 3.0e-5, 1000.3])
def test_mean_of_100000_draws_is_the_value(value: float, dtype: torch.dtype, backend: str) -> None:
    exact = float(torch.tensor(value))
    outcome = draws(value, dtype, backend)
    assert len(outcome.unique()) == 2  # the two neighbours and nothing else
    # 100,000 draws leave a standard error of at most gap / 632; 4.5 of those never fail by chance with
    # fixed bits.
    assert abs(float(outcome.mean()) - exact) < 4.5 * 0.5 * gap(value, dtype) / DRAWS**0.5


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_mean_is_within_3e_5_for_weights_of_ordinary_size(backend: str) -> None:
    """The figure that the project states: w ~ N(0, 0.02), one step of 1e-5, 100,000 draws."""
    for w in (0.0213, -0.0079, 0.0401):
        start = float(torch.tensor(w).bfloat16())
        outcome = draws(start - 1e-5, torch.bfloat16, backend)
        assert abs(float(outcome.mean()) - (start - 1e-5)) < 3e-5 * 0.02
    relative = draws(1.2345, torch.bfloat16, backend)
    assert abs(float(relative.mean()) / 1.2345 - 1) < 3e-5


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", HALVES)
def test_exact_values_never_move(dtype: torch.dtype, backend: str) -> None:
    """Every finite bit pattern of the type, zeros and subnormals included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for stream in ((1, 2), (0xFFFFFFFF, 0xDEADBEEF)):
        result = rounded(every.float(), dtype, backend, stream)
        assert torch.equal(result.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", HALVES)
def test_symmetric_in_sign_and_right_across_powers_of_two(dtype: torch.dtype, backend: str) -> None:
    below_two = 2.0 - gap(1.5, dtype) / 3  # its upper neighbour is the next power of two
    up = draws(below_two, dtype, backend)
    assert set(up.unique().tolist()) == {2.0 - gap(1.5, dtype), 2.0}
    assert float((up == 2.0).double().mean()) == pytest.approx(2 / 3, abs=0.006)
    assert torch.equal(draws(-below_two, dtype, backend), -up)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", HALVES)
def test_inf_and_nan_stay_what_they_are(dtype: torch.dtype, backend: str) -> None:
    special = torch.tensor([float("inf"), -float("inf"), float("nan")]).repeat(50)
    result = rounded(special, dtype, backend).float()
    torch.testing.assert_close(result, special, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_both_backends_give_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(200_000) * torch.randn(200_000).mul(6).exp()
    values = values.clamp(-60_000, 60_000)
    assert torch.equal(
        rounded(values, dtype, "torch").view(torch.int16), rounded(values, dtype, "numba").view(torch.int16)
    )


@settings(max_examples=30, deadline=None)  # the first call may compile
@given(seed=st.integers(0, 2**32 - 1), name=st.text(max_size=20), epoch=st.integers(0, 10_000))
def test_projection_bits_are_the_same_compiled(seed: int, name: str, epoch: int) -> None:
    key = counter.name_key(seed, name)
    assert torch.equal(cpu.build_projection(key, epoch, 4, 33), counter.projection(key, epoch, 4, 33))


def test_projection_is_gaussian_with_variance_one_over_rank() -> None:
    p = counter.projection(counter.name_key(0, "layer"), 0, 64, 4096).double() * 8.0
    assert float(p.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(p.var()) == pytest.approx(1.0, abs=0.01)
    assert float((p**4).mean()) == pytest.approx(3.0, abs=0.06)
    for z, share in ((1.0, 0.31731), (2.0, 0.04550), (3.0, 0.00270)):
        assert float((p.abs() > z).double().mean()) == pytest.approx(share, rel=0.06)


def test_projections_differ_by_name_seed_and_epoch_and_are_uncorrelated() -> None:
    ways = [("layer.0", 0, 0), ("layer.1", 0, 0), ("layer.0", 1, 0), ("layer.0", 0, 1)]
    drawn = [counter.projection(counter.name_key(s, name), e, 16, 1000).flatten() for name, s, e in ways]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert float(correlation.abs().max()) < 4.5 / 16_000**0.5


def test_words_of_neighbouring_counters_and_streams_are_unrelated() -> None:
    """Each of the 32 bits is fair, and neither the next counter nor the next step's stream predicts it."""
    index = torch.arange(200_000)
    key = counter.name_key(3, "layer")
    here = counter.words(index, *counter.subkey(key, counter.ROUNDING, 10))
    other = counter.words(index, *counter.subkey(key, counter.ROUNDING, 11))
    tolerance = 4.5 * 0.5 / 200_000**0.5
    for bit in range(32):
        one = ((here >> bit) & 1).double()
        assert float(one.mean()) == pytest.approx(0.5, abs=tolerance)
        assert float((one[1:] == one[:-1]).double().mean()) == pytest.approx(0.5, abs=tolerance)
        assert float((one == ((other >> bit) & 1)).double().mean()) == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("columns", [1, 4, 5])
def test_an_elements_random_bits_are_its_own_whatever_tile_it_is_in(columns: int) -> None:
    key = counter.subkey((1, 2), counter.ROUNDING, 3)
    whole = counter.rounding_bits(7, columns, *key)
    assert whole.shape == (7, columns)
    assert 0 <= int(whole.min()) <= int(whole.max()) < 1 << 16
    assert torch.equal(whole[2:5], counter.rounding_bits(3, columns, *key, first=2))
    assert torch.equal(whole[[6, 0]], counter.rounding_bits(torch.tensor([6, 0]), columns, *key))
    pairs = -(-columns // 2)
    words = counter.words(torch.arange(7 * pairs), *key).view(7, pairs)
    for j in range(columns):  # no word for two rows, also where the last one of a row is half used
        assert torch.equal(whole[:, j], words[:, j // 2] >> (16 * (j % 2)) & 0xFFFF)


def test_many_small_steps_add_up_where_rounding_to_nearest_loses_them() -> None:
    torch.manual_seed(0)
    start = (torch.randn(4000) * 0.02).bfloat16()
    stochastic, nearest = start.clone(), start.clone()
    for step in range(500):
        bits = counter.rounding_bits(1, 4000, *counter.subkey((1, 2), counter.ROUNDING, step))[0]
        stochastic = round_to(stochastic.float() - 1e-5, torch.bfloat16, bits)
        nearest = round_to(nearest.float() - 1e-5, torch.bfloat16, None)
    assert float((start.float() - stochastic.float()).mean()) == pytest.approx(0.005, rel=0.02)
    assert float((start.float() - nearest.float()).mean()) < 0.15 * 0.005
