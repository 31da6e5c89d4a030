"""An engine whose server has been killed must not go on offering its weights.

vLLM's engine is a process of its own, and survives a SIGKILL of the API server that started it (vLLM 0.32). It serves
nobody then, but the daemon would take its arena for that of the server, and refuse the next one's. Imports no vllm.
"""

import logging
import os
import select
import threading

from hogwild.vllm_plugin.names import SERVER_PID_VARIABLE

log = logging.getLogger("vllm.hogwild.orphan")


def note_server() -> None:
    """In the API server, before it starts anything: who it is, for its children, which watch it from then on.

    Children that are spawned and not forked begin to in launch.py.
    """
    os.environ[SERVER_PID_VARIABLE] = str(os.getpid())
    os.register_at_fork(after_in_child=end_with_server)


def end_with_server() -> None:
    """In the engine: end at once when the API server has ended. Does nothing in a server of one process.

    An engine that is killed off before it has met its API server waits for it for ever, so this is called early.
    """
    server = int(os.environ.get(SERVER_PID_VARIABLE, "0"))
    if server in (0, os.getpid()):
        return
    try:
        fd = os.pidfd_open(server)
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_watch, args=(fd, server), name="hogwild-orphan", daemon=True).start()


def _watch(fd: int, server: int) -> None:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    poll.poll()
    log.error("hogwild: the API server, process %d, is gone: its engine ends too", server)
    os._exit(1)
