"""What a person asks of a running daemon: over the arena's socket, done in the daemon's own loop. Imports no torch.

    asker   {op: "command", version, name, arguments}  ->  {status: "done", ...} | {status: "refused", error}

The asker waits until the daemon has done it; the session's thread waits with it, nothing else does. An asker that hangs
up before it was begun (Ctrl-C) does not want it any more.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hogwild.arena import protocol
from hogwild.errors import HogwildError

_CONNECT_TIMEOUT_S = 10.0


class Command:
    """One request, and its answer once there is one.

    Attributes:
        given_up: has whoever asked stopped waiting for the answer?
    """

    def __init__(
        self, name: str, arguments: dict[str, Any], given_up: Callable[[], bool] = lambda: False
    ) -> None:
        self.name, self.arguments, self.given_up = name, arguments, given_up
        self._received = time.monotonic()
        self._answer: dict[str, Any] = {}
        self._answered = threading.Event()

    @property
    def age_s(self) -> float:
        """Seconds since it was received."""
        return time.monotonic() - self._received

    def done(self, **what: Any) -> None:
        """Answer that it has been done."""
        self._reply({"status": "done", **what})

    def refuse(self, error: str) -> None:
        """Answer that it has not."""
        self._reply({"status": "refused", "error": error})

    def _reply(self, answer: dict[str, Any]) -> None:
        if not self._answered.is_set():
            self._answer = answer
            self._answered.set()

    def wait(self) -> dict[str, Any]:
        self._answered.wait()
        return self._answer


class Commands:
    """The daemon's end: requests that wait for its loop."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._closed = False

    def ask(self, name: str, arguments: dict[str, Any], given_up: Callable[[], bool]) -> dict[str, Any]:
        """Called in the session's thread: hand it to the loop and wait for the answer."""
        command = Command(name, arguments, given_up)
        self._waiting.put(command)
        if self._closed:
            self.close()
        return command.wait()

    def next(self) -> Command | None:
        """Called in the loop: the oldest request, if there is one."""
        try:
            return self._waiting.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """The loop has ended: whoever waits is refused."""
        self._closed = True
        while (command := self.next()) is not None:
            command.refuse("the daemon is stopping")


def send(path: Path, name: str, **arguments: Any) -> dict[str, Any]:
    """The asker's end: ask the daemon that listens on `path`, and wait until it is done.

    Raises:
        HogwildError: no daemon listens there, it refuses, or it ended before it answered.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            sock.connect(str(path))
            protocol.check_peer(sock)
            message = {"op": "command", "version": protocol.VERSION, "name": name, "arguments": arguments}
            protocol.send(sock, message)
            sock.settimeout(None)
            received = protocol.receive(sock)
        except OSError as error:
            raise HogwildError(f"the daemon on {path} cannot be asked: {error}") from error
    if received is None:
        raise HogwildError(f"the daemon on {path} ended before it had done `{name}`; see its log")
    answer = received[0]
    if answer.get("status") != "done":
        raise HogwildError(str(answer.get("error", f"the daemon on {path} answered {answer}")))
    return {key: value for key, value in answer.items() if key != "status"}
