"""How a process ends whose threads are still at work.

Python ends such a thread, once it comes back from native code (torch, numba, a tokenizer), by unwinding it, and C++
answers that with abort(): a daemon that was stopped while a server's weights were being verified had done all its work,
and ended with SIGABRT once in six times. So a process whose threads are still at work ends without Python's help. They
need no end of their own: nothing that they would still do may be relied on, for a kill would take it too.
"""

import atexit
import os
import sys
import threading

_UNFLUSHED = 120  # as Python itself has it


class Ending:
    """To be made before anything else registers with atexit: what is registered first is called last.

    Attributes:
        code: exit code of this process.
    """

    def __init__(self) -> None:
        self.code = 1
        atexit.register(self._end)

    def told(self, ended: SystemExit) -> None:
        """What sys.exit was called with."""
        self.code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)

    def _end(self) -> None:
        if not any(thread.daemon for thread in threading.enumerate()):  # the others have been joined by now
            return
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):  # full, or nobody reads it
            self.code = self.code or _UNFLUSHED
        os._exit(self.code)
