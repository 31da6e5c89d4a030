"""The loss of one sequence, as it is differentiated."""

import math

import torch


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
