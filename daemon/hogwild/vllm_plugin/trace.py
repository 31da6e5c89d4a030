"""Learns where each checkpoint tensor went by watching the copies that vLLM's own `load_weights` makes."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild.arena.memory import Held
from hogwild.layout import Region
from hogwild.vllm_plugin.pieces import Piece, merge

_KEEPS = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
"""Operators that give a tensor of the same shape and elements in other memory."""


@dataclass(frozen=True)
class _Source:
    """Memory that holds a box of a checkpoint tensor: the tensor itself, or a copy made on the way.

    Attributes:
        name, shape: the checkpoint tensor.
        start: of the box, along each of the tensor's axes.
        size: of the box.
        stride: of this memory, in elements, along each of the tensor's axes.
        first, end: its addresses.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    end: int


class CopyTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While active, notes each copy from a checkpoint tensor into the arena, and everything else that is written there.

    A checkpoint tensor is known by the address range it was read into; the newest tensor wins where an older one has
    been freed. A copy may take a box of it, transposed or not, directly or by way of clones. A tensor is mapped when
    the boxes make up all of it and lie in the arena as one strided view; its region then has the checkpoint's own
    shape. What is rewritten after it was copied is not mapped: it is no longer the checkpoint's.
    """

    def __init__(self, segment: Held) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._segment = segment
        self._sources: dict[str, _Source] = {}  # checkpoint tensors, oldest first
        self._copies: deque[_Source] = deque(maxlen=_COPIES)  # of them, made on the way, newest first
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, dict[Piece, int]] = {}  # piece -> when it was copied
        self._rewritten: list[tuple[int, int, str, int]] = []  # first, end, by which operator, when
        self._moved: dict[str, str] = {}  # name -> why it cannot be mapped, whatever else is copied
        self._now = 0

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass checkpoint tensors through, noting where each one was read into."""
        for name, tensor in weights:
            shape = tuple(tensor.shape)
            self._shapes[name] = shape
            self._sources.pop(name, None)
            self._sources[name] = _source(name, shape, (0,) * len(shape), tensor, tuple(range(tensor.ndim)))
            yield name, tensor

    def result(self) -> tuple[dict[str, Region], dict[str, str]]:
        """(checkpoint name -> region, checkpoint name -> why it has none)."""
        mapped, unmapped = {}, {}
        for name, shape in self._shapes.items():
            pieces = self._pieces.get(name, {})
            if name in self._moved:
                unmapped[name] = self._moved[name]
            elif not pieces:
                unmapped[name] = "vLLM did not copy it as it is into a parameter"
            elif isinstance(found := merge(list(pieces), shape), str):
                unmapped[name] = found
            elif by := self._rewriter(found, max(pieces.values())):
                unmapped[name] = (
                    f"vLLM computes with it after loading ({by}): what it keeps are other numbers"
                )
            else:
                mapped[name] = found
        return mapped, unmapped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._now += 1
        if isinstance(result, torch.Tensor) and not any(out.alias_info for out in func._schema.returns):
            self._forget(result)
        if func is torch.ops.aten.copy_.default:
            self._copied(args[0], args[1])
        elif func in _KEEPS:
            self._kept(result, args[0])
        elif func is torch.ops.aten.cat.default:
            self._joined(result, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        elif func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in given if isinstance(given, list | tuple) else [given]:
                        if isinstance(tensor, torch.Tensor):
                            self._rewrite(tensor, str(func).removeprefix("aten."))
            if isinstance(out := kwargs.get("out"), torch.Tensor):
                self._rewrite(out, str(func).removeprefix("aten."))
        return result

    # --- what was seen -----------------------------------------------------------------------------------------------

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        offset = target.data_ptr() - self._segment.base
        if not 0 <= offset < self._segment.nbytes:
            self._kept(target, source)
            return
        if target.data_ptr() == source.data_ptr() and target.stride() == source.stride():
            return  # onto itself
        found = self._find(source)
        if found is None or not target.numel():
            self._rewrite(target, "copy_")
            return
        box = _box(found, source)
        if box is None or target.shape != source.shape:
            self._moved[found.name] = "vLLM splits or reshapes it while loading"
            return
        start, size, axes = box
        stride = tuple(None if axis is None else target.stride(axis) for axis in axes)
        piece = Piece(start, size, offset, stride, str(target.dtype).removeprefix("torch."))
        self._pieces.setdefault(found.name, {})[piece] = self._now

    def _kept(self, result: torch.Tensor, source: torch.Tensor) -> None:
        """`result` has the elements of `source`, in memory of its own."""
        found = self._find(source)
        if found is None or result.shape != source.shape:
            return
        box = _box(found, source)
        if box is None:
            self._moved[found.name] = "vLLM splits or reshapes it while loading"
        else:
            self._copies.appendleft(_source(found.name, found.shape, box[0], result, box[2]))

    def _joined(self, result: torch.Tensor, parts: Iterable[torch.Tensor], dim: int) -> None:
        """`result` holds the `parts`, one after the other along `dim`."""
        begun = 0
        for part in parts:
            if part.numel():
                self._kept(result.narrow(dim, begun, part.shape[dim]), part)
                begun += part.shape[dim]

    def _rewrite(self, target: torch.Tensor, by: str) -> None:
        offset = target.data_ptr() - self._segment.base
        if target.numel() and 0 <= offset < self._segment.nbytes and target.dtype in _FLOATS:
            self._rewritten.append((offset, Region.of(target, self._segment.base).end, by, self._now))

    # --- what is known -----------------------------------------------------------------------------------------------

    def _forget(self, fresh: torch.Tensor) -> None:
        """Memory that an operator has just made is no longer the copy that was there before."""
        first = fresh.data_ptr()
        end = first + fresh.nbytes
        for copy in [copy for copy in self._copies if first < copy.end and copy.first < end]:
            self._copies.remove(copy)

    def _find(self, tensor: torch.Tensor) -> _Source | None:
        """The newest memory that this tensor looks at."""
        # An address says enough: those of a GPU and of its host do not overlap.
        if tensor.device.type == "meta" or not tensor.numel():
            return None
        address = tensor.data_ptr()
        known = itertools.chain(self._copies, reversed(self._sources.values()))
        return next((source for source in known if source.first <= address < source.end), None)

    def _rewriter(self, region: Region, since: int) -> str:
        """The operator that wrote into a region after it was filled, or ""."""
        for first, end, by, when in self._rewritten:
            if when > since and first < region.end and region.offset < end:
                return by
        return ""


_FLOATS = {torch.bfloat16, torch.float16, torch.float32}
_COPIES = 256
"""How many copies of checkpoint tensors are remembered: they are used at once, or not at all."""


def _source(
    name: str,
    shape: tuple[int, ...],
    start: tuple[int, ...],
    tensor: torch.Tensor,
    axes: tuple[int | None, ...],
) -> _Source:
    """`tensor` holds the box that begins at `start`; `axes`: which of its axes is which of the checkpoint tensor's."""
    size = tuple(1 if axis is None else tensor.shape[axis] for axis in axes)
    stride = tuple(0 if axis is None else tensor.stride(axis) for axis in axes)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return _Source(name, shape, start, size, stride, first, first + (last + 1) * tensor.element_size())


def _box(
    source: _Source, view: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]] | None:
    """Which box of the checkpoint tensor a view of `source` is: start, size, and the view's axis for each of the
    tensor's.

    None for a view that is no box: one that splits or joins axes, or repeats elements.
    """
    left, odd = divmod(view.data_ptr() - source.first, view.element_size())
    start = list(source.start)
    for axis in sorted(range(len(start)), key=lambda a: -source.stride[a]):
        if source.size[axis] > 1 and source.stride[axis]:
            steps, left = divmod(left, source.stride[axis])
            start[axis] += steps
    if left or odd:
        return None
    axes: list[int | None] = [None] * len(start)
    for mine in range(view.ndim):
        if view.shape[mine] == 1:
            continue
        fitting = [
            axis for axis in range(len(start))
            if axes[axis] is None and source.size[axis] > 1 and source.stride[axis] == view.stride(mine)
            and start[axis] - source.start[axis] + view.shape[mine] <= source.size[axis]
        ]  # fmt: skip
        if not fitting:
            return None
        axes[fitting[0]] = mine
    size = tuple(1 if axis is None else view.shape[axis] for axis in axes)
    return tuple(start), size, tuple(axes)
