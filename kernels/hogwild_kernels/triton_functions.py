"""What the kernels of triton_kernels.py are made of: the generator of counter.py, the rounding of rounding.py, and
products in fp32 with matrix units that have none.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped"
# Triton functions are typed by their launch.

from __future__ import annotations

import triton
import triton.language as tl

from .counter import MIX1, MIX2, PROJECTION, ROUNDING, TABLE_BITS, TABLE_SIZE

_MIX1 = tl.constexpr(MIX1)
_MIX2 = tl.constexpr(MIX2)
PROJECTION_STREAM = tl.constexpr(PROJECTION)
ROUNDING_STREAM = tl.constexpr(ROUNDING)
_TABLE_MASK = tl.constexpr(TABLE_SIZE - 1)
_TABLE_SHIFT = tl.constexpr(32 - TABLE_BITS)


@triton.jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), _MIX1, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), _MIX2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def subkey(key0, key1, purpose: tl.constexpr, count, seed):
    """`counter.subkey`; keys and seed arrive as int32, the count as int64."""
    inner = _mix32(count.to(tl.uint32) + tl.full((), purpose, tl.uint32))
    inner = _mix32(inner + seed.to(tl.uint32, bitcast=True))
    a = _mix32(key0.to(tl.uint32, bitcast=True) ^ inner)
    b = _mix32(key1.to(tl.uint32, bitcast=True) + a)
    return a, b


@triton.jit
def words(index, a, b):
    """`counter.words`; index uint32."""
    x = index + a
    x = x ^ (x >> 16)
    x = (x * tl.full((), _MIX1, tl.uint32)) ^ b
    x = x ^ (x >> 15)
    x = x * tl.full((), _MIX2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def rounding_bits(i, a, b):
    """The 16 bits of `counter.rounding_bits` for element i of a single row."""
    word = words((i // 2).to(tl.uint32), a, b)
    return (word >> ((i % 2) * 16).to(tl.uint32)) & tl.full((), 0xFFFF, tl.uint32)


@triton.jit
def gaussian(index, a, b, table):
    """Entries of P from their counters, as `counter.projection`, before its gain: two table look-ups and an integer
    sum."""
    word = words(index, a, b)
    low = tl.load(table + (word & tl.full((), _TABLE_MASK, tl.uint32)).to(tl.int32))
    high = tl.load(table + (word >> _TABLE_SHIFT).to(tl.int32))
    return (low + high).to(tl.float32)


@triton.jit
def round_bfloat16(value, random):
    """fp32 to bf16, stochastically with 16 random bits (see rounding.py)."""
    bits = value.to(tl.uint32, bitcast=True)
    moved = (bits + random) & tl.full((), 0xFFFF0000, tl.uint32)
    # Infinity's lower half is zero, so nothing carries out of it. Of NaN's it might: adding next to nothing of NaN
    # brings it back, with a unit of the GPU that has less to do than the one for comparisons and choices.
    moved = tl.fma(value, 2.0**-100, moved.to(tl.float32, bitcast=True))
    return (moved.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_float16(value, random):
    """fp32 to fp16, stochastically: 13 dropped bits, or fixed point in units of 2^-24 below 2^-14."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & tl.full((), 0x7FFFFFFF, tl.uint32)
    sign = (bits >> 16) & tl.full((), 0x8000, tl.uint32)
    moved = (magnitude + (random >> 3)) >> 13
    normal = tl.minimum(moved - tl.full((), 112 << 10, tl.uint32), tl.full((), 0x7C00, tl.uint32))
    units = magnitude.to(tl.float32, bitcast=True) * 16777216.0
    units = tl.minimum(units, 1024.0)  # so that the conversion below is defined where it is not used
    below = tl.floor(units)
    up = (units - below) > (random.to(tl.float32) + 0.5) * 1.52587890625e-05
    small = below.to(tl.uint32) + up.to(tl.uint32)
    half = tl.where(magnitude < tl.full((), 113 << 23, tl.uint32), small, normal)
    infinity = tl.full((), 0x7F800000, tl.uint32)
    nan = tl.full((), 0x7E00, tl.uint32)
    half = tl.where(
        magnitude == infinity, tl.full((), 0x7C00, tl.uint32), tl.where(magnitude > infinity, nan, half)
    )
    return (half | sign).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def round_to(value, random, kind: tl.constexpr):
    """fp32 to one of the two, stochastically."""
    return round_bfloat16(value, random) if kind == tl.bfloat16 else round_float16(value, random)


@triton.jit
def dot(left, right, total, WIDEN: tl.constexpr):
    """total + left right, in fp32; `WIDEN` because Triton's interpreter multiplies bf16 as the integers that it
    keeps them in."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def cut_bfloat16(x):
    """fp32 to bf16, towards zero."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest_bfloat16(x):
    """fp32 to bf16, to nearest; Triton's interpreter would cut."""
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits >> 16) & tl.full((), 1, tl.uint32)
    rounded = bits + up + tl.full((), 0x7FFF, tl.uint32)
    return cut_bfloat16(tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True))


@triton.jit
def three_parts(x):
    """fp32 as a sum of three bf16: eight bits of its 24 in each. Of infinity the sum is NaN."""
    high = cut_bfloat16(x)
    rest = x - high.to(tl.float32)
    middle = cut_bfloat16(rest)
    return high, middle, cut_bfloat16(rest - middle.to(tl.float32))


@triton.jit
def dot_fp32(left, right, total, WIDEN: tl.constexpr):
    """total + left right, where the right side is fp32. Matrix units have no fp32: with bf16 on the left three of their
    products give the same to fp32 rounding."""
    if left.dtype == tl.bfloat16:
        high, middle, low = three_parts(right)
        total = dot(left, low, total, WIDEN)
        total = dot(left, middle, total, WIDEN)
        total = dot(left, high, total, WIDEN)
    else:
        total = dot(left.to(tl.float32), right, total, WIDEN)
    return total
