"""The server's end of the arena socket: ask for an arena, or offer one until it is taken. Imports no vllm."""

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogwild.arena import devices, protocol
from hogwild.arena.control import NBYTES as CONTROL_NBYTES
from hogwild.arena.control import ControlPage
from hogwild.arena.memory import Held, Segment
from hogwild.arena.owner import Owner
from hogwild.chat_settings import MODELS_OWN, ChatSettings
from hogwild.errors import ArenaError, ProtocolError
from hogwild.layout import Layout, Source

log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 10.0
_RETRY_S = 0.5
_RETRY_REFUSED_S = 5.0


@dataclass
class Arena:
    """Weights, control page and layout: everything that two processes share.

    Attributes:
        max_model_len: tokens of the longest text that the server takes which this came from. Not of the layout: another
            server may map the same memory, and take others. None: no server has said.
        chat: what this server was told of chats. Not of the layout either.
    """

    weights: Held
    control: ControlPage
    layout: Layout
    max_model_len: int | None = None
    chat: ChatSettings = MODELS_OWN

    @property
    def fds(self) -> tuple[int, ...]:
        """As they go over the socket: those of the weights, then the control page's."""
        return *self.weights.fds, self.control.segment.fd

    @classmethod
    def receive(cls, message: dict[str, Any], fds: list[int], sock: socket.socket | None = None) -> "Arena":
        """Map what a peer sent. Takes ownership of the descriptors.

        Args:
            sock: to the process that made the arena; None if it only hands it on. Where its memory dies with it,
                this process does so too.

        Raises:
            ArenaError: the descriptors or the layout are not what they should be, or the weights are on a GPU that
                this process does not see.
        """
        unmapped = list(fds)
        segments: list[Held] = []
        try:
            layout = Layout.from_json(message.get("layout"))
            handle = message.get("handle")
            expected = 1 if handle is not None else len(layout.allocations) + 1
            if len(fds) != expected:
                raise ProtocolError(f"this arena comes with {expected} descriptors, the peer sent {len(fds)}")
            if handle is not None and sock is None:
                raise ProtocolError(
                    "memory of legacy CUDA IPC comes from the process that made it, and from no other"
                )
            page = Segment.from_fd(unmapped.pop(), CONTROL_NBYTES)
            segments.append(page)
            given, unmapped = unmapped, []
            if handle is not None and sock is not None:
                segments.append(devices.open_ipc(handle, layout.allocations, layout.device, Owner(sock)))
            else:
                segments.append(devices.receive(given, layout.allocations, layout.device))
            control = ControlPage(page)
            if control.fingerprint != layout.fingerprint():
                raise ProtocolError(
                    "the control page belongs to another layout than the one that came with it"
                )
        except BaseException:
            for fd in unmapped:
                os.close(fd)
            for segment in segments:
                segment.close()
            raise
        server = message.get("server")
        return cls(segments[1], control, layout, protocol.max_model_len(server), protocol.chat(server))

    def to_json(self) -> dict[str, Any]:
        """What goes into a message beside `fds`."""
        handle = {"handle": self.weights.handle} if self.weights.handle else {}
        return {"layout": self.layout.to_json(), **handle}

    def close(self) -> None:
        """Let go of all descriptors. Memory lives on until the last tensor made from it is gone."""
        self.weights.close()
        self.control.segment.close()


def ask(path: Path, source: Source, server: dict[str, Any]) -> tuple[Arena, socket.socket] | None:
    """Ask the daemon whether it holds an arena that was filled from these very files. While it verifies one, wait.

    `server` is what the daemon is told of this server, as in `Offer`.

    Returns the arena and the open session, or None when no daemon listens or it holds none.

    Raises:
        ArenaError: a daemon is there but cannot be reached or does not answer, so that nobody knows whether it holds
            trained weights.
        ProtocolError: something else listens there, or a daemon of another version.
    """
    request = {"op": "ask", "version": protocol.VERSION, "source": source.__dict__, "server": server}
    waited = False
    while (sock := _connect(path, _ASK_TIMEOUT_S)) is not None:
        try:
            reply = _call(sock, request)
            if reply is not None and reply[0].get("status") == "held":
                arena = Arena.receive(*reply)
                sock.settimeout(None)
                return arena, sock
        except OSError as error:
            sock.close()
            raise ArenaError(
                f"the hogwild daemon on {path} accepts connections but does not answer ({error})"
            ) from error
        sock.close()
        match reply[0].get("status") if reply else None:
            case "empty":
                break
            case "verifying":
                if not waited:
                    log.info("the hogwild daemon verifies weights: waiting for what becomes of them")
                waited = True
                time.sleep(_RETRY_S)
            case _:
                raise ProtocolError(
                    f"the hogwild daemon on {path} answered: {reply[0] if reply else 'nothing'}"
                )
    return None


class Offer:
    """Keeps offering an arena to the daemon, from a background thread, for as long as this process lives.

    Whenever the daemon is away it is offered again, so that either side may restart at any time.
    """

    def __init__(self, path: Path, arena: Arena, server: dict[str, Any]) -> None:
        """`server`: what the daemon is told of this server, see protocol.py."""
        self._path, self._arena, self._server = path, arena, server
        self.attached = threading.Event()
        self._last_words = ""

    def start(self, session: socket.socket | None = None) -> None:
        """Begin; `session` is the open connection that the arena came over, if it came from the daemon."""
        threading.Thread(target=self._run, args=(session,), name="hogwild-offer", daemon=True).start()

    def _run(self, session: socket.socket | None) -> None:
        pause = threading.Event()  # never set: an interruptible sleep
        while True:
            wait_s = _RETRY_S
            if session is None:
                session, wait_s = self._offer()
            if session is not None:
                self.attached.set()
                self._say("the hogwild daemon has these weights; they are trained while they are served")
                self._until_hangup(session)
                self.attached.clear()
                self._say("the hogwild daemon is gone; serving goes on with the weights as they are")
                session = None
            pause.wait(wait_s)

    def _offer(self) -> tuple[socket.socket | None, float]:
        sock = None
        try:
            sock = _connect(self._path, timeout_s=None)
            if sock is None:
                return None, _RETRY_S
            reply = _call(
                sock,
                {
                    "op": "offer",
                    "version": protocol.VERSION,
                    **self._arena.to_json(),
                    "server": self._server,
                },
                self._arena.fds,
            )
            if reply is not None and reply[0].get("status") == "attached":
                return sock, _RETRY_S
            if reply is not None:
                self._say(
                    f"the hogwild daemon refuses these weights: {reply[0].get('error', 'no reason given')}"
                )
        except (OSError, ArenaError) as error:
            self._say(f"offering the weights to the hogwild daemon failed: {error}")
        if sock is not None:
            sock.close()
        return None, _RETRY_REFUSED_S

    def _say(self, words: str) -> None:
        if words != self._last_words:  # the same refusal every few seconds would bury everything else
            log.warning("%s", words)
        self._last_words = words

    @staticmethod
    def _until_hangup(session: socket.socket) -> None:
        try:
            while session.recv(4096):
                pass
        except OSError:
            pass  # a reset is a hang-up too
        session.close()


def _connect(path: Path, timeout_s: float | None) -> socket.socket | None:
    """A connection to the daemon, or None where none listens.

    Raises:
        ArenaError: something listens there that cannot be reached, or that belongs to somebody else.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
        protocol.check_peer(sock)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise ArenaError(
            f"cannot reach the hogwild daemon on {path} as user {os.geteuid()}: {error}. "
            "Run the daemon and the server as the same user."
        ) from error
    except ProtocolError:
        sock.close()
        raise
    return sock


def _call(
    sock: socket.socket, message: protocol.Message, fds: tuple[int, ...] = ()
) -> tuple[protocol.Message, list[int]] | None:
    protocol.send(sock, message, fds)
    return protocol.receive(sock, max_fds=protocol.MAX_FDS)
