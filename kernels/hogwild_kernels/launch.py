"""Launching a Triton kernel again and again without Triton's own look at every argument.

`kernel[grid](...)` looks at each of its thirty arguments to find out which compiled form of the kernel it wants (is a
pointer aligned, is a number one, or a multiple of 16?), which takes longer than many of these kernels. `Prepared` looks
once, and launches that form from then on. Whoever keeps one answers for it that the arguments stay of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

Grid = tuple[int, int, int]

_ALIGNMENT = 256


class Prepared:
    """A kernel, its constants and its options, for arguments of one kind: the same dtypes and alignments, and the same
    integers wherever the kernel is compiled for their values (all but those that it names in `do_not_specialize`).

    Args:
        kernel: what `triton.jit` has made.
        constants: its `tl.constexpr` parameters, which come after all others, in their order.
        options: `num_warps` and the like.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self._kernel, self._options = kernel, options
        self._values = tuple(constants.values())
        self._compiled: Any = None

    def compile(self, grid: Grid, *arguments: Any) -> Any:
        """What Triton has compiled for arguments like these, without launching it."""
        return self._kernel.warmup(*arguments, *self._values, grid=grid, **self._options)

    def __call__(self, grid: Grid, stream: int | None, *arguments: Any) -> None:
        """Launch it on `stream`, as `stream_of` gives it, with all arguments that are no constants. Pointers are
        tensors the first time, and may be addresses afterwards."""
        if stream is None:
            self._kernel[grid](*arguments, *self._values, **self._options)
            return
        kernel = self._compiled
        if kernel is None:
            kernel = self.compile(grid, *arguments)
            kernel[grid]  # loads it, or says why not
            self._compiled = kernel
        kernel.run(
            *grid,
            stream,
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            *arguments,
            *self._values,
        )


def compile_together(calls: Sequence[tuple[Prepared, Grid, tuple[Any, ...]]]) -> None:
    """Compile several kernels side by side, each for its grid and arguments, before any of them is launched."""
    with ThreadPoolExecutor(len(calls)) as threads, triton.AsyncCompileMode(threads):
        for kernel, grid, arguments in calls:
            kernel.compile(grid, *arguments)


class Scratch:
    """Memory that the kernels of one call hand to one another: one allocation, however many parts it has.

    Args:
        parts: elements and dtype of each.
    """

    def __init__(self, *parts: tuple[int, torch.dtype]) -> None:
        self._parts, self._offsets, self._nbytes = parts, list[int](), 0
        for count, dtype in parts:
            self._offsets.append(self._nbytes)
            self._nbytes += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def take(self, device: torch.device, as_tensors: bool) -> tuple[Tensor, list[Any]]:
        """A new one, uninitialised: its memory, and its parts as tensors or as the addresses where they begin.

        The memory may be let go once the kernels are queued, as all that torch allocates for this stream.
        """
        memory = torch.empty(self._nbytes, dtype=torch.uint8, device=device)
        if as_tensors:
            pairs = zip(self._offsets, self._parts, strict=True)
            return memory, [
                memory[at : at + count * dtype.itemsize].view(dtype) for at, (count, dtype) in pairs
            ]
        begin = memory.data_ptr()
        return memory, [begin + offset for offset in self._offsets]


def stream_of(tensor: Tensor) -> int | None:
    """The handle of the calling thread's stream on the tensor's device; None under Triton's interpreter."""
    return driver.active.get_current_stream(tensor.device.index) if tensor.is_cuda else None


def aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """Which of them begin at a multiple of 16 bytes: what Triton compiles for."""
    return tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
