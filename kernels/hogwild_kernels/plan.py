"""Which form of the step is cheaper for a shape. Costs are in units of one fp32 multiply-add of a large
product."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Form

LOW_PRECISION = 0.5
"""A multiply-add in bf16 relative to fp32 (CPUs with AVX512-BF16 reach about twice the rate)."""

PASS = 40.0
"""Touching one stored gradient element once more (write, read back), in multiply-adds."""

ADVANTAGE = 1.08
"""The plain form stores a gradient matrix, so it is chosen only where it is faster by more than this."""


@dataclass(frozen=True)
class Plan:
    form: Form  # "factored" or "plain"
    project_gradient: bool  # plain form only: R from G instead of from X and D


def choose(form: Form, m: int, n: int, tokens: int, rank: int, low_precision: bool) -> Plan:
    """The cheaper form; `form` other than "auto" is taken as it is.

    factored   X and D projected, Gram matrices for |U|, tiles of D^T X
    plain      G once, stored; its channel norms read off; R from whichever is cheaper
    """
    rate = LOW_PRECISION if low_precision else 1.0
    project_factors = 1.0 * rank * tokens * (m + n)
    project_matrix = rate * rank * m * n
    product = rate * tokens * m * n
    gram = gram_share(tokens) * tokens * tokens * (m + n)
    factored = project_factors + gram + product
    plain = min(project_factors, project_matrix) + product + PASS * rate * m * n
    if form == "auto":
        form = "plain" if factored > ADVANTAGE * plain else "factored"
    return Plan(form, project_gradient=form == "plain" and project_matrix < project_factors)


GRAM_BLOCK = 128
"""Rows of a block of the symmetric Gram matrices; only blocks on and below the diagonal are computed."""


def gram_share(tokens: int) -> float:
    """The share of a T x T symmetric product that is computed in blocks."""
    blocks = max(1, -(-tokens // GRAM_BLOCK))
    return 0.5 * (1.0 + 1.0 / blocks)
