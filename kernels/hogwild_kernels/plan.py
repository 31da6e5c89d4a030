"""Which form of the step is cheaper for a shape. Costs are in fp32 multiply-adds of a large matrix product.

The constants were fitted to `benchmarks/update.py` on a 2-core machine with AMX, with and without its use and that of
AVX512; they are ratios, so other machines shift them far less than the costs that they weigh, which grow as T m n,
r T (m + n) and T^2 (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Form

AMX, AVX512_BF16 = 0.2, 0.5
"""A multiply-add in bf16 relative to fp32, on CPUs with these instructions."""

TILE_BYTES = 1024 * 1024
"""One tile of D^T X: stays in a core's cache between the product that writes it and the loop that reads
it."""

LOW_TILE_BYTES = 2 * TILE_BYTES
"""The same in bf16, whose product takes longer to lay out X than to multiply a small tile."""

TILE_COLUMNS = 2048
"""Even. More columns of X are laid out again for every few rows."""

SMALL_BYTES = 4 * TILE_BYTES
"""A gradient matrix up to this size stays in cache too."""

FRESH_BYTES = 32 * 1024 * 1024
"""From this on the C library maps fresh pages for every allocation, and touching them costs more than the
arithmetic."""

EXACT_TOKENS = 64
"""With fewer tokens than this only tiles of D^T X are in bf16: all other products cost next to nothing then."""

GRAM_BLOCK = 128
"""Rows of a block of the symmetric Gram matrices; only blocks on and below the diagonal are computed."""

GRAM_CALLS = 4e6
"""The fixed cost of the calls that the factored form needs for |U|."""

ADVANTAGE = 1.15
"""Storing a gradient matrix must pay by more than this, unless it is no larger than SMALL_BYTES, or than twice what X
and D take."""


@dataclass(frozen=True)
class Plan:
    form: Form  # "factored" or "plain"
    project_gradient: bool  # plain form only: R from G instead of from X and D


def choose(
    form: Form, m: int, n: int, tokens: int, rank: int, low_precision: bool, low_cost: float = AMX
) -> Plan:
    """The cheaper form; a `form` other than "auto" is taken as it is.

    factored   X and D projected, Gram matrices for |U|, tiles of D^T X
    plain      G once, stored; its channel norms read off; R from whichever is cheaper
    """
    rate = low_cost if low_precision else 1.0
    others = rate if tokens >= EXACT_TOKENS else 1.0
    size = m * n * (2 if low_precision else 4)
    project_factors = others * rank * tokens * (m + n)
    project_matrix = others * rank * m * n
    product = rate * tokens * m * n
    gram = others * gram_share(tokens) * tokens * tokens * (m + n) + GRAM_CALLS
    store = 2.0 * m * n if size <= SMALL_BYTES else 1.5 * size if size < FRESH_BYTES else 45.0 * m * n
    factored = project_factors + gram + product
    plain = min(project_factors, project_matrix) + product + store
    if form == "auto":
        little = size <= SMALL_BYTES or m * n <= 2 * tokens * (m + n)
        margin = 1.0 if little else ADVANTAGE
        form = "plain" if factored > margin * plain else "factored"
    return Plan(form, project_gradient=form == "plain" and project_matrix < project_factors)


def gram_share(tokens: int) -> float:
    """The share of a T x T symmetric product that is computed in blocks."""
    blocks = max(1, -(-tokens // GRAM_BLOCK))
    return 0.5 * (1.0 + 1.0 / blocks)
