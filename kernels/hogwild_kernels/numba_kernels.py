"""The loops that Numba compiles for the CPU: the rounded write, moments and norms, projections, Adam.

Serial and `nogil`: one trainer thread is one core's worth of work, and Numba's own thread pools may not be
entered from several Python threads at once. Inner loops run over contiguous memory without branches, so
that LLVM vectorises them. Memory is passed as an address and a marker, a scalar whose type says what lies
there: Numba has no bf16 or fp16, and cannot express "2-D with any row stride and contiguous rows" as an
array type.

    marker            np.uint16(0)   np.int16(0)   np.float32(0)
    element           bf16           fp16          fp32
"""

# ruff: noqa: ARG001, ARG005 - an overload must repeat the signature that it overloads
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Numba is untyped: its functions take their types from the call, so annotations here would say less than
# they seem.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import codegen, config
from numba.extending import intrinsic, overload

from .counter import MIX1, MIX2, TABLE_BITS, TABLE_SIZE

BFLOAT16, FLOAT16, FLOAT32 = np.uint16(0), np.int16(0), np.float32(0)

u32 = np.uint32
f32 = np.float32

if config.CPU_FEATURES is None and "+avx512bf16" in (_features := codegen.get_host_cpu_features()):
    # LLVM keeps to 256 bits for the sake of CPUs that lower their clock for wider vectors. Those with bf16 products
    # do not, and write 1.5 times as fast with 512.
    config.CPU_FEATURES = f"{_features},-prefer-256-bit"

# Allows sums to be vectorised. Nothing here licenses the compiler to assume that NaN and inf do not occur.
_SUMS = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`njit(nogil=True)`, cached on disk where Numba finds a writable place (NUMBA_CACHE_DIR, beside the
    source, or the user's cache folder) and compiled per process where it does not, as under a service with
    a read-only file system.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # "numpy": a division by zero gives inf. Python's error would be a branch, and no loop with one is
        # vectorised.
        usual = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **usual)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # "no locator available": nowhere to cache
            return njit(**usual)(function)  # type: ignore[no-any-return]

    return decorate


@intrinsic
def _float_bits(typingctx, value):
    """The 32 bits of an fp32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _bits_float(typingctx, value):
    """The fp32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _pointer(typingctx, address, marker):
    """An address as a pointer to elements of the marker's type."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(marker)(types.int64, marker), codegen


@njit(nogil=True)
def _widen_half(value):
    bits = u32(u32(value) & u32(0xFFFF))
    magnitude = u32(bits & u32(0x7FFF))
    sign = u32(u32(bits & u32(0x8000)) << u32(16))
    if magnitude < u32(0x0400):  # subnormal halves are multiples of 2^-24
        return _bits_float(u32(_float_bits(f32(magnitude) * f32(2.0**-24)) | sign))
    offset = u32(112 << 23) if magnitude < u32(0x7C00) else u32(224 << 23)
    return _bits_float(u32(u32(u32(magnitude << u32(13)) + offset) | sign))


COMPILED_ONLY = "a name for Numba to overload by type, just below; there is nothing to call in Python"


def _widen(value):
    raise TypeError(COMPILED_ONLY)


@overload(_widen, inline="always")
def _widen_overload(value):
    """One stored element as fp32."""
    if value == types.float32:
        return lambda value: value
    if value == types.uint16:
        return lambda value: _bits_float(u32(u32(value) << u32(16)))

    return lambda value: _widen_half(value)


def _narrow(value, random, like):
    raise TypeError(COMPILED_ONLY)


@overload(_narrow, inline="always")
def _narrow_overload(value, random, like):
    """fp32 to the type of `like`, stochastically with these 16 random bits; see rounding.py for why this is
    right."""
    if like == types.float32:
        return lambda value, random, like: value
    if like == types.uint16:

        def bfloat16(value, random, like):
            bits = _float_bits(value)
            finite = (bits & u32(0x7F800000)) != u32(0x7F800000)
            added = u32(bits + u32(random))
            return np.uint16(u32(added if finite else bits) >> u32(16))

        return bfloat16

    def half(value, random, like):
        bits = _float_bits(value)
        sign = np.uint16((bits >> u32(16)) & u32(0x8000))
        magnitude = u32(bits & u32(0x7FFFFFFF))
        if magnitude >= u32(0x7F800000):  # inf, NaN
            return np.int16(sign | np.uint16(0x7C00 if magnitude == u32(0x7F800000) else 0x7E00))
        if magnitude < u32(113 << 23):  # below 2^-14: fixed point in units of 2^-24
            units = _bits_float(magnitude) * f32(2.0**24)
            below = math.floor(units)
            up = (units - below) > (f32(u32(random)) + f32(0.5)) * f32(2.0**-16)
            return np.int16(sign | np.uint16(u32(below) + u32(up)))
        moved = u32(magnitude + (u32(random) >> u32(3))) >> u32(13)
        return np.int16(sign | np.uint16(min(u32(moved - u32(112 << 10)), u32(0x7C00))))

    return half


def _nearest(value, like):
    raise TypeError(COMPILED_ONLY)


@overload(_nearest, inline="always")
def _nearest_overload(value, like):
    """fp32 to the type of `like`, to nearest, ties to even."""
    if like == types.float32:
        return lambda value, like: value
    if like == types.uint16:

        def bfloat16(value, like):
            bits = _float_bits(value)
            finite = (bits & u32(0x7F800000)) != u32(0x7F800000)
            added = u32(bits + u32(0x7FFF) + (u32(bits >> u32(16)) & u32(1)))
            return np.uint16(u32(added if finite else bits) >> u32(16))

        return bfloat16

    def half(value, like):
        bits = _float_bits(value)
        sign = np.uint16((bits >> u32(16)) & u32(0x8000))
        magnitude = u32(bits & u32(0x7FFFFFFF))
        if magnitude >= u32(0x7F800000):
            return np.int16(sign | np.uint16(0x7C00 if magnitude == u32(0x7F800000) else 0x7E00))
        if magnitude < u32(113 << 23):
            units = _bits_float(magnitude) * f32(2.0**24)
            return np.int16(sign | np.uint16(u32((units + f32(2.0**23)) - f32(2.0**23))))
        moved = u32(magnitude + u32(0xFFF) + (u32(magnitude >> u32(13)) & u32(1))) >> u32(13)
        return np.int16(sign | np.uint16(min(u32(moved - u32(112 << 10)), u32(0x7C00))))

    return half


@njit(nogil=True, inline="always")
def _word(index, b):
    """`counter.words` for one counter; the stream's `a` is already added to `index`."""
    x = u32(index)
    x = u32(x ^ (x >> u32(16)))
    x = u32(u32(x * u32(MIX1)) ^ b)
    x = u32(x ^ (x >> u32(15)))
    x = u32(x * u32(MIX2))
    return u32(x ^ (x >> u32(16)))


@njit(nogil=True)
def _fill_words(words, count, start, b):
    """Random words for `count` elements beside one another, 16 bits for each: as uint16 in memory, where the lower half
    of a word is the first. A pass of its own, which is vectorised whatever the loop after it does."""
    for p in range((count + 1) // 2):
        words[p] = _word(u32(start + u32(p)), b)


@compiled()
def write_tile(
    weight, weight_marker, weight_stride,  # address of the first row; bytes from row to row
    tile, tile_marker,  # (rows, columns) contiguous: this tile of D^T X
    rows, columns,
    column_scale, row_scale,  # addresses of fp32 vectors; their product scales the tile
    keep,  # 1 - lr * weight decay
    stochastic, a, b, top, pairs,  # the rounding stream; first row in the weight; words of one of its rows
    transposed,  # the tile's rows are the weight's columns
):  # fmt: skip
    """W <- round((W - diag(row_scale) tile diag(column_scale)) * keep), steps (5) to (7), rounded once."""
    words = np.empty((columns + 1) // 2 + 1, np.uint32)
    halves = words.view(np.uint16)
    scale = carray(_pointer(column_scale, FLOAT32), (columns,))
    outer = carray(_pointer(row_scale, FLOAT32), (rows,))
    grads = carray(_pointer(tile, tile_marker), (rows * columns,))
    for i in range(rows):
        w = carray(_pointer(weight + i * weight_stride, weight_marker), (columns,))
        g = grads[i * columns : (i + 1) * columns]
        s = outer[i]
        if stochastic and transposed:
            start, step = u32(u32((top + i) >> 1) + a), u32(pairs)
            upper = u32(16 * ((top + i) & 1))
            for j in range(columns):
                random = (_word(u32(start + u32(u32(j) * step)), b) >> upper) & u32(0xFFFF)
                value = (_widen(w[j]) - _widen(g[j]) * (scale[j] * s)) * keep
                w[j] = _narrow(value, random, w[j])
        elif stochastic:
            _fill_words(words, columns, u32(u32((top + i) * pairs) + a), b)
            for j in range(columns):
                value = (_widen(w[j]) - _widen(g[j]) * (scale[j] * s)) * keep
                w[j] = _narrow(value, halves[j], w[j])
        else:
            for j in range(columns):
                w[j] = _nearest((_widen(w[j]) - _widen(g[j]) * (scale[j] * s)) * keep, w[j])


@compiled()
def round_values(values, out, out_marker, count, a, b):
    """Stochastic rounding alone, element = position: for the tests of the bits."""
    source = carray(_pointer(values, FLOAT32), (count,))
    target = carray(_pointer(out, out_marker), (count,))
    words = np.empty((count + 1) // 2 + 1, np.uint32)
    halves = words.view(np.uint16)
    _fill_words(words, count, a, b)
    for j in range(count):
        target[j] = _narrow(source[j], halves[j], target[j])


@compiled()
def fill_projection(out, count, a, b, table, gain):
    """`counter.projection` into fp32 memory; `table` is `gaussian_table()`."""
    p = carray(_pointer(out, FLOAT32), (count,))
    quantiles = carray(_pointer(table, np.int32(0)), (TABLE_SIZE,))
    for j in range(count):
        word = _word(u32(u32(j) + a), b)
        low = quantiles[word & u32(TABLE_SIZE - 1)]
        high = quantiles[word >> u32(32 - TABLE_BITS)]
        p[j] = f32(low + high) * gain


@compiled(fastmath=_SUMS)
def channel_norms(r, mean, square, rows, columns, by_row, b1, c1, b2, c2, eps, normal_sum, raw_sum):
    """|N_j|^2 and |R_j|^2 of every channel, steps (3) and (4), without changing the moments."""
    grads = carray(_pointer(r, FLOAT32), (rows * columns,))
    means = carray(_pointer(mean, FLOAT32), (rows * columns,))
    squares = carray(_pointer(square, FLOAT32), (rows * columns,))
    channels = rows if by_row else columns
    normals = carray(_pointer(normal_sum, FLOAT32), (channels,))
    raws = carray(_pointer(raw_sum, FLOAT32), (channels,))
    normals[:] = f32(0.0)
    raws[:] = f32(0.0)
    for i in range(rows):
        g = grads[i * columns : (i + 1) * columns]
        m = means[i * columns : (i + 1) * columns]
        v = squares[i * columns : (i + 1) * columns]
        if by_row:
            normal_total = f32(0.0)
            raw_total = f32(0.0)
            for j in range(columns):
                x = g[j]
                normal = (b1 * m[j] + c1 * x) / (math.sqrt(b2 * v[j] + c2 * x * x) + eps)
                normal_total += normal * normal
                raw_total += x * x
            normals[i] = normal_total
            raws[i] = raw_total
        else:
            for j in range(columns):
                x = g[j]
                normal = (b1 * m[j] + c1 * x) / (math.sqrt(b2 * v[j] + c2 * x * x) + eps)
                normals[j] += normal * normal
                raws[j] += x * x


@compiled()
def update_moments(r, mean, square, count, b1, c1, b2, c2):
    """M and V of step (3), in place."""
    g = carray(_pointer(r, FLOAT32), (count,))
    m = carray(_pointer(mean, FLOAT32), (count,))
    v = carray(_pointer(square, FLOAT32), (count,))
    for j in range(count):
        x = g[j]
        m[j] = b1 * m[j] + c1 * x
        v[j] = b2 * v[j] + c2 * x * x


@compiled(fastmath=_SUMS)
def add_squares(tile, tile_marker, rows, columns, by_row, out):
    """Adds the squared norms of a tile's rows or columns to `out`: |G_j|^2 of the plain form."""
    channels = rows if by_row else columns
    total = carray(_pointer(out, FLOAT32), (channels,))
    grads = carray(_pointer(tile, tile_marker), (rows * columns,))
    for i in range(rows):
        g = grads[i * columns : (i + 1) * columns]
        if by_row:
            row = f32(0.0)
            for j in range(columns):
                x = _widen(g[j])
                row += x * x
            total[i] += row
        else:
            for j in range(columns):
                x = _widen(g[j])
                total[j] += x * x


@compiled(fastmath=_SUMS)
def adam(
    weight, weight_marker, gradient, gradient_marker, mean, square, count,
    b1, c1, b2, c2, eps, root_correction, rate, keep, stochastic, a, b,
):  # fmt: skip
    """AdamW over contiguous memory. Returns |dW|^2; touches nothing and returns NaN when a gradient, or its square, is
    not finite."""
    w = carray(_pointer(weight, weight_marker), (count,))
    g = carray(_pointer(gradient, gradient_marker), (count,))
    m = carray(_pointer(mean, FLOAT32), (count,))
    v = carray(_pointer(square, FLOAT32), (count,))
    bad = False
    for j in range(count):
        x = _widen(g[j])
        bad |= (_float_bits(x * x) & u32(0x7F800000)) == u32(0x7F800000)
    if bad:
        return math.nan
    words = np.empty((count + 1) // 2 + 1, np.uint32)
    halves = words.view(np.uint16)
    if stochastic:
        _fill_words(words, count, a, b)
    total = f32(0.0)
    for j in range(count):
        x = _widen(g[j])
        m[j] = b1 * m[j] + c1 * x
        v[j] = b2 * v[j] + c2 * x * x
        delta = rate * m[j] / (math.sqrt(v[j] * root_correction) + eps)
        total += delta * delta
        value = _widen(w[j]) * keep - delta
        if stochastic:
            w[j] = _narrow(value, halves[j], w[j])
        else:
            w[j] = _nearest(value, w[j])
    return total
