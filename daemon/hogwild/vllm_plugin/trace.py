"""Learns where each checkpoint tensor went by watching the copies that vLLM's own `load_weights` makes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild.arena.memory import Segment
from hogwild.layout import Region


class CopyTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While active, notes each copy from a checkpoint tensor into the arena.

    A checkpoint tensor is known by the address range it was read into; the newest tensor wins where an older one has
    been freed. A tensor is mapped when exactly one copy took all of it; its region then has the checkpoint's own
    shape, whatever transposition lay between.
    """

    def __init__(self, segment: Segment) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._segment = segment
        self._sources: dict[
            str, tuple[torch.Size, tuple[int, ...], int, int]
        ] = {}  # shape, stride, first, end
        self.regions: dict[str, list[Region]] = {}
        self.partial: dict[str, str] = {}

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass checkpoint tensors through, noting where each one was read into."""
        for name, tensor in weights:
            first = tensor.data_ptr()
            self._sources.pop(name, None)
            self._sources[name] = (tensor.shape, tensor.stride(), first, first + tensor.nbytes)
            yield name, tensor

    def result(self) -> tuple[dict[str, Region], dict[str, str]]:
        """(checkpoint name -> region, checkpoint name -> why it has none)."""
        mapped, unmapped = {}, {}
        for name in self._sources:
            regions = self.regions.get(name, [])
            if name in self.partial:
                unmapped[name] = self.partial[name]
            elif len(set(regions)) == 1:
                mapped[name] = regions[0]
            elif regions:
                unmapped[name] = f"vLLM keeps it in {len(set(regions))} places"
            else:
                unmapped[name] = "vLLM did not copy it as it is into a parameter"
        return mapped, unmapped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return result

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        offset = target.data_ptr() - self._segment.base
        if not 0 <= offset < self._segment.nbytes or source.device.type != "cpu":
            return
        address = source.data_ptr()
        for name, (shape, stride, first, end) in reversed(self._sources.items()):
            if first <= address < end:
                order = _order_of(source.stride(), stride, source.shape, shape)
                if order is None or target.shape != source.shape:
                    self.partial[name] = "vLLM splits or reshapes it while loading"
                else:
                    region = Region.of(target.permute(order), self._segment.base)
                    self.regions.setdefault(name, []).append(region)
                return


def _order_of(
    stride: tuple[int, ...], wanted: tuple[int, ...], shape: torch.Size, wanted_shape: torch.Size
) -> tuple[int, ...] | None:
    """The permutation that turns a view of (shape, stride) back into (wanted_shape, wanted), or None."""
    if len(stride) != len(wanted):
        return None
    order: list[int] = []
    for size, step in zip(wanted_shape, wanted, strict=True):
        axes = [
            axis
            for axis in range(len(stride))
            if axis not in order and shape[axis] == size and (stride[axis] == step or size == 1)
        ]
        if not axes:
            return None
        order.append(axes[0])
    return tuple(order)
