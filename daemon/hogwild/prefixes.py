"""Which contexts have a beginning in common, so that it is read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

OVERHEAD_TOKENS = 32
"""A pass over few tokens costs about as much as one over this many: a beginning shorter than that over all texts that
could share it is read again for each of them."""


@dataclass
class Node:
    """A stretch of tokens, read after its parent's.

    Attributes:
        parent: index of the node before it in the plan; None: these tokens are the first.
        ids: its tokens.
    """

    parent: int | None
    ids: Sequence[int]


@dataclass
class Plan:
    """What to read, parents before children.

    Attributes:
        nodes: the stretches.
        ends: of each text, the node that its last token is in; None for an empty text.
    """

    nodes: list[Node] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)

    def levels(self) -> list[list[int]]:
        """Nodes that can be read together: those without a parent, their children, and so on."""
        depth: list[int] = []
        for node in self.nodes:
            depth.append(0 if node.parent is None else depth[node.parent] + 1)
        return [[i for i, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]


def plan(texts: Sequence[list[int]]) -> Plan:
    """Split texts so that each shared beginning that is worth it is a stretch of its own."""
    found = Plan(ends=[None] * len(texts))

    def read(parent: int | None, ids: Sequence[int]) -> int:
        found.nodes.append(Node(parent, ids))
        return len(found.nodes) - 1

    def branch(parent: int | None, begun: int, group: list[int]) -> None:
        common = _common([texts[i] for i in group])
        alike = all(len(texts[i]) == common for i in group)
        if common > begun and (alike or (len(group) - 1) * (common - begun) > OVERHEAD_TOKENS):
            parent, begun = read(parent, texts[group[0]][begun:common]), common
        if alike:
            for i in group:
                found.ends[i] = parent
            return
        by_next: dict[int | None, list[int]] = {}
        for i in group:
            by_next.setdefault(texts[i][common] if len(texts[i]) > common else None, []).append(i)
        for part in by_next.values():
            branch(parent, begun, part)

    if texts:
        branch(None, 0, list(range(len(texts))))
    return found


def _common(texts: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with."""
    low, high = min(texts), max(texts)  # all others lie between these two, so they share what these share
    for place, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return place
    return min(len(low), len(high))
