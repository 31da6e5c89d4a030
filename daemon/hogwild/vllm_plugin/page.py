"""Hands the control page from the engine's process to the API server's, which are two processes.

The engine listens on an abstract Unix socket whose name, random for each start, the launcher has put into the
environment of both. No file, so nothing is left behind by a kill; each end checks that the other is of its own user.
Imports no vllm.
"""

import logging
import os
import socket
import threading
from typing import Any

from hogwild.arena import protocol
from hogwild.arena.client import Arena
from hogwild.arena.control import NBYTES, ControlPage
from hogwild.arena.memory import Segment
from hogwild.errors import ArenaError, ProtocolError
from hogwild.vllm_plugin.names import PAGE_VARIABLE

log = logging.getLogger("vllm.hogwild.page")

_TIMEOUT_S = 2.0


def hand_out(arena: Arena) -> None:
    """Engine: answer everybody of our user who asks, from a background thread, for as long as this process lives."""
    name = os.environ.get(PAGE_VARIABLE, "")
    if not name:
        log.warning(
            "hogwild: %s is not set: responses do not say which generation they come from", PAGE_VARIABLE
        )
        return
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(f"\0{name}")
    listener.listen(16)
    about = {"model": arena.layout.source.path, "arena": arena.control.arena_id}
    threading.Thread(target=_answer, args=(listener, arena, about), name="hogwild-page", daemon=True).start()


def _answer(listener: socket.socket, arena: Arena, about: dict[str, Any]) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # out of descriptors: they come back
            log.warning("hogwild: handing out the control page failed: %s", error)
            threading.Event().wait(1.0)
            continue
        with sock:
            try:
                sock.settimeout(_TIMEOUT_S)
                protocol.check_peer(sock)
                gauge = arena.control.new_gauge().number
                protocol.send(sock, {**about, "gauge": gauge}, (arena.control.segment.fd,))
            except (OSError, ProtocolError) as error:
                log.warning("hogwild: handing out the control page failed: %s", error)


def ask() -> tuple[ControlPage, dict[str, Any]]:
    """API server: the control page, and {"model": folder, "arena": id, "gauge": the number of its own gauge}.

    Raises:
        ArenaError: the engine cannot be asked.
    """
    name = os.environ.get(PAGE_VARIABLE, "")
    if not name:
        raise ArenaError(f"{PAGE_VARIABLE} is not set: start the server with `hogwild vllm`")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.settimeout(_TIMEOUT_S)
            sock.connect(f"\0{name}")
            protocol.check_peer(sock)
            received = protocol.receive(sock, max_fds=1)
        except OSError as error:
            raise ArenaError(f"the engine does not hand out its control page: {error}") from error
    if received is None or len(received[1]) != 1:
        raise ArenaError("the engine did not hand out its control page")
    about, fds = received
    return ControlPage(Segment.from_fd(fds[0], NBYTES)), about
