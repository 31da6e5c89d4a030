"""The time by which things grow old. Imports no torch.

A system clock that is set far ahead makes everything look old, and what is forgotten then does not come back when it is
put right. So time passes here only as fast as it does for the kernel, sleep of the machine included: what the clock was
set ahead by since this process began does not count. What it was set back by does.
"""

import time


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_BOOTED_AT = time.time() - _since_boot()


def now() -> float:
    """Seconds since the epoch; never later than the system clock."""
    return min(time.time(), _BOOTED_AT + _since_boot())
