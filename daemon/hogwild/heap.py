"""Memory that this process holds, and that the machine has left. Imports no torch."""

import contextlib
import ctypes
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # as a container sees its own


def available() -> int:
    """Bytes that could be taken without swapping, but never more than the container may have. 0: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # "max", or no such file: nothing is limited
        found.append(int(_LIMIT.read_text()))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    return min(found, default=0)


def trim() -> None:
    """glibc keeps freed blocks of up to 32 MiB for the process, for good; hand back what lies free. Elsewhere: nothing.

    Source: malloc_trim(3), mallopt(3) about M_MMAP_THRESHOLD.
    """
    with contextlib.suppress(OSError, AttributeError):  # no C library by that name, or not glibc
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
