"""Rounding an fp32 result to a bf16 or fp16 weight, in plain PyTorch: the truth that the kernels are tested
against.

A bf16 number is the upper half of an fp32 number. Adding 16 random bits to the lower half and dropping it
rounds up with probability lower / 65536, which is exactly the distance to the number below in units of the
gap:

    fp32   s eeeeeeee mmmmmmm|llllllllllllllll     value = bf16 below + l / 65536 of one gap
        +                     rrrrrrrrrrrrrrrr     carries into the upper half with probability l / 65536
    bf16   s eeeeeeee mmmmmmm                      mean = value; l = 0 never carries, so exact values stay

The bits are magnitude and sign, so it is symmetric in sign, and a carry out of the mantissa is the next
power of two. fp16 has 10 mantissa bits (13 are dropped) and gaps of 2^-24 below 2^-14.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF_MIN_NORMAL = 2.0**-14


def round_to(values: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    """`values` (fp32 for bf16 and fp16) as `dtype`.

    values  any shape
    random  same shape, int64 in [0, 2^16) from `counter.rounding_bits`; None rounds to nearest even
    """
    if random is None or dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    if dtype == torch.bfloat16:
        return _stochastic_bfloat16(values.float(), random)
    if dtype == torch.float16:
        return _stochastic_float16(values.float(), random)
    raise TypeError(f"weights are bfloat16, float16, float32 or float64, not {dtype}")


def _stochastic_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    moved = (bits + random.int()) & -65536
    # Inf and NaN have no neighbour to round to; adding bits to them would give a number.
    return torch.where(values.isfinite(), moved.view(torch.float32), values).to(torch.bfloat16)


def _stochastic_float16(values: Tensor, random: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    normal = ((bits + (random >> 3).int()) & -8192).view(torch.float32)
    # Below 2^-14 fp16 is fixed point: the gap is 2^-24 whatever the exponent.
    units = values.abs() * 2.0**24
    below = units.floor()
    up = (units - below) > (random.float() + 0.5) * 2.0**-16
    subnormal = ((below + up) * 2.0**-24).copysign(values)
    rounded = torch.where(values.abs() < _HALF_MIN_NORMAL, subnormal, normal)
    return torch.where(values.isfinite(), rounded, values).to(torch.float16)
