"""The loss of one sequence, as it is differentiated."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 24
"""Elements of logits that are worked on in fp32 at a time."""


def negative_log_likelihoods(
    logits: Tensor,  # (T, V) of any floating type
    targets: Tensor,  # (T,) int64 token ids
) -> Tensor:
    """(T,) fp32, nats: of each target. As `torch.nn.functional.cross_entropy(logits.float(), targets)`, element by
    element, but fp32 copies of the logits exist for a piece of them at a time: of long answers and large vocabularies
    they would be the larger part of what a step takes.
    """
    return _Likelihoods.apply(logits, targets)  # type: ignore[no-untyped-call,no-any-return]


class _Likelihoods(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.cat([logits[rows].float().logsumexp(-1) for rows in _pieces(logits)])
        ctx.save_for_backward(logits, targets, total)
        return total - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _pieces(logits):
            softmax = logits[rows].to(torch.float32, copy=True).sub_(total[rows, None]).exp_()
            softmax.scatter_add_(1, targets[rows, None], softmax.new_full((len(softmax), 1), -1.0))
            found[rows] = softmax.mul_(gradient[rows, None])
        return found, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    size = max(1, PIECE // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def bounded_loss(
    nll: torch.Tensor,  # (T,) fp32: negative log-likelihood of each trained token, nats
    weight: float,  # factor; negative: unlearn
    limit: float,  # nats
) -> torch.Tensor:
    """`weight` times the mean of `nll`; where that unlearns, a token counts until its own `nll` reaches `limit`.

    Ascending on a negative log-likelihood has no end: the gradient of -log p with respect to the logits does not
    fade as p goes to 0, so the logit would be pushed down for ever and the model with it. A token that is unlikely
    enough has been unlearned: it gives no gradient any more, and comes back into play when it is learned again.
    Token by token, because one that runs away would hide in a mean.

    Returns:
        () fp32.
    """
    if weight >= 0:
        return weight * nll.mean()
    return weight * nll.clamp_max(limit).mean()


def unlearning_limit(configured: float, vocabulary: int) -> float:
    """`training.unlearn_until_loss`, but at most what a model that knows nothing has: ln(vocabulary), nats."""
    return min(configured, math.log(vocabulary))
