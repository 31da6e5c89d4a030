"""Every response says which weights it comes from, and GET /hogwild/status says more. Imports no vllm.

    x-hogwild-generation   the generation that the weights descend from; 0: the model as it came
    x-hogwild-epoch        weight epoch: grows while the weights move

Read from the control page when a response begins, without asking anybody; "unknown" where the engine has not handed
out the page. Pure ASGI, so a streamed answer passes through piece by piece. Requests are salted on their way in
(salt.py) and counted while they last (load.py).
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from typing import Any

from hogwild.arena.control import ControlPage
from hogwild.errors import ArenaError
from hogwild.vllm_plugin import page, salt
from hogwild.vllm_plugin.load import Meter

log = logging.getLogger("vllm.hogwild.middleware")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH = "/hogwild/status"
_RETRY_S = 1.0


class Generation:
    """ASGI middleware, named in vLLM's `--middleware`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._page: ControlPage | None = None
        self._about: dict[str, Any] = {}
        self._meter: Meter | None = None
        self._tried_at = -_RETRY_S
        self._asking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        control = self._page or await self._ask()

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_headers(control)]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == PATH:
            await self._status(scope, say, control)
            return
        if control is None or scope["method"] != "POST" or path not in salt.ROUTES:
            await self._app(scope, receive, say)
            return
        if self._meter is None:
            self._meter = Meter(control.gauge(self._about["gauge"]))
            self._meter.listen(scope.get("app"))
        with self._meter.request():
            await self._app(scope, salt.salting(receive, scope, control), say)

    async def _ask(self) -> ControlPage | None:
        """Fetch the page from the engine, off the event loop; once a second at most while that fails."""
        async with self._asking:
            if self._page is None and time.monotonic() - self._tried_at >= _RETRY_S:
                try:
                    self._page, self._about = await asyncio.to_thread(page.ask)
                except ArenaError as error:
                    log.warning("hogwild: %s", error)
                self._tried_at = time.monotonic()
        return self._page

    async def _status(self, scope: Scope, send: Send, control: ControlPage | None) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _respond(send, 405, {"error": "Method Not Allowed"})
        elif not _authorised(scope):
            await _respond(send, 401, {"error": "Unauthorized"})
        elif control is None:
            await _respond(send, 503, {"error": "the engine has not handed out its control page"})
        else:
            age = control.daemon_age_s
            await _respond(
                send,
                200,
                {
                    "generation": control.generation,
                    "epoch": control.epoch,
                    "steps": control.steps,
                    "arena": control.arena_id,
                    "model": self._about.get("model"),
                    "trained": control.trained,
                    "restoring": control.restoring,
                    "load": asdict(control.load),
                    "daemon": {
                        "alive": control.daemon_alive,
                        "age_s": None if age is None else round(age, 3),
                    },
                },
            )


def _headers(control: ControlPage | None) -> list[tuple[bytes, bytes]]:
    generation, epoch = ("unknown", "unknown") if control is None else (control.generation, control.epoch)
    return [
        (b"x-hogwild-generation", f"{generation}".encode()),
        (b"x-hogwild-epoch", f"{epoch}".encode()),
    ]


def _authorised(scope: Scope) -> bool:
    """Does the request carry one of the server's API keys, if it has any? vLLM guards its own paths only.

    As vLLM: `--api-key`, else VLLM_API_KEY, as a bearer token (entrypoints/serve/middleware, vLLM 0.32).
    """
    arguments = getattr(getattr(scope.get("app"), "state", None), "args", None)
    if arguments is None:
        return False  # another vLLM than the one this was written for: nobody knows whether it has a key
    keys = arguments.api_key or [os.environ.get("VLLM_API_KEY")]
    wanted = [hashlib.sha256(key.encode()).digest() for key in keys if key]
    if not wanted:
        return True
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = given.partition(b" ")
    found = hashlib.sha256(token).digest()
    matches = [secrets.compare_digest(found, key) for key in wanted]
    return scheme.lower() == b"bearer" and any(matches)


async def _respond(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
