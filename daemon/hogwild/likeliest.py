"""What a model thought of each next token, in short: its likeliest few, and all others together.

Where a text that the model wrote itself is replayed, one token of it is one draw from a whole distribution. Pulling
towards the distribution says more than pulling towards the draw, and says nothing at all while the model has not
moved: plain likelihood goes on learning its own samples by heart.
"""

from dataclasses import dataclass

import torch

from hogwild.streams import put

COUNT = 8


@dataclass(frozen=True)
class Likeliest:
    """Of T positions the K likeliest tokens."""

    ids: torch.Tensor  # (T, K) int64
    logs: torch.Tensor  # (T, K) float32: their log-probabilities, nats

    @staticmethod
    def of(logits: torch.Tensor, count: int = COUNT) -> "Likeliest":
        """From logits (T, V)."""
        logs, ids = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1] - 1), -1)
        return Likeliest(ids, logs)

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """(T,) nats: Kullback-Leibler divergence of what `logits` (T, V) say from what was thought, where all tokens
        that are not among the likeliest count as one."""
        logits = logits.float()
        ids, logs = put(self.ids, logits.device), put(self.logs, logits.device)
        total = logits.logsumexp(-1, keepdim=True)
        now = logits.gather(-1, ids) - total
        rest_now = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - total[:, 0]
        rest = (1 - logs.exp().sum(-1)).clamp_min(1e-6)
        return (logs.exp() * (logs - now)).sum(-1) + rest * (rest.log() - rest_now)
