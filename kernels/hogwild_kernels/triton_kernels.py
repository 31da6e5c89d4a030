"""The Triton kernels of the CUDA step. `cuda.py` launches them; both orientations of a weight share them.

One side of the weight is projected away (size K = min(m, n), factor Y), the other carries the channels
(size C, factor Z):

    m < n    Y = D (T, m), Z = X (T, n)        R (rank, n), channels are columns
    m >= n   Y = X (T, n), Z = D (T, m)        R (m, rank), channels are rows

What depends on the step count (projection epoch, rounding stream, bias correction) is derived on the
device, so that no kernel waits for the host. All random bits are those of `counter.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped"
# Triton functions are typed by their launch.

from __future__ import annotations

import triton
import triton.language as tl

from .counter import MIX1, MIX2, PROJECTION, ROUNDING, TABLE_BITS, TABLE_SIZE

_MIX1 = tl.constexpr(MIX1)
_MIX2 = tl.constexpr(MIX2)
_PROJECTION = tl.constexpr(PROJECTION)
_ROUNDING = tl.constexpr(ROUNDING)
_TABLE_MASK = tl.constexpr(TABLE_SIZE - 1)
_TABLE_SHIFT = tl.constexpr(32 - TABLE_BITS)
NORM_EPS = tl.constexpr(1e-8)


@triton.jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), _MIX1, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), _MIX2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _subkey(key0, key1, purpose: tl.constexpr, count, seed):
    """`counter.subkey`; keys and seed arrive as int32, the count as int64."""
    inner = _mix32(count.to(tl.uint32) + tl.full((), purpose, tl.uint32))
    inner = _mix32(inner + seed.to(tl.uint32, bitcast=True))
    a = _mix32(key0.to(tl.uint32, bitcast=True) ^ inner)
    b = _mix32(key1.to(tl.uint32, bitcast=True) + a)
    return a, b


@triton.jit
def _words(index, a, b):
    """`counter.words`; index uint32."""
    x = index + a
    x = x ^ (x >> 16)
    x = (x * tl.full((), _MIX1, tl.uint32)) ^ b
    x = x ^ (x >> 15)
    x = x * tl.full((), _MIX2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _gaussian(index, a, b, table, gain):
    """Entries of P from their counters, as `counter.projection`: two table look-ups, an integer sum, one
    product."""
    word = _words(index, a, b)
    low = tl.load(table + (word & tl.full((), _TABLE_MASK, tl.uint32)).to(tl.int32))
    high = tl.load(table + (word >> _TABLE_SHIFT).to(tl.int32))
    return (low + high).to(tl.float32) * gain


@triton.jit
def round_bfloat16(value, word):
    """fp32 to bf16, stochastically (see rounding.py)."""
    bits = value.to(tl.uint32, bitcast=True)
    exponent = tl.full((), 0x7F800000, tl.uint32)
    moved = (bits + (word >> 16)) & tl.full((), 0xFFFF0000, tl.uint32)
    bits = tl.where((bits & exponent) == exponent, bits, moved)
    return bits.to(tl.float32, bitcast=True).to(
        tl.bfloat16
    )  # the lower half is zero: nothing is left to round


@triton.jit
def round_float16(value, word):
    """fp32 to fp16, stochastically: 13 dropped bits, or fixed point in units of 2^-24 below 2^-14."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & tl.full((), 0x7FFFFFFF, tl.uint32)
    sign = (bits >> 16) & tl.full((), 0x8000, tl.uint32)
    moved = (magnitude + (word >> 19)) >> 13
    normal = tl.minimum(moved - tl.full((), 112 << 10, tl.uint32), tl.full((), 0x7C00, tl.uint32))
    units = magnitude.to(tl.float32, bitcast=True) * 16777216.0
    units = tl.minimum(units, 1024.0)  # so that the conversion below is defined where it is not used
    below = tl.floor(units)
    up = (units - below) > (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    small = below.to(tl.uint32) + up.to(tl.uint32)
    half = tl.where(magnitude < tl.full((), 113 << 23, tl.uint32), small, normal)
    infinity = tl.full((), 0x7F800000, tl.uint32)
    nan = tl.full((), 0x7E00, tl.uint32)
    half = tl.where(
        magnitude == infinity, tl.full((), 0x7C00, tl.uint32), tl.where(magnitude > infinity, nan, half)
    )
    return (half | sign).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit(do_not_specialize=["key0", "key1"])
def project(
    y, y_token, y_column,  # (T, K) and its strides
    out,  # (T, rank) fp32 contiguous: Y P^T
    counts, gap, key0, key1, table, gain,
    tokens, size, rank,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Y P^T with P generated in place, tile by tile: P is never in memory."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    a, b = _subkey(key0, key1, _PROJECTION, tl.load(counts) // gap, tl.full((), 0, tl.int32))
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        place = y + t[:, None].to(tl.int64) * y_token + k[None, :].to(tl.int64) * y_column
        tile = tl.load(place, mask=(t[:, None] < tokens) & (k[None, :] < size), other=0.0).to(tl.float32)
        index = (r[None, :].to(tl.int64) * size + k[:, None]).to(tl.uint32)
        total += tl.dot(tile, _gaussian(index, a, b, table, gain), input_precision="ieee")
    inside = (t[:, None] < tokens) & (r[None, :] < rank)
    tl.store(out + t[:, None] * rank + r[None, :], total, mask=inside)


@triton.jit
def channels(
    small, z, z_token, z_channel,  # (T, rank) from `project`; (T, C) and its strides
    r_out, mean, square, rank_step, channel_step,  # R, M and V share one layout
    normal_sum, raw_sum,  # (C,) fp32 out: |N_j|^2, |R_j|^2
    tokens, count, rank, b1, c1, b2, c2, eps,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """R = small^T Z and, in its epilogue, the channel norms of steps (3) and (4). The moments are only
    read."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    normals = tl.zeros((BLOCK_C,), tl.float32)
    raws = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            left = tl.load(
                small + t[None, :] * rank + r[:, None],
                mask=(t[None, :] < tokens) & (r[:, None] < rank),
                other=0.0,
            )
            place = z + t[:, None].to(tl.int64) * z_token + c[None, :].to(tl.int64) * z_channel
            right = tl.load(place, mask=(t[:, None] < tokens) & (c[None, :] < count), other=0.0).to(
                tl.float32
            )
            total += tl.dot(left, right, input_precision="ieee")
        at = r[:, None].to(tl.int64) * rank_step + c[None, :].to(tl.int64) * channel_step
        inside = (r[:, None] < rank) & (c[None, :] < count)
        m = b1 * tl.load(mean + at, mask=inside, other=0.0) + c1 * total
        v = b2 * tl.load(square + at, mask=inside, other=0.0) + c2 * total * total
        normal = m / (tl.sqrt(v) + eps)
        normals += tl.sum(tl.where(inside, normal * normal, 0.0), 0)
        raws += tl.sum(tl.where(inside, total * total, 0.0), 0)
        tl.store(r_out + at, total, mask=inside)
    tl.store(normal_sum + c, normals, mask=c < count)
    tl.store(raw_sum + c, raws, mask=c < count)


@triton.jit
def finish(
    squared, phi, counts, scalars,  # |U|^2; state; out: [step size, keep, |dW|, applied, step count before]
    lr, root_alpha, log_b1, log_b2, gamma, floor, decay,
):  # fmt: skip
    """Steps (6) and (7): guard, limiter, bias correction. One program; the only place that advances phi and
    the step."""
    total = tl.load(squared)
    length = tl.sqrt(total)
    good = (total >= 0.0) & (total < float("inf"))  # False for NaN
    before = tl.load(phi)
    limited = (gamma > 0.0) & (length > 0.0)
    first = before == 0.0
    limit = tl.where(limited & (before > 0.0), tl.maximum(length / (before + NORM_EPS), gamma) / gamma, 1.0)
    after = tl.where(first, length, tl.maximum(length / limit, floor * before))
    after = tl.where(limited, after, before)
    done = tl.load(counts)
    t = (done + 1).to(tl.float64)
    # fp64: 1 - 0.999^t loses four digits in fp32 at t = 1.
    root = tl.sqrt(1.0 - tl.exp(t * log_b2))
    correction = root / (1.0 - tl.exp(t * log_b1))
    step = lr * correction.to(tl.float32) * root_alpha / limit
    tl.store(phi, tl.where(good, after, before))
    tl.store(counts, tl.where(good, done + 1, done))
    tl.store(counts + 1, tl.load(counts + 1) + tl.where(good, 0, 1))
    tl.store(scalars, step)
    tl.store(scalars + 1, 1.0 - lr * decay)
    tl.store(scalars + 2, tl.where(good, step * length, 0.0))
    tl.store(scalars + 3, tl.where(good, 1.0, 0.0))
    tl.store(scalars + 4, (done & 0xFFFFFF).to(tl.float32))  # for reading only; the stream uses counts


@triton.jit
def commit(r, mean, square, scalars, size, b1, c1, b2, c2, BLOCK: tl.constexpr):
    """M and V of step (3), unless the update was stopped."""
    if tl.load(scalars + 3) > 0.0:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        x = tl.load(r + i, mask=inside, other=0.0)
        tl.store(mean + i, b1 * tl.load(mean + i, mask=inside, other=0.0) + c1 * x, mask=inside)
        tl.store(square + i, b2 * tl.load(square + i, mask=inside, other=0.0) + c2 * x * x, mask=inside)


@triton.jit(do_not_specialize=["key0", "key1", "seed"])
def write(
    weight, row_stride, column_stride,  # (m, n), any strides
    x, x_token, x_column, d, d_token, d_row,  # (T, n) and (T, m), any strides
    scale, scalars, counts, key0, key1, seed,
    m, n, tokens,
    BY_ROW: tl.constexpr, STOCHASTIC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """W <- round((W - step D^T X scaled) * keep): one product per tile, accumulated in fp32, rounded once."""
    if tl.load(scalars + 3) > 0.0:
        i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            left = tl.load(
                d + t[None, :].to(tl.int64) * d_token + i[:, None].to(tl.int64) * d_row,
                mask=(t[None, :] < tokens) & (i[:, None] < m), other=0.0,
            )  # fmt: skip
            right = tl.load(
                x + t[:, None].to(tl.int64) * x_token + j[None, :].to(tl.int64) * x_column,
                mask=(t[:, None] < tokens) & (j[None, :] < n), other=0.0,
            )  # fmt: skip
            if WIDEN:  # Triton's interpreter multiplies bf16 as the integers that it keeps them in
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total += tl.dot(left, right, input_precision="ieee")
        if BY_ROW:
            total = total * tl.load(scale + i, mask=i < m, other=0.0)[:, None]
        else:
            total = total * tl.load(scale + j, mask=j < n, other=0.0)[None, :]
        place = weight + i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
        inside = (i[:, None] < m) & (j[None, :] < n)
        old = tl.load(place, mask=inside, other=0.0)
        value = (old.to(tl.float32) - total * tl.load(scalars)) * tl.load(scalars + 1)
        kind: tl.constexpr = weight.dtype.element_ty
        if STOCHASTIC and (kind == tl.bfloat16 or kind == tl.float16):
            # `finish` has already counted this step, so its number from 0 is one less.
            a, b = _subkey(key0, key1, _ROUNDING, tl.load(counts) - 1, seed)
            word = _words((i[:, None].to(tl.int64) * n + j[None, :]).to(tl.uint32), a, b)
            if kind == tl.bfloat16:
                tl.store(place, round_bfloat16(value, word), mask=inside)
            else:
                tl.store(place, round_float16(value, word), mask=inside)
        else:
            tl.store(place, value.to(kind), mask=inside)


@triton.jit(do_not_specialize=["a_bits", "b_bits"])
def round_values(values, out, size, a_bits, b_bits, BLOCK: tl.constexpr):
    """Stochastic rounding alone, counter = position: for the tests of the bits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = _words(i.to(tl.uint32), a_bits.to(tl.uint32, bitcast=True), b_bits.to(tl.uint32, bitcast=True))
    value = tl.load(values + i, mask=i < size, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + i, round_bfloat16(value, word), mask=i < size)
    else:
        tl.store(out + i, round_float16(value, word), mask=i < size)
