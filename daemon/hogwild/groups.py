"""Examples in a training step: one example may be several sequences (see `encoding.encode_chat`) and counts as one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hogwild.trainer import Encoded, Item, StepResult, Trainer


@dataclass(frozen=True)
class Group:
    """The sequences of one example.

    Attributes:
        items: a sequence each, weighted by its share of the example's trained tokens.
    """

    items: tuple[Item, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[Encoded],
        weight: float = 1.0,
        context: Literal["frozen", "full"] | None = None,
    ) -> "Group":
        counts = [sum(part.trained) for part in parts]
        shares = [weight * count / sum(counts) for count in counts]
        return cls(tuple(Item(part, share, context) for part, share in zip(parts, shares, strict=True)))

    @property
    def ids(self) -> list[int]:
        """The last sequence, which holds the whole conversation: (L,) token ids."""
        return list(self.items[-1].encoded.ids)

    @property
    def tokens(self) -> int:
        """Trained ones."""
        return sum(sum(item.encoded.trained) for item in self.items)

    def loss(self, trainer: Trainer) -> float:
        """With the weights as they are now, nats a trained token."""
        return self.together([trainer.loss(item.encoded) for item in self.items])

    def together(self, losses: Sequence[float]) -> float:
        """The loss of the example, nats a trained token, from the losses of its sequences."""
        counts = [sum(item.encoded.trained) for item in self.items]
        return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def flat(groups: Sequence[Group]) -> list[Item]:
    """What `Trainer.step` takes, so that its mean over the items is the mean over the examples."""
    items = [item for group in groups for item in group.items]
    scale = len(items) / len(groups) if groups else 1.0
    return items if scale == 1 else [replace(item, weight=item.weight * scale) for item in items]


def regroup(groups: Sequence[Group], result: StepResult) -> list[tuple[float, int]]:
    """Of each example of a step, in order: its loss before the update, nats a trained token, and its trained tokens."""
    found, at = [], 0
    for group in groups:
        part = slice(at, at := at + len(group.items))
        found.append((group.together(result.losses[part]), sum(result.tokens[part])))
    return found
