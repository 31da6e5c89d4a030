"""Where the work of a trainer thread is queued: on a GPU a stream of its own, on a CPU nothing is.

A thread queues kernels and goes on; what it reads of their results makes it wait for them. A step waits once, at its
end, so that what is counted is also written (docs/cuda.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hogwild.errors import ConfigError

_LOWEST = 0  # of a stream's priorities; those that come first are below it


class Stream:
    """Of one trainer thread.

    Attributes:
        device: where its work is done.
        waits: is it done later than it is asked for? Not on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self.waits:
            self._stream = torch.cuda.Stream(device, priority=_LOWEST)  # type: ignore[no-untyped-call]  # torch's

    @contextmanager
    def current(self) -> Iterator[None]:
        """Queue everything there that the calling thread does meanwhile, backward passes included.

        Autograd would run those on a thread of its own, one for all callers of a device.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
            yield


def settle(device: torch.device) -> None:
    """Wait until what this thread has queued is done, before other threads, with other streams, are shown it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def put(values: Sequence[int] | Sequence[bool] | Tensor, device: torch.device) -> Tensor:
    """Numbers, or a tensor of the host, on `device`, without waiting for what is queued there.

    A copy from ordinary memory would wait; one from pinned memory is queued, and torch keeps that memory until then.
    """
    tensor = (
        values
        if isinstance(values, Tensor)
        else torch.tensor(values, dtype=None if len(values) else torch.int64)
    )
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def cap(device: torch.device, gib: float) -> None:
    """Let this process take no more than so much of a GPU beside the weights, which are not torch's; 0: no limit.

    What exceeds it is an out-of-memory error here, and never one of the server's.

    Raises:
        ConfigError: the GPU has less.
    """
    if device.type != "cuda" or not gib:
        return
    total = torch.cuda.mem_get_info(device)[1]
    if gib * 2**30 > total:
        raise ConfigError(
            f"training.gpu_memory_gib is {gib:g}, and {torch.cuda.get_device_name(device)} has "
            f"{total / 2**30:.1f} GiB: set it to what is left beside the weights and the server's cache"
        )
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total, device)
