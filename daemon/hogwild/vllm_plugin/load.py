"""Says on the control page what the server has to do, so that trainers can stand aside: imports no vllm.

    requests in flight       counted by the middleware, from the moment in which a request arrives
    running, waiting         as vLLM's scheduler says after each step of the engine
    time per output token    as vLLM measures it for its own metrics

The first is enough to stand aside for somebody who waits; the rest shows what training costs those who are served.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hogwild.arena.control import SERVER_ALIVE_S, Gauge

log = logging.getLogger("vllm.hogwild.load")

_BEAT_S = SERVER_ALIVE_S / 10


class Meter:
    """One API server process. Used from its event loop alone.

    Also one of vLLM's stat loggers, by the methods that StatLoggerManager calls (v1/metrics/loggers.py, vLLM 0.32).
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._in_flight = gauge, 0
        self._beating: asyncio.TimerHandle | None = None
        gauge.set_in_flight(0)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, until its answer is complete or its client gone."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def listen(self, app: Any) -> None:
        """Hear what vLLM measures of its engine; without it, requests in flight are all that is known."""
        manager = getattr(getattr(getattr(app, "state", None), "engine_client", None), "logger_manager", None)
        loggers = getattr(manager, "stat_loggers", None)
        if isinstance(loggers, list):
            loggers.append(self)
        else:
            log.warning("hogwild: vLLM keeps no statistics (--disable-log-stats?): training stands aside by the number "
                        "of requests alone")  # fmt: skip

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """After a step of the engine."""
        if scheduler_stats is not None:
            self._gauge.set_engine(scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs)
        if iteration_stats is not None and (waited := iteration_stats.inter_token_latencies_iter):
            self._gauge.add_tokens(len(waited), sum(waited))

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, *_: Any, **__: Any) -> None: ...

    def record_admission_rejection(self, reason: str) -> None: ...

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._beat()

    def _beat(self) -> None:
        """Say it, and again soon as long as somebody waits: who is killed cannot take it back."""
        self._gauge.set_in_flight(self._in_flight)
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        if self._in_flight:
            self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)
