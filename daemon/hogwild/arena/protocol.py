"""How descriptors change hands: JSON messages over a Unix stream socket, descriptors as SCM_RIGHTS beside them.

The daemon listens, vLLM's loader connects. One connection is one server's session; its end is how either side learns
that the other is gone. A message is a 4-byte little-endian length and that many bytes of UTF-8 JSON (an object);
descriptors travel with the length. Never pickle.

    server  ask    {op, version, source, server}                   -> held {layout} + descriptors | empty | verifying
    server  offer  {op, version, layout, server} + descriptors -> attached | refused {problems}
    person  command  {op, version, name, arguments}                -> done {...} | refused {error}

"verifying": an arena has been offered, and it is not yet known whether it will be held; to be asked again.

`server` is {"url": where it answers, "max_model_len": tokens of the longest text that it takes, "certificate": file of
the one that it shows over https, "chat": {"template": text or null, "settings": {}} of its command line}; of a
server that is older than these, or nobody's, any may be missing.

The descriptors are those of the weights, one for each part that the layout names (on a CPU there is one), and the
control page's as the last. Weights that only legacy CUDA IPC shares have none: their handle goes beside the layout, as
`handle`, in an offer; they are never held for another server.
"""

import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from hogwild.chat_settings import ChatSettings
from hogwild.errors import ProtocolError

VERSION = 3
MAX_FDS = 253  # what Linux passes with one message (SCM_MAX_FD)
MAX_MESSAGE_BYTES = 64 << 20  # a layout takes about 200 bytes a tensor
_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def max_model_len(server: Any) -> int | None:
    """What a server says of the longest text that it takes, in tokens; None: nothing that is a length."""
    length = server.get("max_model_len") if isinstance(server, dict) else None
    return length if type(length) is int and length > 0 else None


def chat(server: Any) -> ChatSettings:
    """What a server was told of chats; nothing, if it does not say."""
    return ChatSettings.from_json(server.get("chat") if isinstance(server, dict) else None)


def shown(server: Mapping[str, Any]) -> dict[str, Any]:
    """What logs and status say of a server: no templates, which are pages long."""
    return {name: value for name, value in server.items() if name != "chat"}


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message with its descriptors (which stay open on this side)."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    header = _LENGTH.pack(len(body))
    if fds:
        socket.send_fds(sock, [header], list(fds))
    else:
        sock.sendall(header)
    sock.sendall(body)


def receive(sock: socket.socket, max_fds: int = 0) -> tuple[Message, list[int]] | None:
    """Receive one message and its descriptors; None when the peer closed the connection between messages.

    The caller owns the descriptors. None is left open when this raises.

    Raises:
        ProtocolError: the peer sent something else, or too much, or stopped half-way.
    """
    fds: list[int] = []
    try:
        header, fds, flags, _ = socket.recv_fds(sock, _LENGTH.size, max_fds)
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds of Python 3.11 ignores MSG_CMSG_CLOEXEC
        if not header and not fds:
            return None
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("the peer sent more descriptors than this message may carry")
        header += _receive_exactly(sock, _LENGTH.size - len(header))
        (length,) = _LENGTH.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"the peer announced a message of {length} bytes, more than {MAX_MESSAGE_BYTES}"
            )
        try:
            message = json.loads(_receive_exactly(sock, length))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the peer sent something that is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"the peer sent a JSON {type(message).__name__}, not an object")
        return message, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel knows them."""
    pid, uid, _gid = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return pid, uid


def check_peer(sock: socket.socket) -> int:
    """Refuse a peer that is neither this user nor root; return its pid.

    Raises:
        ProtocolError: it belongs to somebody else.
    """
    pid, uid = peer(sock)
    if uid not in (os.geteuid(), 0):
        raise ProtocolError(
            f"process {pid} of user {uid} is on the arena socket, only user {os.geteuid()} (or root) may be: "
            "run the daemon and the server as the same user"
        )
    return pid


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < count:
        chunk = sock.recv(min(count - len(chunks), 1 << 20))
        if not chunk:
            raise ProtocolError(f"the peer hung up after {len(chunks)} of {count} bytes of a message")
        chunks += chunk
    return bytes(chunks)
