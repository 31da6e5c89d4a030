"""What every section of `gpu.py` is given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu_report import Recorder
from hogwild.arena.hub import Hub

T = TypeVar("T")

_ANSWER_S, _HAND_OVER_S = 120.0, 60.0


@dataclass
class Bench:
    """One section at work.

    Attributes:
        name: of the section.
        device: where it runs.
        tiny: shapes at a thousandth of the size, to try the benchmark itself out.
        vllm: serve with vLLM, if it can be had.
        out: where it says what it has found.
        deadline: of `time.monotonic`, by which it should be done.
        folder: for sockets and configurations, its own; gone afterwards.
    """

    name: str
    device: torch.device
    tiny: bool
    vllm: bool
    out: Recorder
    deadline: float
    folder: Path

    def left_s(self) -> float:
        """Seconds until it should be done; negative: it is late."""
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes/s of a copy and multiply-adds/s of a matmul, as the first section found them.

        Raises:
            KeyError: it has not.
        """
        return self.out.facts["copy"], self.out.facts["matmul"]

    def free(self) -> int | None:
        """Free bytes of the device by the driver's own account; None on a CPU."""
        return int(torch.cuda.mem_get_info(self.device)[0]) if self.cuda else None

    def start(self, work: Callable[..., None], *arguments: Any) -> Peer:
        """A process that runs `work(pipe, ...)`, which has to be importable."""
        return Peer(self.device, work, *arguments)


def processes(device: torch.device) -> Any:
    """How processes are started: CUDA does not survive a fork, and on a CPU a fork saves the imports."""
    return multiprocessing.get_context("spawn" if device.type == "cuda" else "fork")


class Peer:
    """Another process, which is told things and answers: (what, value)."""

    def __init__(self, device: torch.device, work: Callable[..., None], *arguments: Any) -> None:
        context = processes(device)
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self, what: str, within_s: float = _ANSWER_S) -> Any:
        """The value of its next message.

        Raises:
            RuntimeError: it says something else, nothing in time, or has ended.
        """
        try:
            if not self._pipe.poll(within_s):
                raise RuntimeError(f"a process has not said {what!r} within {within_s:.0f} s")
            said, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            raise RuntimeError(f"a process has ended ({self.process.exitcode}) before {what!r}") from error
        if said != what:
            raise RuntimeError(f"a process said {said!r} instead of {what!r}: {value}")
        return value

    def tell(self, what: str, *values: Any) -> None:
        self._pipe.send((what, *values))

    def ask(self, what: str, *values: Any, within_s: float = _ANSWER_S) -> Any:
        """Tell it to do something, and what it says then."""
        self.tell(what, *values)
        return self.hear(what, within_s)

    def kill(self) -> None:
        """SIGKILL, as `kill -9` does."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)


def listen(sock: Path) -> Hub:
    """A daemon's end of the socket, which takes whatever it is offered."""
    hub = Hub(sock, lambda _arena: None, lambda _server, _begins: None)
    hub.start()
    return hub


def wait_for(look: Callable[[], T | None]) -> T:
    """What `look` finds, as soon as it does.

    Raises:
        RuntimeError: it finds nothing in a minute.
    """
    until = time.monotonic() + _HAND_OVER_S
    while (found := look()) is None:
        if time.monotonic() > until:
            raise RuntimeError(f"nothing was handed over within {_HAND_OVER_S:.0f} s")
        time.sleep(0.005)
    return found
