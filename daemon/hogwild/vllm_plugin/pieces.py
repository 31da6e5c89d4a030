"""Pieces of a checkpoint tensor, each copied somewhere, put together into the one strided region that they make up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hogwild.layout import _DTYPES, Region


@dataclass(frozen=True)
class Piece:
    """A box of a checkpoint tensor, and where it went.

    Attributes:
        start, size: the box, in the checkpoint tensor's own axes.
        offset: of its first element, bytes from the start of the arena.
        stride: there, in elements, along each axis; None where the box is one wide, so that it says nothing.
        dtype: there.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    stride: tuple[int | None, ...]
    dtype: str


def merge(pieces: Sequence[Piece], shape: tuple[int, ...]) -> Region | str:
    """The region of a whole tensor of this shape; or, in words, why there is none."""
    pieces = list(dict.fromkeys(pieces))
    total = math.prod(shape)
    covered = sum(math.prod(piece.size) for piece in pieces)
    if covered > total or len({piece.start for piece in pieces}) < len(pieces):
        return f"vLLM keeps it in {len(pieces)} places"
    if covered < total:
        return "vLLM takes only a part of it"
    first = min(pieces, key=lambda piece: piece.start)
    itemsize = _DTYPES[first.dtype].itemsize if first.dtype in _DTYPES else 0
    if not itemsize or any(piece.dtype != first.dtype for piece in pieces):
        return f"vLLM keeps it as {', '.join(sorted({piece.dtype for piece in pieces}))}"
    strides = _strides(pieces, first, shape, itemsize)
    if strides is None or any(first.start):
        return f"vLLM keeps it in {len(pieces)} pieces that are no one strided view"
    return Region(first.offset, shape, strides, first.dtype)


def _strides(
    pieces: Sequence[Piece], first: Piece, shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...] | None:
    """The stride along each axis with which every piece lies where it lies; None if there is none."""
    found: list[int | None] = [None] * len(shape)
    for axis in range(len(shape)):
        known = {piece.stride[axis] for piece in pieces if piece.stride[axis] is not None}
        if len(known) > 1:
            return None
        found[axis] = known.pop() if known else None
    for _ in shape:  # each round may settle an axis that only the places of pieces tell
        for piece in pieces:
            apart = [axis for axis in range(len(shape)) if piece.start[axis] != first.start[axis]]
            unknown = [axis for axis in apart if found[axis] is None]
            if len(unknown) == 1:
                rest = sum(
                    (found[a] or 0) * (piece.start[a] - first.start[a]) for a in apart if a != unknown[0]
                )
                gap, odd = divmod(piece.offset - first.offset, itemsize)
                step, left = divmod(gap - rest, piece.start[unknown[0]] - first.start[unknown[0]])
                if odd or left or step < 0:
                    return None
                found[unknown[0]] = step
    dense = 1
    for axis in reversed(range(len(shape))):  # an axis of size one has no stride: the usual one
        if shape[axis] == 1 or found[axis] is None:
            if shape[axis] > 1:
                return None
            found[axis] = dense
        dense = max(dense, (found[axis] or 0) * shape[axis])
    strides = tuple(step or 0 for step in found)
    for piece in pieces:
        moved = sum((i - j) * step for i, j, step in zip(piece.start, first.start, strides, strict=True))
        if piece.offset != first.offset + moved * itemsize:
            return None
    return strides
