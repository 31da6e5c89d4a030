"""Memory that was held for a moment goes back to the system. Imports no torch."""

import contextlib
import ctypes


def trim() -> None:
    """glibc keeps freed blocks of up to 32 MiB for the process, for good; hand back what lies free. Elsewhere: nothing.

    Source: malloc_trim(3), mallopt(3) about M_MMAP_THRESHOLD.
    """
    with contextlib.suppress(OSError, AttributeError):  # no C library by that name, or not glibc
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
