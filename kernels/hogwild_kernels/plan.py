"""Which form of the step is cheaper for a shape. Costs are in fp32 multiply-adds of a large matrix product.

The constants were fitted to `benchmarks/update.py` on a 2-core AVX512 machine; they are ratios, so other
machines shift them far less than the costs that they weigh, which grow as T m n, r T (m + n) and T^2 (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Form

LOW_PRECISION = 0.5
"""A multiply-add in bf16 relative to fp32, on CPUs with bf16 instructions."""

TILE_BYTES = 1024 * 1024
"""One tile of D^T X: stays in a core's cache between the product that writes it and the loop that reads
it."""

SMALL_BYTES = 2 * TILE_BYTES
"""A gradient matrix up to this size stays in cache too."""

FRESH_BYTES = 32 * 1024 * 1024
"""From this on the C library maps fresh pages for every allocation, and touching them costs more than the
arithmetic."""

GRAM_BLOCK = 128
"""Rows of a block of the symmetric Gram matrices; only blocks on and below the diagonal are computed."""

GRAM_CALLS = 4e6
"""The fixed cost of the calls that the factored form needs for |U|."""

ADVANTAGE = 1.08
"""Storing a gradient matrix must pay by more than this, unless it is no larger than that."""


@dataclass(frozen=True)
class Plan:
    form: Form  # "factored" or "plain"
    project_gradient: bool  # plain form only: R from G instead of from X and D


def choose(form: Form, m: int, n: int, tokens: int, rank: int, low_precision: bool) -> Plan:
    """The cheaper form; a `form` other than "auto" is taken as it is.

    factored   X and D projected, Gram matrices for |U|, tiles of D^T X
    plain      G once, stored; its channel norms read off; R from whichever is cheaper
    """
    rate = LOW_PRECISION if low_precision else 1.0
    size = m * n * (2 if low_precision else 4)
    project_factors = float(rank * tokens * (m + n))
    project_matrix = float(rank * m * n)
    product = rate * tokens * m * n
    gram = gram_share(tokens) * tokens * tokens * (m + n) + GRAM_CALLS
    store = (2.0 if size <= SMALL_BYTES else 6.0 if size < FRESH_BYTES else 45.0) * m * n
    factored = project_factors + gram + product
    plain = min(project_factors, project_matrix) + product + store
    if form == "auto":
        margin = 1.0 if size <= SMALL_BYTES else ADVANTAGE
        form = "plain" if factored > margin * plain else "factored"
    return Plan(form, project_gradient=form == "plain" and project_matrix < project_factors)


def gram_share(tokens: int) -> float:
    """The share of a T x T symmetric product that is computed in blocks."""
    blocks = max(1, -(-tokens // GRAM_BLOCK))
    return 0.5 * (1.0 + 1.0 / blocks)
