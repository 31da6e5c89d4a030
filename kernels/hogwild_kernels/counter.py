"""The counter-based random generator: every random number is a pure function of (seed, weight name,
counter, index).

Nothing is ever stored or carried from call to call, so a thread, a GPU block or a test can compute any
number of the stream alone. All arithmetic is on 32-bit words, so that torch, Numba and Triton give the same
bits. The two mixing multipliers and shifts are those of Chris Wellons' `lowbias32` (public domain), with
the second key injected between the rounds.

    words(i; a, b) = round2(round1(i + a) ^ b)

    rounding    a, b = subkey(name key, ROUNDING, step, caller's seed)      i = row * ceil(n / 2) + column // 2
                16 bits an element: the lower half of a word in even columns, the upper half in odd ones
    projection  a, b = subkey(name key, PROJECTION, epoch, 0)               i = row * columns + column of P
"""

from __future__ import annotations

import functools
import hashlib
import struct
from statistics import NormalDist
from typing import TypeVar

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MIX1 = 0x7FEB352D
MIX2 = 0x846CA68B

PROJECTION = 0x50524F4A
ROUNDING = 0x524F554E

TABLE_BITS = 11
TABLE_SIZE = 1 << TABLE_BITS
TABLE_ONE = 1 << 16
"""Fixed-point one of the Gaussian table: sums of two entries stay exact in fp32."""


Word = TypeVar("Word", int, Tensor)
"""A 32-bit word: a Python integer, or an int64 tensor where the step count is known only on the device."""


def mix32(x: Word) -> Word:
    """`lowbias32` on one word."""
    x = x & MASK
    x = x ^ (x >> 16)
    x = (x * MIX1) & MASK
    x = x ^ (x >> 15)
    x = (x * MIX2) & MASK
    return x ^ (x >> 16)


def name_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words for one weight. A hash of the name: two weights of the same shape never share a
    projection."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def subkey(key: tuple[int, int], purpose: int, counter: Word, seed: int = 0) -> tuple[Word, Word]:
    """The pair (a, b) of one stream. Only 32-bit words, because the Triton kernel derives it from a
    device-side step."""
    inner = mix32((mix32(counter + purpose) + seed) & MASK)
    a = mix32(inner ^ key[0])
    b = mix32((a + key[1]) & MASK)
    return a, b


def words(index: Tensor, a: int | Tensor, b: int | Tensor) -> Tensor:
    """32 random bits for each counter in `index` (int64, any shape), as int64 in [0, 2^32)."""
    x = (index + a) & MASK
    x = x ^ (x >> 16)
    x = ((x * MIX1) & MASK) ^ b
    x = x ^ (x >> 15)
    x = (x * MIX2) & MASK
    return x ^ (x >> 16)


def rounding_bits(
    rows: int | Tensor,  # how many from `first`; or their numbers, int64
    columns: int,
    a: int | Tensor,
    b: int | Tensor,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What rounds these rows of a matrix with so many columns: (rows, columns) int64 in [0, 2^16)."""
    if isinstance(rows, int):
        rows = torch.arange(first, first + rows, device=device)
    pairs = -(-columns // 2)
    w = words(rows[:, None] * pairs + torch.arange(pairs, device=rows.device), a, b)
    return torch.stack((w & 0xFFFF, w >> 16), -1).view(len(rows), 2 * pairs)[:, :columns]


@functools.cache
def gaussian_table() -> Tensor:
    """2,048 quantiles of N(0, 1) in fixed point, int32, symmetric and scaled to variance one.

    log and cos differ between devices in the last bit; table look-ups and integer sums do not. The sum of two
    independent entries has 4 million levels and reaches 4.9 standard deviations.
    """
    normal = NormalDist()
    half = TABLE_SIZE // 2
    upper = [normal.inv_cdf((half + i + 0.5) / TABLE_SIZE) for i in range(half)]
    gain = (half / sum(z * z for z in upper)) ** 0.5
    fixed = [round(z * gain * TABLE_ONE) for z in upper]
    return torch.tensor([-z for z in reversed(fixed)] + fixed, dtype=torch.int32)


@functools.cache
def gaussian_gain(rank: int) -> float:
    """What turns a sum of two table entries into an N(0, 1/rank) entry of P."""
    (fp32,) = struct.unpack("f", struct.pack("f", (2.0 * rank) ** -0.5 / TABLE_ONE))
    return float(fp32)


def projection(
    key: tuple[int, int],  # name_key(seed, name)
    epoch: int,  # step // gap
    rank: int,
    size: int,  # the dimension that is projected away: min(m, n)
    device: torch.device | str = "cpu",
) -> Tensor:
    """P (rank, size) fp32 with entries N(0, 1/rank), step 1 of the algorithm; the same bits on every backend.

    Where there is nothing to project away, the identity: of a router's or a gate's few rows a random square matrix may
    shrink the gradient to next to nothing, and the scales of step 4, which divide by its length, move the weight many
    times as far as `lr` says.

    The published code holds P as (size, rank) when m < n; here it is (rank, size) in both orientations.
    """
    if rank == size:
        return torch.eye(rank, device=device)
    a, b = subkey(key, PROJECTION, epoch)
    w = words(torch.arange(rank * size, device=device), a, b)
    table = gaussian_table().to(device)
    total = table[w & (TABLE_SIZE - 1)] + table[w >> (32 - TABLE_BITS)]
    return (total.float() * gaussian_gain(rank)).view(rank, size)
