"""y = x W^T and dx = D W on a CPU without bf16 instructions, at the speed of fp32, from 16-bit weights as they lie.

Where the CPU cannot multiply bf16 (anything without AVX512-BF16 or AMX), a library's 16-bit product is several times
slower than the same product in fp32, and the one of the backward pass, whose W is not transposed, a hundred times. A
bf16 number is the upper half of an fp32 number, so a tile of W widened into scratch memory costs next to nothing; the
product then runs in fp32 and is rounded once. No fp32 copy of W exists beyond one tile per thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE_BYTES = (
    2 << 20
)  # half of what the last-level cache of one core holds, at least; 4 MiB was 1.6 times slower
_FEW_ROWS = (
    4  # with fewer rows of x than this many, reading W once is all that counts, and the library does that
)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has multiply-add instructions for `dtype`; without them fp32 products are faster."""
    if dtype == torch.bfloat16:
        names: tuple[str, ...] = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    elif dtype == torch.float16:
        names = ("_is_avx512_fp16_supported", "_is_amx_fp16_supported")
    else:
        return True
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


@functools.cache
def tiles() -> bool:
    """Whether this CPU multiplies whole tiles of bf16 (AMX), several times as fast as rows of it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def linear(
    x: Tensor,  # (..., n) of the weight's type, or fp32
    weight: Tensor,  # (m, n), any strides
    bias: Tensor | None = None,  # (m,)
) -> Tensor:
    """x W^T + b, as torch.nn.functional.linear gives it, to the rounding of the fp32 sum. (..., m), x's dtype.

    Never a view: autograd forbids changing a view in place that one of its functions has made, and some models add to
    what a linear layer gives them.
    """
    m, n = weight.shape
    rows = x.numel() // n if n else 0
    if not _widens(x, weight) or (rows <= _FEW_ROWS and x.dtype == weight.dtype):
        return _no_view(torch.nn.functional.linear(x, weight, bias))
    wide = x.reshape(rows, n).float()
    y = torch.empty(rows, m)
    for top, tile in _tiles(weight):
        torch.mm(wide, tile.t(), out=y[:, top : top + len(tile)])
    if bias is not None:
        y += bias
    return _no_view(y.to(x.dtype).view(*x.shape[:-1], m))


def input_gradient(
    d: Tensor,  # (..., m) gradient of y, of the weight's type, or fp32
    weight: Tensor,  # (m, n), any strides
) -> Tensor:
    """D W: the gradient of x. (..., n), d's dtype."""
    m, n = weight.shape
    rows = d.numel() // m if m else 0
    if rows == 0 or not _widens(d, weight):
        return d @ weight
    wide = d.reshape(rows, m).float()
    dx = torch.empty(rows, n)
    for top, tile in _tiles(weight):
        part = wide[:, top : top + len(tile)]
        if top == 0:
            torch.mm(part, tile, out=dx)
        else:
            dx.addmm_(part, tile)
    return dx.to(d.dtype).view(*d.shape[:-1], n)


def without(
    x: Tensor,  # (T, n)
    directions: Tensor,  # (k, n) orthonormal rows
) -> Tensor:
    """x without its part in these directions: x - (x B^T) B. (T, n), x's dtype."""
    return x - input_gradient(linear(x, directions), directions)


def _no_view(y: Tensor) -> Tensor:
    """The same memory as a tensor of its own; its base must be nobody else's."""
    if not y._is_view():
        return y
    own: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return own


def _widens(x: Tensor, weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.dtype == torch.float32 or (x.dtype == weight.dtype and not multiplies(weight.dtype))


class _Scratch(threading.local):
    """The calling thread's tile: fresh pages for every tile would cost more than the tile."""

    def __init__(self) -> None:
        self.tile = torch.empty(0)


_scratch = _Scratch()


def _tiles(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, those rows of W in fp32), one tile after the other in the same memory."""
    m, n = weight.shape
    rows = min(m, max(1, _TILE_BYTES // (4 * max(n, 1))))
    if _scratch.tile.numel() < rows * n:
        _scratch.tile = torch.empty(rows * n)
    for top in range(0, m, rows):
        part = weight[top : top + rows]
        tile = _scratch.tile[: part.numel()].view(part.shape)
        yield top, tile.copy_(part)
