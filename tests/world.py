"""A world of tiny models, real daemons, and servers that are real in all but the HTTP part."""

from pathlib import Path
from typing import Any

import torch

from hogwild.arena import client
from hogwild.arena.client import Arena, Offer
from hogwild.checkpoint import Checkpoints
from hogwild.weights import Weights, load_arena
from support import Daemon
from tiny import Child, llama, tokenizer


def serve_weights(pipe: Any, folder: Path, sock: Path, trained: bool) -> None:
    """What a server does with its weights: loads them into an arena and offers that for as long as it lives."""
    serve_arena(pipe, load_arena(folder), sock, trained)


def serve_arena(pipe: Any, arena: Arena, sock: Path, trained: bool = False) -> None:
    """As `serve_weights`, with an arena that was made before."""
    if trained:
        arena.control.mark_trained()
    client._RETRY_REFUSED_S = 0.5
    Offer(sock, arena, {"url": "http://127.0.0.1:1"}).start()
    pipe.send(("serving", None))
    while pipe.recv() == "weights":
        weights = Weights(arena)
        pipe.send(("weights", {name: weights.view(name).float().sum().item() for name in weights.names}))


def sums(server: Child) -> dict[str, float]:
    """The sum of every weight that the server serves now."""
    server.tell("weights")
    found: dict[str, float] = server.hear("weights")
    return found


def sums_of(weights: Weights) -> dict[str, float]:
    return {name: weights.view(name).float().sum().item() for name in weights.names}


class World:
    """A model, a socket, and the processes of one test."""

    def __init__(self, root: Path) -> None:
        self.root, self.sock = root, root / "run" / "arena.sock"
        self.model = self.make("model")
        self._daemons: list[Daemon] = []
        self._servers: list[Child] = []

    @property
    def state(self) -> Path:
        """The state folder of the daemon called "daemon"."""
        return self.root / "daemon" / "state"

    def make(self, name: str, seed: int = 0) -> Path:
        folder = llama(self.root / name, torch.bfloat16, seed=seed)
        tokenizer(folder)
        return folder

    def daemon(self, name: str = "daemon", **settings: Any) -> Daemon:
        daemon = Daemon(self.root / name, self.sock, **settings)
        self._daemons.append(daemon)
        return daemon

    def server(self, model: Path | Arena | None = None, *, trained: bool = False) -> Child:
        """A server of a model folder, or of an arena that the test has made."""
        if isinstance(model, Arena):
            server = Child(serve_arena, model, self.sock, trained)
        else:
            server = Child(serve_weights, model or self.model, self.sock, trained)
        self._servers.append(server)
        server.hear("serving")
        return server

    def checkpoint(self, factor: float = 2, **state: Any) -> tuple[Path, dict[str, float]]:
        """A checkpoint that an earlier daemon left, every weight of the model times `factor`; and its sums."""
        weights = Weights(load_arena(self.model))
        for name in weights.names:
            weights.view(name).mul_(factor)
        saved = Checkpoints(self.state / "checkpoints", keep=2).save(
            weights, self.model, {}, {"step": 40, "ledger_position": 0, **state}
        )
        return saved, sums_of(weights)

    def end(self) -> None:
        for process in (*self._daemons, *self._servers):
            process.kill()
