"""Legacy CUDA IPC: the memory of a GPU where the driver has none behind descriptors. The fallback of cuda_memory.py.

One process allocates (`cuMemAlloc`) and is the owner; another one opens the allocation by a handle of 64 bytes. Only
the owner may export it, and it is gone when the owner frees it or ends: see owner.py for what that means for a daemon.

Written from the CUDA driver API's chapter on memory management and cuda-bindings 13.5. It has run only against a
stand-in of the driver.
"""

import time
from contextlib import ExitStack

from hogwild.arena.cuda_driver import Gpu, find
from hogwild.arena.cuda_memory import GpuMemory, Mapping
from hogwild.arena.owner import Owner
from hogwild.errors import ArenaError, ProtocolError

HANDLE_NBYTES = 64
SETTLE_S = 1.0
"""Between the last read and the question whether the owner lives. Files of a process that was killed were closed at
most 5 ms before its pidfd fired (60 kills, without a GPU); how long the driver takes on a device is not known."""

_NEEDED = {"CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING": "has no unified addressing"}
_GRANULARITY = 2 << 20  # the driver shares whole blocks of this size, and with them what else lies in one


class IpcSegment(GpuMemory):
    """Memory of a GPU that belongs to one process; the interface is that of `CudaSegment`, without descriptors."""

    def __init__(self, mapping: Mapping, handle: bytes, owner: Owner | None = None) -> None:
        """`owner`: None in the process that made it."""
        super().__init__(mapping)
        self.fds, self.parts, self.handle = (), (mapping.nbytes,), handle.hex()
        self._owner = owner

    @classmethod
    def allocate(cls, nbytes: int, device: int = 0) -> "IpcSegment":
        """Make a new zero-filled segment on the GPU that torch calls `cuda:<device>`.

        Raises:
            ArenaError: cuda-bindings or the driver is missing, the device cannot do it, or the driver refused.
        """
        task = f"cannot allocate {nbytes / 2**30:.2f} GiB of memory for legacy CUDA IPC"
        with ExitStack() as kept, ExitStack() as passing:
            gpu = Gpu(device, task)
            gpu.demand(_NEEDED)
            gpu.enter(kept, passing)
            size = -(-nbytes // _GRANULARITY) * _GRANULARITY
            address = int(gpu.call("cuMemAlloc", size))
            kept.callback(gpu.undo_inside, "cuMemFree", address)
            gpu.call("cuMemsetD8", address, 0, size)
            gpu.call("cuCtxSynchronize")
            handle = bytes(gpu.call("cuIpcGetMemHandle", address).reserved)
            mapping = Mapping(gpu, address, nbytes, kept.pop_all())
        return cls(mapping, handle)

    @classmethod
    def open(cls, handle: str, nbytes: int, device_id: str, owner: Owner) -> "IpcSegment":
        """Map the segment of another process. Takes over `owner`, also when it raises.

        The driver does not say how many bytes there are: that is for the layout's fingerprint to show.

        Args:
            handle, device_id: see `Held`.

        Raises:
            ArenaError: as for `allocate`; or this process does not see that GPU, or the handle opens nothing.
        """
        task = (
            f"cannot open the {nbytes / 2**30:.2f} GiB of memory that the peer announced by legacy CUDA IPC"
        )
        with ExitStack() as failed, ExitStack() as kept, ExitStack() as passing:
            failed.callback(owner.close)
            raw = _from_hex(handle)
            gpu = Gpu(find(device_id, task), task)
            gpu.demand(_NEEDED)
            gpu.enter(kept, passing)
            address = int(gpu.call("cuIpcOpenMemHandle", gpu.ipc_handle(raw), gpu.lazy_peer_access))
            kept.callback(gpu.undo_inside, "cuIpcCloseMemHandle", address)
            mapping = Mapping(gpu, address, nbytes, kept.pop_all())
            failed.pop_all()
        return cls(mapping, raw, owner)

    def inode(self) -> tuple[int, int]:
        """(0, 0): there is no file."""
        return 0, 0

    def ensure_alive(self) -> None:
        """See Held."""
        if self._owner is None:
            return
        time.sleep(SETTLE_S)
        if not self._owner.alive:
            raise ArenaError(f"the server, process {self._owner.pid}, ended while its weights were read")

    def close(self) -> None:
        """See Held. The owner is not watched any more: what was made from it must not be used."""
        if self._owner is not None:
            self._owner.close()


def _from_hex(handle: str) -> bytes:
    try:
        raw = bytes.fromhex(handle)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != HANDLE_NBYTES:
        raise ProtocolError(f"the peer sent no handle of legacy CUDA IPC: {handle!r:.80}")
    return raw
