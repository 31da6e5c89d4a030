"""Which kind of shared memory a device has. Nobody else asks."""

import os
from collections.abc import Sequence

import torch

from hogwild.arena.cuda_memory import CudaSegment
from hogwild.arena.memory import Held, Segment
from hogwild.errors import ProtocolError


def allocate(nbytes: int, device: torch.device) -> Held:
    """New zero-filled memory on `device`, which is a CPU or a GPU by its number.

    Raises:
        ArenaError: it cannot be had; says why, and what to do.
    """
    if device.type == "cuda":
        return CudaSegment.allocate(nbytes, device.index or 0)
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
