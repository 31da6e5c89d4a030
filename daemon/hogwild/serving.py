"""How fast the server answers, from its own metrics. Imports no torch.

vLLM keeps a histogram of the time between two tokens of an answer. Its sum and count, asked twice, give the mean of
what lies between. A server that was started with `--disable-log-stats` has none.
"""

import re

import httpx

_TIMEOUT_S = 5.0
_NAMES = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")


class Latency:
    """The mean time between two tokens, between two calls of `ask`.

    Attributes:
        newest: seconds; None: not known, or nothing was answered.
    """

    def __init__(self) -> None:
        self.newest: float | None = None
        self._before: tuple[str, float, float] | None = None

    def ask(self, url: str) -> None:
        """Look at the server's metrics; whatever goes wrong, `newest` is None then."""
        try:
            text = httpx.get(f"{url.rstrip('/')}/metrics", timeout=_TIMEOUT_S, trust_env=False).text
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            self.newest, self._before = None, None
            return
        now = _sum_and_count(text)
        if now is None:
            self.newest, self._before = None, None
            return
        before, self._before = self._before, (url, *now)
        if before is None or before[0] != url or now[1] <= before[2]:
            self.newest = None
        else:
            self.newest = (now[0] - before[1]) / (now[1] - before[2])


def _sum_and_count(text: str) -> tuple[float, float] | None:
    for name in _NAMES:
        found = [
            sum(float(value) for value in re.findall(rf"^{name}_{part}(?:{{[^}}]*}})? (\S+)$", text, re.M))
            for part in ("sum", "count")
        ]
        if f"{name}_count" in text:
            return found[0], found[1]
    return None
