"""Which kind of shared memory a device has. Nobody else asks."""

import logging
import os
from collections.abc import Sequence

import torch

from hogwild.arena.cuda_ipc import IpcSegment
from hogwild.arena.cuda_memory import CudaSegment
from hogwild.arena.memory import Held, Segment
from hogwild.arena.owner import Owner
from hogwild.errors import ArenaError, ProtocolError, UnshareableError

log = logging.getLogger(__name__)


def allocate(nbytes: int, device: torch.device) -> Held:
    """New zero-filled memory on `device`, which is a CPU or a GPU by its number.

    Raises:
        ArenaError: it cannot be had; says why, and what to do.
    """
    if device.type == "cuda":
        try:
            return CudaSegment.allocate(nbytes, device.index or 0)
        except UnshareableError as refused:
            return _fall_back(nbytes, device.index or 0, refused)
    return Segment.allocate(nbytes)


def receive(fds: Sequence[int], parts: Sequence[int], device_id: str) -> Held:
    """Map memory that another process made. Takes ownership of the descriptors, also when it raises.

    Args:
        parts, device_id: see `Held`.

    Raises:
        ArenaError: it is on a GPU that this process does not see, or the descriptors are not what was announced.
    """
    if device_id != Segment.device_id:
        return CudaSegment.from_fds(fds, parts, device_id)
    if (len(fds), len(parts)) != (1, 1):
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"weights on a CPU are one allocation, the peer announced {len(parts)}")
    return Segment.from_fd(fds[0], parts[0])


def open_ipc(handle: str, parts: Sequence[int], device_id: str, owner: Owner) -> Held:
    """Map memory of legacy CUDA IPC, which lives as long as `owner`; takes that over, also when it raises.

    Raises:
        ArenaError: it is on a GPU that this process does not see, or the handle is not what was announced.
    """
    return IpcSegment.open(handle, sum(parts), device_id, owner)


def _fall_back(nbytes: int, index: int, refused: UnshareableError) -> Held:
    try:
        segment = IpcSegment.allocate(nbytes, index)
    except ArenaError as error:
        raise ArenaError(
            f"the memory of this GPU can be shared neither by descriptors nor by legacy CUDA IPC:\n  - {refused}\n"
            f"  - {error}\nUse another GPU or driver, or serve and train on the CPU (`hogwild[cpu]`)."
        ) from error
    log.warning(
        "%s Falling back to legacy CUDA IPC: the weights are gone when the server ends. The daemon then ends with it, "
        "and the next server begins with the newest checkpoint; what is in none is trained again.",
        refused,
    )
    return segment
