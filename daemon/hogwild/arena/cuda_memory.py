"""The same as memory.py on a GPU: one CUDA allocation behind one descriptor.

The driver makes the allocation (`cuMemCreate`) and a POSIX descriptor of it; whoever is handed the descriptor maps the
same memory at an address of its own. Nobody owns it: it lives until the last mapping and the last descriptor of any
process are gone. So the death of the process that made it, also by SIGKILL, leaves every other mapping valid, and a
descriptor alone keeps the weights. (Legacy CUDA IPC promises neither.)

One model is one allocation: the driver names no limit for one but the device's free memory.

Written from the CUDA driver API's chapter on virtual memory management, NVIDIA's sample memMapIPCDrv and cuda-bindings
13.5. It has not run on a device yet; `make gpu-check` is what will tell.
"""

import logging
import os
import weakref
from contextlib import ExitStack
from typing import Any

import torch

from hogwild.arena.cuda_driver import Gpu
from hogwild.arena.memory import Held
from hogwild.errors import ArenaError

log = logging.getLogger(__name__)


class CudaSegment(Held):
    """One shared allocation of a GPU, mapped into this process; the interface is that of `memory.Segment`.

    Attributes:
        nbytes: size in bytes, as asked for; the driver rounds it up to its granularity (2 MiB as a rule).
    """

    def __init__(self, fd: int, mapping: "_Mapping") -> None:
        self.fd = fd
        self.nbytes = mapping.nbytes
        self._mapping = mapping

    @classmethod
    def allocate(cls, nbytes: int, device: int = 0) -> "CudaSegment":
        """Make a new zero-filled segment on the GPU that torch calls `cuda:<device>`.

        Raises:
            ArenaError: cuda-bindings or the driver is missing, the device cannot do it, or the driver refused.
        """
        task = f"cannot allocate {nbytes / 2**30:.2f} GiB of shared memory"
        with ExitStack() as kept, ExitStack() as passing, ExitStack() as failed:
            gpu = Gpu(device, task)
            gpu.enter(kept, passing)
            size = gpu.round_up(nbytes)
            handle = gpu.call("cuMemCreate", size, gpu.properties(), 0)
            passing.callback(gpu.undo, "cuMemRelease", handle)  # what is mapped stays, says the sample
            fd = int(gpu.call("cuMemExportToShareableHandle", handle, gpu.fd_type, 0))
            failed.callback(os.close, fd)
            os.set_inheritable(fd, False)
            address = gpu.map(handle, size, kept)
            gpu.call("cuMemsetD8", address, 0, size)
            gpu.call("cuCtxSynchronize")
            mapping = _Mapping(gpu, address, nbytes, kept.pop_all())
            failed.pop_all()
        return cls(fd, mapping)

    @classmethod
    def from_fd(cls, fd: int, nbytes: int, device: int = 0) -> "CudaSegment":
        """Map a segment that another process made, on the same GPU. Takes ownership of `fd`, also when it raises.

        The driver refuses more bytes than the allocation has. It may well map fewer, and does not say how many there
        are: that `nbytes` is what the allocation was made with is for the layout's fingerprint to show.

        Raises:
            ArenaError: as for `allocate`; or the descriptor is no CUDA allocation, or a smaller one.
        """
        task = f"cannot map the {nbytes / 2**30:.2f} GiB of shared memory that the peer announced"
        with ExitStack() as kept, ExitStack() as passing, ExitStack() as failed:
            failed.callback(os.close, fd)
            gpu = Gpu(device, task)
            gpu.enter(kept, passing)
            handle = gpu.call("cuMemImportFromShareableHandle", fd, gpu.fd_type)
            passing.callback(gpu.undo, "cuMemRelease", handle)
            address = gpu.map(handle, gpu.round_up(nbytes), kept)
            mapping = _Mapping(gpu, address, nbytes, kept.pop_all())
            failed.pop_all()
        return cls(fd, mapping)

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
        """A view of the segment: `offset` in bytes, a multiple of the item size; `stride` in elements. No copy.

        Any dtype. Every call gives a tensor with a version counter of its own, so that autograd in one thread does
        not see the in-place writes of another, and one that keeps the mapping alive.
        """
        count = self.nbytes // dtype.itemsize
        flat = _wrap(self._mapping)[: count * dtype.itemsize].view(dtype)
        return torch.as_strided(flat, shape, stride, offset // dtype.itemsize)


class _Mapping:
    """Addresses with shared memory behind them, until nobody refers to this object; every tensor does."""

    def __init__(self, gpu: Gpu, address: int, nbytes: int, kept: ExitStack) -> None:
        self.address, self.nbytes, self.device = address, nbytes, gpu.index
        # At exit the driver takes everything back by itself, and until then other threads may use it.
        weakref.finalize(self, _let_go, gpu, kept).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 (numba's documentation). Bytes for every dtype: it has no word for bf16 or fp8."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _let_go(gpu: Gpu, kept: ExitStack) -> None:
    """Undo a mapping, once nothing on the device can still use it.

    Unlike cudaFree, cuMemUnmap does not wait for that (pytorch, c10/cuda/CUDACachingAllocator.cpp, unmapHandles).
    """
    if gpu.idle():
        kept.close()
    else:
        log.error("a part of the memory of %s stays mapped until this process ends", gpu.name)


def _wrap(mapping: _Mapping) -> torch.Tensor:
    """The mapping as uint8 (nbytes,), without a copy. All that needs a device: tests without one replace it."""
    tensor = torch.as_tensor(mapping, device=f"cuda:{mapping.device}")
    if tensor.data_ptr() != mapping.address:
        raise ArenaError(
            f"torch {torch.__version__} copied the shared memory of GPU {mapping.device} instead of using it: what is "
            "trained would never be served. Install a version of torch that hogwild names in its requirements."
        )
    return tensor
