"""Times on a device, and what the device can do at best. On a CPU the same by wall clock, to try the benchmark out."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Run = Callable[[], object]

_L2_BYTES = 256 << 20
"""Written between two timed runs: more than any second-level cache, so that each run reads its weights from memory, as
in a step that goes through all layers."""
_WARM_UP_S = 1.0  # for the clocks of an idle device to rise


class Clock:
    """Times of one device, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._flush = torch.empty(_L2_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Until everything that was queued is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def on_device(self, run: Run, repeats: int) -> float:
        """The median of several, each from a cold cache, from its first kernel to its last."""
        if not self.cuda:
            return self.as_called(run, repeats)
        run()
        pairs = []
        for _ in range(repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.wait()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1000

    def as_called(self, run: Run, repeats: int) -> float:
        """The mean of several, one after the other as a trainer calls them, the host's part included."""
        run()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def captured(self, run: Run) -> Run:
        """`run` as a CUDA graph, without the host's part; on a CPU itself.

        Raises:
            RuntimeError: it cannot be captured.
        """
        if not self.cuda:
            return run
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


class Stopwatch:
    """Time spent in the parts of a step, on the current stream: read once the step is done."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Parts must not lie in one another."""
        begin = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, begin, self._mark()))

    def take(self) -> dict[str, float]:
        """Part -> seconds since this was last asked. The device has to be idle."""
        total: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                total[name] += begin.elapsed_time(end) / 1000
            else:
                assert isinstance(begin, float)
                assert isinstance(end, float)
                total[name] += end - begin
        self._spans = []
        return dict(total)

    def _mark(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def rates(clock: Clock, tiny: bool) -> tuple[float, float]:
    """(bytes/s of a plain copy, read and write counted; multiply-adds/s of a large matmul), both in bf16."""
    size, side = (1 << 16, 64) if tiny else (1 << 29, 8192)
    a, b = (torch.empty(size, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    k: Tensor = torch.randn(side, side, device=clock.device).to(torch.bfloat16)
    out = torch.empty_like(k)
    warm_until = time.perf_counter() + (0.0 if tiny else _WARM_UP_S)
    while time.perf_counter() < warm_until:
        torch.mm(k, k, out=out)
        clock.wait()
    copy = clock.on_device(lambda: b.copy_(a), 20)
    matmul = clock.on_device(lambda: torch.mm(k, k, out=out), 20)
    return 4 * size / copy, side**3 / matmul
