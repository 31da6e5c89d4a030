"""A step's examples as work for the model: what is context, what is trained, and what goes through together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from hogwild.context import Segment, State
from hogwild.gpu_memory import MERGED_CONTEXT
from hogwild.likeliest import Likeliest

T = TypeVar("T")


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


def packs(works: Sequence[T], sizes: Callable[[T], Sequence[int]], budgets: Sequence[int]) -> list[list[T]]:
    """Group work so that no sum of a group's sizes is above its budget, or it is a single one that is.

    The longest first, each into the first group that has room. Nothing is ever split: the gradient of a trained token
    reaches every trained token before it.

    Args:
        sizes: of one, as many as there are budgets; the first one says what is longer.
    """
    groups: list[list[T]] = []
    rooms: list[list[int]] = []
    for work in sorted(works, key=lambda one: -sizes(one)[0]):  # stable, so that a seed repeats
        needs = sizes(work)
        place = next(
            (i for i, free in enumerate(rooms) if all(n <= f for n, f in zip(needs, free, strict=True))), None
        )
        if place is None:
            groups.append([work])
            rooms.append([budget - need for budget, need in zip(budgets, needs, strict=True)])
        else:
            groups[place].append(work)
            rooms[place] = [free - need for free, need in zip(rooms[place], needs, strict=True)]
    return groups


def parts(passes: Sequence[list[Work]], may_wait: Callable[[int], int]) -> list[list[list[Work]]]:
    """Which passes end in one update: all of a step, unless what waits for it would take too much memory.

    Args:
        may_wait: tokens that may wait beside a last pass of so many tokens.

    Returns:
        The parts, each of passes from the shortest to the longest, which is the one that does not wait.
    """
    found: list[list[list[Work]]] = []
    room = 0
    for one in sorted(passes, key=_tokens, reverse=True):
        tokens = _tokens(one)
        if not found or tokens > room:
            found.append([])
            room = may_wait(tokens)
        else:
            room -= tokens
        found[-1].insert(0, one)
    return found


def runs(passes: Sequence[list[Work]], context: int) -> list[list[list[Work]]]:
    """Neighbouring passes with at most `context` tokens of context together, or a single one that has more."""
    found: list[list[list[Work]]] = []
    room = 0
    for one in passes:
        tokens = sum(len(work.context) for work in one)
        if not found or tokens > room:
            found.append([])
            room = context
        room -= tokens
        found[-1].append(one)
    return found


def _tokens(one: list[Work]) -> int:
    return sum(len(work.ids) for work in one)
