"""How Triton kernels are launched again: what can be seen of it without a device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from hogwild_kernels.launch import Prepared, Scratch, aligned

GRID = (3, 2, 1)


class Compiled:
    """In place of what Triton has compiled: notes with what it is run."""

    function, packed_metadata = "its handle", "its metadata"

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []

    def run(self, *given: Any) -> None:
        self.ran.append(given)

    def __getitem__(self, grid: Any) -> Any:
        return triton.compiler.CompiledKernel.__getitem__(self, grid)

    def _init_handles(self) -> None:
        self.loaded = True

    def launch_metadata(self, *_given: Any) -> None:
        return None


class Kernel:
    """In place of a kernel."""

    def __init__(self) -> None:
        self.compiled, self.asked, self.interpreted = Compiled(), list[Any](), list[Any]()

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> Compiled:
        self.asked.append((arguments, grid, options))
        return self.compiled

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.interpreted.append((arguments, grid, options))


def test_a_kernel_is_compiled_once_and_launched_as_triton_launches_it():
    kernel = Kernel()
    prepared = Prepared(kernel, {"WHOLE": True, "BLOCK": 64}, num_warps=4)
    x = torch.zeros(4)
    prepared(GRID, 7, x, 1.5)
    prepared(GRID, 8, 0x7F00, 2.5)
    assert kernel.asked == [((x, 1.5, True, 64), GRID, {"num_warps": 4})]
    assert kernel.compiled.loaded
    ours, kernel.compiled.ran = kernel.compiled.ran, []
    kernel.compiled[GRID](x, 1.5, True, 64, stream=7)
    kernel.compiled[GRID](0x7F00, 2.5, True, 64, stream=8)
    hooks = slice(7, 9)  # of profilers, which ours go without
    assert [one[hooks] for one in ours] == [(None, None)] * 2
    assert [(*one[:7], *one[9:]) for one in ours] == [(*one[:7], *one[9:]) for one in kernel.compiled.ran]


def test_a_kernel_that_cannot_be_loaded_says_so_each_time():
    kernel = Kernel()

    def refuse() -> None:
        raise triton.OutOfResources(300, 200, "shared memory")

    kernel.compiled._init_handles = refuse  # type: ignore[method-assign]
    prepared = Prepared(kernel, {})
    for _ in range(2):
        with pytest.raises(triton.OutOfResources):
            prepared(GRID, 7)
    assert kernel.compiled.ran == []


def test_without_a_stream_the_interpreter_runs_it():
    kernel = Kernel()
    Prepared(kernel, {"BLOCK": 64}, num_warps=4)(GRID, None, 5)
    assert kernel.interpreted == [((5, 64), GRID, {"num_warps": 4})]
    assert kernel.asked == []


def test_parts_of_a_scratch_lie_beside_one_another():
    parts = ((300, torch.bfloat16), (5, torch.float32), (1, torch.int32), (70, torch.float32))
    scratch, device = Scratch(*parts), torch.device("cpu")
    memory, tensors = scratch.take(device, as_tensors=True)
    begins = [tensor.data_ptr() for tensor in tensors]
    assert [(len(tensor), tensor.dtype) for tensor in tensors] == list(parts)
    for before, after in zip(tensors, begins[1:], strict=False):
        assert before.data_ptr() + before.nbytes <= after
    assert begins[-1] + tensors[-1].nbytes <= memory.data_ptr() + memory.nbytes
    assert all((begin - memory.data_ptr()) % 16 == 0 for begin in begins)
    other, addresses = scratch.take(device, as_tensors=False)
    assert [one - other.data_ptr() for one in addresses] == [one - memory.data_ptr() for one in begins]


def test_what_is_compiled_for_an_alignment_is_asked_for_it():
    pool = torch.zeros(64, dtype=torch.bfloat16)
    at = next(i for i in range(8) if pool[i:].data_ptr() % 16 == 0)
    assert aligned(pool[at:], pool[at + 1 :], pool[at + 8 :]) == (True, False, True)
    assert aligned(SimpleNamespace(data_ptr=lambda: 0x7F10)) == (True,)  # type: ignore[arg-type]
