"""Products through widened tiles: against fp64, for shapes on both sides of a tile, and from two threads at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hogwild_kernels import products

# fp32 sums rounded once: half a unit in the last place, and a little for the order of the sum
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
SHAPES = [(7, 5), (96, 64), (3000, 512), (1, 1)]  # (3000, 512) takes two tiles


@pytest.fixture(params=[True, False], ids=["widened", "as the library does"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways on every machine, whatever its CPU can do."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32 or not request.param)


def assert_close(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    want, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if a.dtype != torch.float32 and products.multiplies(a.dtype):
        scale = scale * 2.0**12  # a library's own 16-bit product may round each term
    bound = TOLERANCE[got.dtype] * want.abs() + 2.0**-20 * scale
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("widened")
def test_equal_the_products_in_fp64(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    m, n = shape
    weight = torch.randn(m, n).to(dtype)
    x, d = torch.randn(rows, n).to(dtype), torch.randn(rows, m).to(dtype)
    y, dx = products.linear(x, weight), products.input_gradient(d, weight)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert_close(y, x, weight.t())
    assert_close(dx, d, weight)


@pytest.mark.usefixtures("widened")
def test_bias_leading_dimensions_and_strides() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16()[16:48, 32:96]
    x, d = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 32).bfloat16()
    bias = torch.randn(32).bfloat16()
    y = products.linear(x, weight, bias)
    want = x.double() @ weight.double().t() + bias.double()
    assert y.shape == (2, 5, 32)
    assert torch.allclose(y.double(), want, rtol=2**-7, atol=2**-6)
    dx = products.input_gradient(d, weight)
    assert dx.shape == (2, 5, 64)
    assert torch.allclose(dx.double(), d.double() @ weight.double(), rtol=2**-7, atol=2**-5)
    assert torch.equal(products.linear(x, weight.t().contiguous().t()), products.linear(x, weight))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return products.input_gradient(d, ctx.weight), None, None


@pytest.mark.parametrize("bias", [None, torch.ones(8)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 7, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("widened")
def test_what_a_product_gives_may_be_added_to_in_place(
    dtype: torch.dtype, shape: tuple[int, ...], bias: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 4).to(dtype), None if bias is None else bias.to(dtype)
    found = []
    for product in (_Product.apply, torch.nn.functional.linear):
        x = torch.ones(shape, dtype=dtype).requires_grad_()
        y = product(x, weight, bias)
        y += 2 * y.detach()
        (y * y.detach()).sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.usefixtures("widened")
def test_no_rows() -> None:
    weight = torch.ones(8, 32).bfloat16()
    assert products.linear(torch.empty(0, 32).bfloat16(), weight).shape == (0, 8)
    assert products.input_gradient(torch.empty(0, 8).bfloat16(), weight).shape == (0, 32)


@pytest.mark.usefixtures("widened")
def test_threads_do_not_share_a_tile() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(300, 200).bfloat16() for _ in range(4)]
    x = torch.randn(9, 200).bfloat16()
    want = [products.linear(x, weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            for got, expected in zip(pool.map(lambda w: products.linear(x, w), weights), want, strict=True):
                assert torch.equal(got, expected)
