"""The daemon's end of the arena socket: takes an arena that a server offers, and hands it back to the next server."""

import errno
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hogwild import log as logs
from hogwild.arena import protocol
from hogwild.arena.client import Arena
from hogwild.chat_settings import MODELS_OWN
from hogwild.errors import ArenaError, HogwildError, ProtocolError
from hogwild.layout import Source, source_from_json

log = logs.get(__name__)

_MESSAGE_TIMEOUT_S = 30.0
_SETTLING_S = 1.5
"""Within which a server offers again what a daemon before this one held: client._RETRY_S, and time to spare."""
_SAID_AGAIN_S = 3600.0


class Hub:
    """Listens on the arena socket.

    Args:
        path: the socket; its folder is made 0700, the socket 0600.
        on_offer: called with each arena that a server offers, in that session's thread. It verifies; returning
            takes the arena, a HogwildError refuses it and is told to the server.
        on_session: called with (server, True) when a server's session begins and (server, False) when it ends;
            server is {"url": as announced, or empty, "pid": of the process at the other end, "max_model_len": tokens of
            the longest text that it takes, "chat": `ChatSettings`; either not there if it has not said}.
        on_command: called with the name and arguments of what a person asks for, and with what says whether they have
            hung up, in that session's thread; returns the answer. None: commands are refused.

    Attributes:
        refused: why the newest offer of weights was, in one line; empty: it was not, or a server has come since.
    """

    def __init__(
        self,
        path: Path,
        on_offer: Callable[[Arena], None],
        on_session: Callable[[dict[str, Any], bool], None],
        on_command: Callable[[str, dict[str, Any], Callable[[], bool]], dict[str, Any]] | None = None,
    ) -> None:
        self._path, self._on_offer, self._on_session = path, on_offer, on_session
        self._on_command = on_command
        self._held: Arena | None = None
        self._taking = threading.Lock()  # one arena is verified at a time
        self._sessions: set[socket.socket] = set()
        self._stopping = False
        self._settled_at = 0.0
        self.refused = ""
        self._said: dict[str, float] = {}  # of each refusal, when it was logged
        self._listener = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="arena-hub", daemon=True)

    @property
    def arena(self) -> Arena | None:
        """The arena held, if any."""
        return self._held

    def start(self) -> None:
        self._settled_at = time.monotonic() + _SETTLING_S
        self._thread.start()

    def stop(self) -> None:
        """Hang up on everybody and remove the socket. The servers keep the memory and offer it again."""
        self._stopping = True
        self._path.unlink(missing_ok=True)
        _hang_up(self._listener)  # closing alone does not wake a thread that waits in accept
        self._listener.close()
        for session in list(self._sessions):
            _hang_up(session)

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                log.error("arena.accept_failed", error=str(error))
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    threading.Event().wait(1.0)  # the descriptors come back when a session ends
                continue
            self._sessions.add(sock)
            if self._stopping:
                _hang_up(sock)  # `stop` may have looked at the sessions a moment ago
            threading.Thread(target=self._serve, args=(sock,), name="arena-session", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        server: dict[str, Any] = {}
        try:
            pid = protocol.check_peer(sock)
            sock.settimeout(_MESSAGE_TIMEOUT_S)
            received = protocol.receive(sock, max_fds=protocol.MAX_FDS)
            if received is None:
                return
            message, fds = received
            server = {"url": _text(message.get("server"), "url"), "pid": pid}
            if (longest := protocol.max_model_len(message.get("server"))) is not None:
                server["max_model_len"] = longest
            if (chat := protocol.chat(message.get("server"))) != MODELS_OWN:
                server["chat"] = chat
            if certificate := _text(message.get("server"), "certificate"):
                server["certificate"] = certificate
            reply, reply_fds = self._answer(sock, message, fds)
            protocol.send(sock, reply, reply_fds)
            if reply["status"] in ("held", "attached"):
                self.refused = ""
                self._said.clear()
                sock.settimeout(None)
                self._session(sock, server)
        except (ProtocolError, OSError) as error:
            if not self._stopping:
                log.warning("arena.session_failed", error=str(error), **protocol.shown(server))
        finally:
            self._sessions.discard(sock)
            sock.close()

    def _session(self, sock: socket.socket, server: dict[str, Any]) -> None:
        self._on_session(server, True)
        try:
            while sock.recv(4096):
                pass
        except OSError:
            pass  # a reset is a hang-up too
        finally:
            if not self._stopping:
                self._on_session(server, False)

    def _answer(
        self, sock: socket.socket, message: protocol.Message, fds: list[int]
    ) -> tuple[protocol.Message, tuple[int, ...]]:
        version, op = message.get("version"), message.get("op")
        if version != protocol.VERSION or op not in ("ask", "offer", "command"):
            for fd in fds:
                os.close(fd)
            return {
                "status": "refused",
                "error": f"this daemon speaks version {protocol.VERSION} of the arena protocol, the peer sent "
                f"{op!r} in version {version!r}: install the same hogwild for both",
            }, ()
        if op != "offer":
            for fd in fds:
                os.close(fd)
            return self._ask(message) if op == "ask" else (self._command(message, sock), ())
        try:
            offered = Arena.receive(message, fds, sock)
            try:
                with self._taking:
                    self._take(offered)
            except BaseException:
                offered.close()
                raise
        except Exception as error:  # transformers raises what it likes for a folder that it cannot use
            if self._stopping:  # and what is needed for it is closed
                return {"status": "refused", "error": "the daemon is stopping"}, ()
            lines = str(error).splitlines() or [repr(error)]
            self.refused = " ".join(
                line.strip(" -") for line in lines[:2]
            )  # the first problem, where some are listed
            problems = getattr(error, "problems", [])
            if self._is_news(f"{error!r} {problems}"):
                unforeseen = not isinstance(error, HogwildError)
                log.error("arena.refused", error=str(error), problems=problems, exc_info=unforeseen)
            if not isinstance(error, HogwildError):
                return {"status": "refused", "error": f"the daemon failed on it: {error!r}"}, ()
            return {"status": "refused", "error": str(error), "problems": problems}, ()
        return {"status": "attached"}, ()

    def _is_news(self, refusal: str) -> bool:
        """Was it not logged within the hour, nor since a server came? One that is refused offers every few seconds."""
        now = time.monotonic()
        self._said = {one: at for one, at in self._said.items() if now - at < _SAID_AGAIN_S}
        known = refusal in self._said
        self._said.setdefault(refusal, now)
        return not known

    def _command(self, message: protocol.Message, sock: socket.socket) -> protocol.Message:
        name, arguments = message.get("name"), message.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ProtocolError(f"a command without name or arguments: {message!r:.200}")
        if self._on_command is None:
            return {"status": "refused", "error": "this process takes no commands"}
        return self._on_command(name, arguments, lambda: _has_hung_up(sock))

    def _ask(self, message: protocol.Message) -> tuple[protocol.Message, tuple[int, ...]]:
        try:
            source: Source = source_from_json(message.get("source"))
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the server asked with a malformed source: {error!r}") from error
        # Also where whoever offers is gone: that arena will be held, and another one would be refused beside it. So it
        # would where an older server lives on, and has yet to notice that there is a daemon again.
        held = self._held
        if self._taking.locked() or (held is None and time.monotonic() < self._settled_at):
            return {"status": "verifying"}, ()
        if held is None or not held.layout.source.same_files(source):
            return {"status": "empty"}, ()
        if held.weights.handle:  # only the server that made it can hand it on
            return {"status": "empty"}, ()
        return {"status": "held", **held.to_json()}, held.fds

    def _take(self, offered: Arena) -> None:
        held = self._held
        if held is not None:
            if offered.control.arena_id == held.control.arena_id:
                offered.close()
                return  # the same memory, offered again after a broken connection
            raise ArenaError(
                f"the daemon holds live weights of {held.layout.source.path} and will not drop them for a new arena "
                f"filled from {offered.layout.source.path}. Start the server on {held.layout.source.path} again to "
                "go on with the trained weights, or restart the daemon to let go of them (its checkpoints stay)."
            )
        self._on_offer(offered)
        self._held = offered


def _listen(path: Path) -> socket.socket:
    """Bind the socket, replacing one that nobody listens on any more.

    Raises:
        ArenaError: somebody listens there or may (a socket that we may not connect to), or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _cannot_listen(path, error) from error
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a daemon with a full backlog listens too
            code = probe.connect_ex(str(path))
        if code in (0, errno.EAGAIN):
            raise ArenaError(f"another daemon listens on {path}: stop it, or give this one another `socket`")
        if code not in (errno.ECONNREFUSED, errno.ENOENT):  # EACCES: somebody else's, and perhaps alive
            raise _cannot_listen(path, OSError(code, os.strerror(code), str(path)))
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_listen(path, error) from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise _cannot_listen(path, error) from error
    return listener


def _cannot_listen(path: Path, error: OSError) -> ArenaError:
    return ArenaError(f"cannot listen on {path} as user {os.geteuid()}: {error}")


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was gone already


def _has_hung_up(sock: socket.socket) -> bool:
    """Of a peer that waits for an answer, and has nothing more to say."""
    looking = select.poll()  # not MSG_DONTWAIT: Python waits for a socket with a timeout all the same
    try:
        looking.register(sock, select.POLLIN | select.POLLRDHUP)
    except (OSError, ValueError):
        return True  # closed
    return bool(looking.poll(0))


def _text(server: Any, key: str) -> str:
    """What a server says of itself; nothing else that a peer sends goes into the log as it is."""
    found = server.get(key) if isinstance(server, dict) else None
    return found if isinstance(found, str) else ""
