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

from .triton_functions import (
    PROJECTION_STREAM,
    ROUNDING_STREAM,
    dot,
    dot_fp32,
    gaussian,
    nearest_bfloat16,
    round_to,
    subkey,
    words,
)

NORM_EPS = tl.constexpr(1e-8)


@triton.jit(do_not_specialize=["key0", "key1", "gap", "chunk"])
def project(
    y, y_token, y_column,  # (T, K) and its strides
    parts,  # (cdiv(K, chunk), T, rank + T) fp32 out: of each `chunk` of columns, [Y P^T | Y Y^T]
    counts, gap, key0, key1, table, gain,
    finished,  # (1,) int32 out: 0, for `channels`
    tokens, size, rank, chunk,
    WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Y P^T with P generated in place, tile by tile: P is never in memory. And the Gram matrix Y Y^T; of that, tiles
    below the diagonal are left as they are, for it is symmetric."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(finished, 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(1)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, size)
    width = tl.full((), rank + tokens, tl.int64)  # times many tokens
    here = parts + tl.program_id(2).to(tl.int64) * tokens * width + t[:, None] * width
    place = y + t[:, None].to(tl.int64) * y_token
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    projections = tl.cdiv(rank, BLOCK_C)
    if block < projections:
        r = block * BLOCK_C + tl.arange(0, BLOCK_C)
        a, b = subkey(key0, key1, PROJECTION_STREAM, tl.load(counts) // gap, tl.full((), 0, tl.int32))
        for start in range(begin, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (t[:, None] < tokens) & (k[None, :] < end)
            tile = tl.load(place + k[None, :].to(tl.int64) * y_column, mask=inside, other=0.0)
            if rank == size:  # nothing is projected away
                entries = (r[None, :] == k[:, None]).to(tl.float32)
            else:
                index = (r[None, :].to(tl.int64) * size + k[:, None]).to(tl.uint32)
                entries = gaussian(index, a, b, table)
            total = dot_fp32(tile, entries, total, WIDEN)
        if rank != size:
            total *= gain
        tl.store(here + r[None, :], total, mask=(t[:, None] < tokens) & (r[None, :] < rank))
    elif (block - projections + 1) * BLOCK_C > tl.program_id(0) * BLOCK_T:
        u = (block - projections) * BLOCK_C + tl.arange(0, BLOCK_C)
        for start in range(begin, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (t[:, None] < tokens) & (k[None, :] < end)
            tile = tl.load(place + k[None, :].to(tl.int64) * y_column, mask=inside, other=0.0)
            other = y + u[None, :].to(tl.int64) * y_token + k[:, None].to(tl.int64) * y_column
            others = tl.load(other, mask=(u[None, :] < tokens) & (k[:, None] < end), other=0.0)
            total = dot(tile, others, total, WIDEN)
        tl.store(here + rank + u[None, :], total, mask=(t[:, None] < tokens) & (u[None, :] < tokens))


@triton.jit(do_not_specialize=["count"])
def collect(
    parts,  # (count, size) fp32 from `project`
    out,  # (PLANES, size): fp32 if that is one, else two bf16 whose sum it is, to 16 bits
    size, count,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The sum of the parts, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, DEPTH):
        part = start + tl.arange(0, DEPTH)
        inside = (part[:, None] < count) & (i[None, :] < size)
        place = parts + part[:, None].to(tl.int64) * size + i[None, :]
        total += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
    if PLANES == 1:
        tl.store(out + i, total, mask=i < size)
    else:
        high = nearest_bfloat16(total)
        tl.store(out + i, high, mask=i < size)
        tl.store(out + size + i, nearest_bfloat16(total - high.to(tl.float32)), mask=i < size)


@triton.jit
def _dot_planes(place, inside, plane, right, total, PLANES: tl.constexpr, WIDEN: tl.constexpr):
    """total + (the sum of the planes) right."""
    if PLANES == 2:
        total = dot(tl.load(place + plane, mask=inside, other=0.0), right, total, WIDEN)
    else:
        right = right.to(tl.float32)
    return dot(tl.load(place, mask=inside, other=0.0), right, total, WIDEN)


@triton.jit
def _finish(
    sums, programs,  # from `channels`
    phi, counts,  # state
    scalars,  # (3,) out: [what multiplies D^T X scaled, keep, applied]
    numbers,  # (2,) out: [|dW|, skipped]
    lr, root_alpha, log_b1, log_b2, gamma, floor, decay,
    BY_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps (4) for a whole tensor, (6) and (7): guard, limiter, bias correction. By one program; the only place that
    advances phi and the step."""
    i = tl.arange(0, BLOCK)
    normals = tl.zeros((BLOCK,), tl.float32)
    raws = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        inside = start + i < programs
        normals += tl.load(sums + start + i, mask=inside, other=0.0)
        raws += tl.load(sums + programs + start + i, mask=inside, other=0.0)
        squares += tl.load(sums + 2 * programs + start + i, mask=inside, other=0.0)
    raw = tl.sum(raws, 0)
    s = 1.0
    if BY_TENSOR:
        s = tl.sqrt(tl.sum(normals, 0)) / (tl.sqrt(raw) + NORM_EPS)
    # A non-finite R must stop the update even where its channel's own norm came out finite.
    total = s * s * tl.sum(squares, 0) + raw * 0.0
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
    tl.store(scalars, step * s)
    tl.store(scalars + 1, 1.0 - lr * decay)
    tl.store(scalars + 2, tl.where(good, 1.0, 0.0))
    tl.store(numbers, tl.where(good, step * length, 0.0))
    tl.store(numbers + 1, tl.where(good, 0.0, 1.0))


@triton.jit
def channels(
    small,  # (PLANES, T, rank + T) from `collect`: [Y P^T | Y Y^T]
    z, z_token, z_channel,  # (T, C) and its strides
    r_out, mean, square, rank_step, channel_step,  # R, M and V share one layout
    scale,  # (C,) fp32 out: s of step (4); ones where the whole tensor has one
    sums,  # (3, programs) fp32 out: |N|^2, |R|^2 and |U|^2 (|G|^2) of the program's channels
    finished,  # (1,) int32: programs that have written theirs
    phi, counts, scalars, numbers,  # for `_finish`
    tokens, count, rank, b1, c1, b2, c2, eps, lr, root_alpha, log_b1, log_b2, gamma, floor, decay,
    BY_TENSOR: tl.constexpr, PLANES: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R = (Y P^T)^T Z and the channel norms of steps (3) and (4); |G_j|^2 by the Gram matrix, see reference.py. The
    moments are only read. The program that is done last does `_finish`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    width = tl.full((), rank + tokens, tl.int64)  # times many tokens
    place = z + c[None, :].to(tl.int64) * z_channel
    normals = tl.zeros((BLOCK_C,), tl.float32)
    raws = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = (t[:, None] < tokens) & (c[None, :] < count)
            right = tl.load(place + t[:, None].to(tl.int64) * z_token, mask=inside, other=0.0)
            inside = (t[None, :] < tokens) & (r[:, None] < rank)
            at = small + t[None, :] * width + r[:, None]
            total = _dot_planes(at, inside, tokens * width, right, total, PLANES, WIDEN)
        at = r[:, None].to(tl.int64) * rank_step + c[None, :].to(tl.int64) * channel_step
        inside = (r[:, None] < rank) & (c[None, :] < count)
        m = b1 * tl.load(mean + at, mask=inside, other=0.0) + c1 * total
        v = b2 * tl.load(square + at, mask=inside, other=0.0) + c2 * total * total
        normal = m / (tl.sqrt(v) + eps)
        normals += tl.sum(tl.where(inside, normal * normal, 0.0), 0)
        raws += tl.sum(tl.where(inside, total * total, 0.0), 0)
        tl.store(r_out + at, total, mask=inside)
    for top in range(0, tokens, BLOCK_T):
        u = top + tl.arange(0, BLOCK_T)
        itself = tl.load(
            place + u[:, None].to(tl.int64) * z_token,
            mask=(u[:, None] < tokens) & (c[None, :] < count),
            other=0.0,
        )
        row = small + u[:, None] * width + rank
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(top + BLOCK_T, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = (t[:, None] < tokens) & (c[None, :] < count)
            right = tl.load(place + t[:, None].to(tl.int64) * z_token, mask=inside, other=0.0)
            inside = (u[:, None] < tokens) & (t[None, :] < tokens)
            total = _dot_planes(row + t[None, :], inside, tokens * width, right, total, PLANES, WIDEN)
        total = total * 2.0  # what is above the diagonal stands for what is below it, too
        inside = (u[:, None] < tokens) & (u[None, :] < tokens)
        total = _dot_planes(row + u[None, :], inside, tokens * width, itself, total, PLANES, WIDEN)
        squares += tl.sum(total * itself.to(tl.float32), 0)
    squares = tl.where(squares < 0.0, 0.0, squares)  # NaN stays
    s = tl.sqrt(normals) / (tl.sqrt(raws) + NORM_EPS)
    if BY_TENSOR:
        s = tl.full((BLOCK_C,), 1.0, tl.float32)
    tl.store(scale + c, s, mask=c < count)
    programs = tl.num_programs(0)
    tl.store(sums + tl.program_id(0), tl.sum(normals, 0))
    tl.store(sums + programs + tl.program_id(0), tl.sum(raws, 0))
    tl.store(sums + 2 * programs + tl.program_id(0), tl.sum(s * s * squares, 0))
    tl.debug_barrier()  # all threads of the program have written
    if tl.atomic_add(finished, 1, sem="acq_rel") == programs - 1:
        _finish(
            sums, programs, phi, counts, scalars, numbers, lr, root_alpha, log_b1, log_b2, gamma, floor, decay,
            BY_TENSOR, BLOCK,
        )  # fmt: skip


@triton.jit
def _commit(r, mean, square, size, b1, c1, b2, c2, BLOCK: tl.constexpr):
    """This program's share of M and V of step (3)."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for start in range(program * BLOCK, size, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        x = tl.load(r + i, mask=inside, other=0.0)
        tl.store(mean + i, b1 * tl.load(mean + i, mask=inside, other=0.0) + c1 * x, mask=inside)
        tl.store(square + i, b2 * tl.load(square + i, mask=inside, other=0.0) + c2 * x * x, mask=inside)


@triton.jit
def _product(
    d, d_token, d_row, x, x_token, x_column, i, j, m, n, tokens,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of D^T X, fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        left = _left(d, d_token, d_row, t, i, m, tokens, EVEN)
        total = dot(left, _right(x, x_token, x_column, t, j, n, tokens, EVEN), total, WIDEN)
    return total


@triton.jit
def _left(d, d_token, d_row, t, i, m, tokens, EVEN: tl.constexpr):
    """A tile of D^T."""
    inside = t[None, :] < tokens
    if not EVEN:
        inside = inside & (i[:, None] < m)
    return tl.load(
        d + t[None, :].to(tl.int64) * d_token + i[:, None].to(tl.int64) * d_row, mask=inside, other=0.0
    )


@triton.jit
def _right(x, x_token, x_column, t, j, n, tokens, EVEN: tl.constexpr):
    """A tile of X."""
    inside = t[:, None] < tokens
    if not EVEN:
        inside = inside & (j[None, :] < n)
    return tl.load(
        x + t[:, None].to(tl.int64) * x_token + j[None, :].to(tl.int64) * x_column, mask=inside, other=0.0
    )


@triton.jit(do_not_specialize=["key0", "key1", "seed", "pairs", "run"])
def write(
    weight, row_stride, column_stride,  # (m, n), any strides
    x, x_token, x_column, d, d_token, d_row,  # (T, n) and (T, m), any strides
    scale, scalars, counts, key0, key1, seed,
    r, mean, square, moments, b1, c1, b2, c2,  # R, M and V, of `moments` elements each
    m, n, pairs, tokens, run,  # `pairs` of columns
    BY_ROW: tl.constexpr, STOCHASTIC: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """W <- round((W - step D^T X scaled) * keep): one product per tile, accumulated in fp32, rounded once. A program
    has `run` tiles below one another. And M and V of step (3). Nothing, if the update was stopped.

    `EVEN`: blocks divide the weight. `WHOLE`: a block takes all tokens, so X is loaded once for all tiles. `FETCH`: the
    next tile of W is loaded while this one is worked on.
    """
    if tl.load(scalars + 2) > 0.0:
        step = tl.load(scalars)
        keep = tl.load(scalars + 1)
        # `channels` has already counted this step, so its number from 0 is one less.
        a, b = subkey(key0, key1, ROUNDING_STREAM, tl.load(counts) - 1, seed)
        j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        first = tl.program_id(1) * run
        last = tl.minimum(first + run, tl.cdiv(m, BLOCK_M))
        column = weight + j[None, :].to(tl.int64) * column_stride
        kind: tl.constexpr = weight.dtype.element_ty
        i = first * BLOCK_M + tl.arange(0, BLOCK_M)
        if BY_ROW:
            s = tl.load(scale + i, mask=i < m, other=0.0) * step
        else:
            s = tl.load(scale + j, mask=j < n, other=0.0) * step
        if FETCH:
            inside = (i[:, None] < m) & (j[None, :] < n)
            upcoming = tl.load(column + i[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0)
        t = tl.arange(0, BLOCK_T)
        if WHOLE:
            right = _right(x, x_token, x_column, t, j, n, tokens, EVEN)
        for tile in range(first, last):
            i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            following = i + BLOCK_M
            place = column + i[:, None].to(tl.int64) * row_stride
            inside = (i[:, None] < m) & (j[None, :] < n)
            if FETCH:
                old = upcoming
                ahead = following[:, None] < last * BLOCK_M
                if not EVEN:
                    ahead = ahead & (following[:, None] < m) & (j[None, :] < n)
                upcoming = tl.load(
                    column + following[:, None].to(tl.int64) * row_stride, mask=ahead, other=0.0
                )
            elif EVEN:
                old = tl.load(place)
            else:
                old = tl.load(place, mask=inside, other=0.0)
            if WHOLE:
                total = dot(_left(d, d_token, d_row, t, i, m, tokens, EVEN), right, None, WIDEN)
            else:
                total = _product(
                    d, d_token, d_row, x, x_token, x_column, i, j, m, n, tokens,
                    EVEN, WIDEN, BLOCK_M, BLOCK_N, BLOCK_T,
                )  # fmt: skip
            if BY_ROW:
                value = (old.to(tl.float32) - total * s[:, None]) * keep
                s = tl.load(scale + following, mask=following < m, other=0.0) * step
            else:
                value = (old.to(tl.float32) - total * s[None, :]) * keep
            if STOCHASTIC and (kind == tl.bfloat16 or kind == tl.float16):
                index = i[:, None].to(tl.uint32) * pairs.to(tl.uint32) + pair[None, :].to(tl.uint32)
                word = words(index, a, b)
                random = tl.join(word & tl.full((), 0xFFFF, tl.uint32), word >> 16)
                rounded = round_to(value, tl.reshape(random, (BLOCK_M, BLOCK_N)), kind)
            else:
                rounded = value.to(kind)
            if EVEN:
                tl.store(place, rounded)
            else:
                tl.store(place, rounded, mask=inside)
        _commit(r, mean, square, moments, b1, c1, b2, c2, 1024)
