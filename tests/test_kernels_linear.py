"""The serving product on plain weights: against fp64, for every number of rows and every remainder."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from hogwild_kernels import linear
from hogwild_kernels.linear import plain_linear
from hogwild_kernels.linear_blocks import AVX2, AVX512_BF16
from hogwild_kernels.linear_ir import Kind
from hogwild_kernels.linear_tiles import AMX_BF16

# fp32 sums rounded once to bf16: half a unit in the last of 8 bits, and a little for the order of the sum
TOLERANCE = 2.0**-8


_ALL = (AMX_BF16, AVX512_BF16, AVX2)
_HERE = {one.name for one in linear.kinds()}
_FIRST = next((number for number, one in enumerate(_ALL) if one.name in _HERE), len(_ALL))
KINDS = {one.name: one for one in _ALL[_FIRST:]}


@pytest.fixture(autouse=True, params=KINDS)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Every kernel that this machine can run, alone, for all numbers of rows up to its last: a CPU with one of them has
    those after it, too."""
    one = KINDS[request.param]
    one = replace(one, rows=range(1, one.rows.stop))
    monkeypatch.setattr(linear, "kinds", lambda: (one,))
    return one


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T


def assert_close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    want = exact(x, weight)
    scale = x.double().abs() @ weight.double().abs().T  # of the terms: what rounding errors are relative to
    assert got.dtype == torch.bfloat16
    assert bool(((got.double() - want).abs() <= TOLERANCE * want.abs() + 2.0**-20 * scale).all())


@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 31, 63, 81, 128, 129, 200])
@pytest.mark.parametrize("shape", [(4, 32), (96, 64), (100, 576), (48, 1536)], ids=str)
def test_equals_the_product_in_fp64(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    assert_close(plain_linear(x, weight), x, weight)


@pytest.mark.parametrize("shape", [(7, 64), (96, 40), (1, 1)], ids=str)
def test_shapes_that_the_kernel_is_not_made_for(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape).bfloat16(), torch.randn(3, shape[1]).bfloat16()
    assert_close(plain_linear(x, weight), x, weight)


def test_the_kernel_itself_has_answered(how: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.products, "linear", None)
    weight = torch.randn(32, 64).bfloat16()
    for rows in (1, 16, how.rows.stop - 1):
        x = torch.randn(rows, 64).bfloat16()
        assert_close(plain_linear(x, weight), x, weight)
    with pytest.raises(TypeError):
        plain_linear(torch.randn(how.rows.stop, 64).bfloat16(), weight)


def test_beside_a_library_that_uses_the_same_registers_of_tiles() -> None:
    torch.manual_seed(0)
    weight, few, many = (torch.randn(rows, 256).bfloat16() for rows in (512, 16, 300))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            mine, theirs = plain_linear(few, weight), torch.nn.functional.linear(many, weight)
            for _ in range(20):
                assert torch.equal(plain_linear(few, weight), mine)
                assert torch.equal(torch.nn.functional.linear(many, weight), theirs)
        finally:
            torch.set_num_threads(before)
    assert_close(mine, few, weight)
    assert_close(theirs, many, weight)


def test_a_slice_of_a_fused_weight_and_inputs_of_three_dimensions() -> None:
    fused = torch.randn(64, 128).bfloat16()
    weight = fused[16:48, 32:96]  # rows are 128 elements apart
    x = torch.randn(2, 5, 64).bfloat16()
    got = plain_linear(x, weight)
    assert got.shape == (2, 5, 32)
    assert_close(got, x, weight)
    transposed = torch.randn(64, 32).bfloat16().T
    assert_close(plain_linear(x, transposed), x, transposed)


@pytest.mark.parametrize("rows", [2, 16])
def test_a_bias_is_added_to_the_rounded_product(rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(32, 64).bfloat16(), torch.randn(32).bfloat16()
    x = torch.randn(rows, 64).bfloat16()
    product = plain_linear(x, weight)
    assert bool((product != 0).any())
    assert torch.equal(plain_linear(x, weight, bias), product + bias)


def test_no_rows() -> None:
    assert plain_linear(torch.empty(0, 32).bfloat16(), torch.ones(8, 32).bfloat16()).shape == (0, 8)


def test_what_is_not_finite_stays_so() -> None:
    weight, x = torch.ones(16, 32).bfloat16(), torch.ones(3, 32).bfloat16()
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    got = plain_linear(x, weight)
    assert bool((got[0] == 32).all())
    assert bool(got[1].isnan().all())
    assert bool(got[2].isinf().all())


def test_sees_writes_to_the_weight() -> None:
    """No packed copy anywhere: that is what it is for."""
    weight, x = torch.ones(16, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    assert bool((plain_linear(x, weight) == 64).all())
    weight[3] = 2
    assert plain_linear(x, weight)[0].tolist() == [64, 64, 64, 128, *[64] * 12]


def test_many_callers_and_many_threads() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(2048, 256).bfloat16(), torch.randn(16, 256).bfloat16()
    want = plain_linear(x, weight)
    assert_close(want, x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: plain_linear(x, weight), range(64)):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)
