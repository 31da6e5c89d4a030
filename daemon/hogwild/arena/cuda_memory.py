"""The same as memory.py on a GPU: CUDA allocations behind descriptors, mapped one after the other.

The driver makes an allocation (`cuMemCreate`) and a POSIX descriptor of it; whoever is handed the descriptor maps the
same memory at an address of its own. Nobody owns it: it lives until the last mapping and the last descriptor of any
process are gone. So the death of the process that made it, also by SIGKILL, leaves every other mapping valid, and a
descriptor alone keeps the weights. (Legacy CUDA IPC, cuda_ipc.py,
promises neither.)

A large model is several allocations, mapped without a gap into one reserved range of addresses: to everybody else it
is one segment, in which an offset is enough to find a tensor, and a tensor may lie across two of them. (The driver
names no limit for one allocation but the device's free memory; none is relied on.)

Written from the CUDA driver API's chapter on virtual memory management, NVIDIA's sample memMapIPCDrv and cuda-bindings
13.5. docs/gpu-results.md has what a device said to it.
"""

import logging
import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from hogwild.arena.cuda_driver import Gpu, find
from hogwild.arena.memory import Held
from hogwild.errors import ArenaError

log = logging.getLogger(__name__)


PART_NBYTES = 8 << 30
"""Of the allocations of a segment, but for the last, which has the rest. A multiple of any granularity there is."""

_NEEDED = {
    "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": "has no virtual memory management",
    "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": "cannot share memory by file descriptor",
}


class GpuMemory(Held):
    """A mapping of this process, as tensors, however the memory is shared."""

    def __init__(self, mapping: "Mapping") -> None:
        self.nbytes = mapping.nbytes
        self.device, self.device_id = torch.device("cuda", mapping.device), mapping.device_id
        self._mapping = mapping

    @property
    def bytes(self) -> torch.Tensor:
        """The whole segment, uint8 (nbytes,)."""
        return _wrap(self._mapping)

    @property
    def base(self) -> int:
        """Address of the first byte on the device, in this process."""
        return self._mapping.address

    def tensor(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """See Held. Any dtype."""
        count = self.nbytes // dtype.itemsize
        flat = _wrap(self._mapping)[: count * dtype.itemsize].view(dtype)
        return torch.as_strided(flat, shape, stride, offset // dtype.itemsize)


class CudaSegment(GpuMemory):
    """Shared memory of a GPU, mapped into this process; the interface is that of `memory.Segment`.

    Attributes:
        nbytes: size in bytes, as asked for; the driver rounds it up to its granularity (2 MiB as a rule).
    """

    def __init__(self, fds: Sequence[int], parts: Sequence[int], mapping: "Mapping") -> None:
        super().__init__(mapping)
        self.fds, self.parts = tuple(fds), tuple(parts)

    @classmethod
    def allocate(cls, nbytes: int, device: int = 0, part_nbytes: int = PART_NBYTES) -> "CudaSegment":
        """Make a new zero-filled segment on the GPU that torch calls `cuda:<device>`.

        Args:
            part_nbytes: of each allocation but the last; rounded up to the driver's granularity.

        Raises:
            UnshareableError: the device or its driver has no such memory.
            ArenaError: cuda-bindings or the driver is missing, or the driver refused for another reason.
        """
        task = f"cannot allocate {nbytes / 2**30:.2f} GiB of shared memory"
        with ExitStack() as kept, ExitStack() as passing, ExitStack() as failed:
            gpu = Gpu(device, task)
            gpu.demand(_NEEDED)
            gpu.enter(kept, passing)
            start = address = gpu.reserve(gpu.round_up(nbytes), kept)
            parts, fds = _split(nbytes, gpu.round_up(part_nbytes)), list[int]()
            for number, part in enumerate(parts, 1):
                if len(parts) > 1:
                    gpu.task = f"{task}, part {number} of {len(parts)},"
                size = gpu.round_up(part)
                handle = gpu.call("cuMemCreate", size, gpu.properties(), 0)
                passing.callback(gpu.undo, "cuMemRelease", handle)  # what is mapped stays, says the sample
                fds.append(int(gpu.call("cuMemExportToShareableHandle", handle, gpu.fd_type, 0)))
                failed.callback(os.close, fds[-1])
                os.set_inheritable(fds[-1], False)
                gpu.map(address, handle, size, kept)
                gpu.call("cuMemsetD8", address, 0, size)
                address += size
            gpu.call("cuCtxSynchronize")
            mapping = Mapping(gpu, start, nbytes, kept.pop_all())
            failed.pop_all()
        return cls(fds, parts, mapping)

    @classmethod
    def from_fd(cls, fd: int, nbytes: int, device: int = 0) -> "CudaSegment":
        """`from_fds` of a segment that is one allocation."""
        return cls.from_fds([fd], [nbytes], device)

    @classmethod
    def from_fds(cls, fds: Sequence[int], parts: Sequence[int], device: int | str = 0) -> "CudaSegment":
        """Map a segment that another process made, on the same GPU. Takes ownership of `fds`, also when it raises.

        The driver refuses more bytes than an allocation has. It may well map fewer, and does not say how many there
        are: that `parts` are what the allocations were made with is for the layout's fingerprint to show.

        Args:
            parts: bytes of each, as in `Held`.
            device: the N of torch's `cuda:N`, or a `Held.device_id`.

        Raises:
            ArenaError: as for `allocate`; or this process does not see that GPU; or a descriptor is no CUDA
                allocation, or a smaller one; or the parts would leave gaps.
        """
        nbytes = sum(parts)
        task = f"cannot map the {nbytes / 2**30:.2f} GiB of shared memory that the peer announced"
        with ExitStack() as kept, ExitStack() as passing, ExitStack() as failed:
            for fd in fds:
                failed.callback(os.close, fd)
            gpu = Gpu(find(device, task) if isinstance(device, str) else device, task)
            gpu.demand(_NEEDED)
            gpu.enter(kept, passing)
            if len(fds) != len(parts) or any(gpu.round_up(part) != part for part in parts[:-1]):
                raise ArenaError(
                    f"{task}: {len(fds)} descriptors for {len(parts)} parts, which are no multiples of what "
                    f"{gpu.name} maps: start daemon and server from the same version of hogwild"
                )
            start = address = gpu.reserve(gpu.round_up(nbytes), kept)
            for fd, part in zip(fds, parts, strict=True):
                handle = gpu.call("cuMemImportFromShareableHandle", fd, gpu.fd_type)
                passing.callback(gpu.undo, "cuMemRelease", handle)
                gpu.map(address, handle, gpu.round_up(part), kept)
                address += gpu.round_up(part)
            mapping = Mapping(gpu, start, nbytes, kept.pop_all())
            failed.pop_all()
        return cls(fds, parts, mapping)


class Mapping:
    """Addresses with shared memory behind them, until nobody refers to this object; every tensor does."""

    def __init__(self, gpu: Gpu, address: int, nbytes: int, kept: ExitStack) -> None:
        self.address, self.nbytes, self.device = address, nbytes, gpu.index
        self.device_id = gpu.device_id
        # At exit the driver takes everything back by itself, and until then other threads may use it.
        weakref.finalize(self, _let_go, gpu, kept).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 (numba's documentation). Bytes for every dtype: it has no word for bf16 or fp8."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _split(nbytes: int, part: int) -> list[int]:
    """`nbytes` in parts of that size and a rest."""
    whole = max(-(-nbytes // part) - 1, 0)
    return [*[part] * whole, nbytes - whole * part]


def _let_go(gpu: Gpu, kept: ExitStack) -> None:
    """Undo a mapping, once nothing on the device can still use it.

    Unlike cudaFree, cuMemUnmap does not wait for that (pytorch, c10/cuda/CUDACachingAllocator.cpp, unmapHandles).
    """
    if gpu.idle():
        kept.close()
    else:
        log.error("a part of the memory of %s stays mapped until this process ends", gpu.name)


def _wrap(mapping: Mapping) -> torch.Tensor:
    """The mapping as uint8 (nbytes,), without a copy. All that needs a device: tests without one replace it."""
    tensor = torch.as_tensor(mapping, device=f"cuda:{mapping.device}")
    if tensor.data_ptr() != mapping.address:
        raise ArenaError(
            f"torch {torch.__version__} copied the shared memory of GPU {mapping.device} instead of using it: what is "
            "trained would never be served. Install a version of torch that hogwild names in its requirements."
        )
    return tensor
