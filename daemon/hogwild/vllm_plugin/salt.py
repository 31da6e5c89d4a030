"""Keeps keys and values of older weights out of new answers: requests carry the weight epoch as `cache_salt`.

vLLM hashes `cache_salt` into the first block of a prompt, and each block's hash into the next one's. So a request finds
the cached blocks of its own epoch and no others: nothing is reset, nobody waits, and old blocks fall out of the cache
by themselves. The salt goes into the JSON body, where a client could have put it; what cannot be salted here reads no
cached block at all (unsalted.py). Imports no vllm.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from hogwild.arena.control import ControlPage
from hogwild.vllm_plugin.names import SALT_MARK

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/systemone",
        "/v1/decisions",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/embeddings",
    }
)
"""Where vLLM 0.32 and 0.33 take `cache_salt` and ask the engine; a test compares them with those of a real server."""

_FORBIDDEN = frozenset("@/\\\0")
_MAX_CHARACTERS = 128


def compose(control: ControlPage, own: str | None) -> str:
    """The salt of a request that arrives now: of these weights, and of the client's own salt if it sent one.

    The arena is part of it, because epochs begin anew with it, and a cache outside the server outlives both. So is
    whether a daemon is there: one that was killed can have moved weights, and does not end its last epoch any more. A
    client's salt is hashed, so that any that vLLM allows fits, and no two of them meet.
    """
    alone = control.trained and not control.daemon_alive
    salt = f"{SALT_MARK}{control.arena_id[:12]}-{control.epoch}{'-alone' if alone else ''}"
    return salt if own is None else f"{salt}-{hashlib.sha256(own.encode(errors='surrogatepass')).hexdigest()}"


def salted(body: bytes, control: ControlPage) -> bytes:
    """`body` with the salt as its last key, which is the one that counts where a key comes twice.

    Every other byte stays as the client wrote it. Whatever vLLM is going to refuse (no JSON, no object, a salt of the
    client's that is not allowed) stays whole, so that the client gets vLLM's own answer.

    vLLM reads the body again, so this is time on the event loop: orjson takes a tenth of what `json` does. What it
    refuses (NaN, other encodings than UTF-8, lone surrogates), `json` may still take, as it does in vLLM.
    """
    try:
        found = orjson.loads(body)
        text = body.decode().rstrip()
    except ValueError:
        try:
            text = body.decode(json.detect_encoding(body), "surrogatepass").rstrip()
            found = json.loads(text)
        except (ValueError, RecursionError):
            return body
    if not isinstance(found, dict):
        return body
    own = found.get("cache_salt")
    if own is not None and not _allowed(own):
        return body
    comma = ", " if found else ""
    salt = json.dumps(compose(control, own))
    return f'{text[:-1]}{comma}"cache_salt": {salt}}}'.encode("utf-8", "surrogatepass")


def _allowed(own: object) -> bool:
    """As vLLM (entrypoints/generate/base/protocol.py: validate_cache_salt, vLLM 0.32)."""
    return isinstance(own, str) and 0 < len(own) <= _MAX_CHARACTERS and not _FORBIDDEN & set(own)


def salting(receive: Receive, scope: MutableMapping[str, Any], control: ControlPage) -> Receive:
    """A `receive` that hands out the body in one piece, salted.

    The body is read when the application asks for it and not before: a request without the server's API key is refused
    unread, as ever. The epoch is that of the moment when the body is complete.
    """
    done = False

    async def receive_salted() -> Message:
        nonlocal done
        if done:
            return await receive()
        pieces = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message  # the client has gone
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        done = True
        body = salted(b"".join(pieces), control)
        scope["headers"] = [
            (name, str(len(body)).encode() if name == b"content-length" else value)
            for name, value in scope["headers"]
        ]
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_salted
