"""A step's examples as work for the model: what is context, what is trained, and what goes through together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from hogwild.context import Segment, State
from hogwild.likeliest import Likeliest

MERGED_CONTEXT = 64
"""Tokens of the longest context that goes through together with the trained tokens, as constants, where that gives the
same gradients: one pass over few tokens costs less than two."""


class Encoded(Protocol):
    """An example as tokens: what `examples.encode` makes."""

    @property
    def ids(self) -> Sequence[int]: ...  # (L,) token ids
    @property
    def trained(self) -> Sequence[bool]: ...  # (L,) is this token's prediction trained?


@dataclass(frozen=True)
class Item:
    """One example of a training step.

    Attributes:
        encoded: its tokens, and which of them are trained.
        weight: how much its loss counts; negative: unlearn.
        context: "frozen" or "full" for this example alone; None: as the trainer is configured.
        likeliest: of its trained tokens: its loss is then the divergence from this, not the likelihood of the tokens.
    """

    encoded: Encoded
    weight: float = 1.0
    context: Literal["frozen", "full"] | None = None
    likeliest: Likeliest | None = None


@dataclass
class Work:
    """One item, cut at the first token that predicts a trained one.

    Attributes:
        index: its place among the step's items.
        weight: of its loss.
        context: tokens that are read beforehand, without gradient.
        ids: the tokens after them, but for the last, which predicts nothing.
        targets: tokens that are trained.
        places: of each target, the token of `ids` that predicts it.
        constant: of `ids`, whether gradients stop at it; empty: they stop nowhere.
        after: the state behind the context, once it is read.
        likeliest: see `Item`.
    """

    index: int
    weight: float
    context: list[int]
    ids: list[int]
    targets: list[int]
    places: list[int]
    constant: list[bool]
    after: State | None = None
    likeliest: Likeliest | None = None

    @property
    def segment(self) -> Segment:
        return Segment(self.ids, self.after)


def cut(index: int, item: Item, context: Literal["frozen", "full"], merge: bool, shortest: int = 1) -> Work:
    """`merge`: let a short context go through with the trained tokens. `shortest`: leave that many tokens after a
    context, if need be by the last of its own, as constants."""
    ids = list(item.encoded.ids)
    predicts = list(item.encoded.trained[1:])  # of each token but the last
    start = predicts.index(True) if context == "frozen" else 0
    start = max(0, min(start, len(predicts) - shortest))
    if merge and start <= MERGED_CONTEXT:
        start = 0
    places = [place for place, wanted in enumerate(predicts[start:]) if wanted]
    constant = [not wanted for wanted in predicts[start:]]
    return Work(
        index,
        item.weight,
        context=ids[:start],
        ids=ids[start:-1],
        targets=[ids[start + place + 1] for place in places],
        places=places,
        constant=constant if context == "frozen" and any(constant) else [],
        likeliest=item.likeliest,
    )


def packs(works: Sequence[Work], budget: int) -> list[list[Work]]:
    """Group work so that each group has at most `budget` tokens, or is a single one that has more.

    The longest first, each into the first group that has room. Nothing is ever split: the gradient of a trained token
    reaches every trained token before it.
    """
    groups: list[list[Work]] = []
    room: list[int] = []
    for work in sorted(works, key=lambda w: -len(w.ids)):  # stable, so that a seed repeats
        length = len(work.ids)
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            groups.append([work])
            room.append(budget - length)
        else:
            groups[place].append(work)
            room[place] -= length
    return groups
