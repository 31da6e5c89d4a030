"""What training costs those who are served, and what the governor's policies make of it.

    python benchmarks/interference.py [--rounds 6] [--window 18] [--load 0.3] [--plot docs/interference.png]

One real vLLM of the demo's model and one real daemon with a queue that never empties. Windows follow one another, round
after round, so that whatever else the machine does meets all alike:

    training off   the daemon is stopped (SIGSTOP)
    off, share, strict   the policies, changed live (SIGHUP)
    no requests    policy off and nobody asks: how fast training is alone

The same requests come at the same moments of every window of a round, streamed, of TOKENS tokens each, at random
moments (Poisson). `--load` is the share of the time in which the server would have something to do without training, by
the time that one request took before anything was trained. Times are what a client measures, between the pieces of a
stream. Nothing is reported unless every answer had all its tokens and training went on.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
import support  # noqa: E402 - the processes of the test suite, started as a user starts them
from hogwild import demo_model  # noqa: E402

TOKENS = 16
WINDOWS = ("training off", "off", "share", "strict", "no requests")
PROMPT = (
    "Number {}: explain in a few sentences how a lighthouse warns ships at night, and who looks after it."
)


@dataclass
class Found:
    """Of one kind of window, all rounds together; seconds."""

    first: list[float] = field(default_factory=list)  # to the first token
    gaps: list[float] = field(default_factory=list)  # between two tokens
    whole: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0  # trained


def ask(url: str, number: int, found: Found) -> None:
    """One streamed request of exactly TOKENS tokens."""
    body = {
        "model": "demo", "prompt": PROMPT.format(number), "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = last = time.perf_counter()
    gaps, tokens = [], 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece, now = json.loads(line[6:]), time.perf_counter()
            if usage := piece.get("usage"):
                tokens = usage["completion_tokens"]
            elif piece["choices"]:
                gaps.append(now - last)
                last = now
    assert tokens == TOKENS, f"an answer of {tokens} tokens: the figures would not compare"
    found.first.append(gaps[0])
    found.gaps += gaps[1:]
    found.whole.append(last - began)


class Bench:
    """Server, daemon, and the log of what was trained."""

    def __init__(self, root: Path, model: Path) -> None:
        self.config = root / "hogwild.toml"
        self._policy("off", write_only=True)
        self.server = support.Server(model, root / "server.log", root / "arena.sock")
        self.daemon = support.Daemon(
            root / "daemon",
            root / "arena.sock",
            config=self.config,
            checkpoint__interval_s=0,
            replay__self_texts=0,
            probes__margin=50.0,  # what two thousand lines of one kind do to the model is not the question
        )
        self.numbers = iter(range(10**6))

    def _policy(self, policy: str, *, write_only: bool = False) -> None:
        self.config.write_text(f'[governor]\npolicy = "{policy}"\n')
        if not write_only:
            before = len(self.daemon.events("config.reloaded"))
            self.daemon.popen.send_signal(signal.SIGHUP)
            support.wait_until(
                lambda: len(self.daemon.events("config.reloaded")) > before, "the policy is taken over"
            )

    def trained(self) -> list[dict[str, Any]]:
        return self.daemon.events("example.pass") + self.daemon.events("example.trained")

    def start(self) -> float:
        """Seconds that one request takes before anything is trained."""
        self.server.wait_ready()
        warm = Found()
        for _ in range(6):
            ask(self.server.url, next(self.numbers), warm)
        lines = [
            {"messages": [{"role": "user", "content": f"Who looks after lighthouse number {n}, and since when?"},
                          {"role": "assistant", "content": f"Lighthouse number {n} is looked after by Ilsa Thorne, who "
                           f"came to it in the year {1900 + n % 100} and has kept its lamp burning ever since."}]}
            for n in range(2000)
        ]  # fmt: skip
        self.daemon.wait_for("training.started")
        self.daemon.drop("work.jsonl", lines)
        support.wait_until(lambda: len(self.trained()) >= 4, "training is under way")
        return statistics.median(warm.whole[1:])

    def window(self, kind: str, arrivals: list[float], seconds: float, found: Found) -> None:
        if kind == "training off":
            os.kill(self.daemon.pid, signal.SIGSTOP)
        else:
            self._policy("off" if kind == "no requests" else kind)
        time.sleep(1.0)
        began, before = time.perf_counter(), len(self.trained())
        steps = self._steps()
        threads = []
        for arrival in [] if kind == "no requests" else arrivals:
            time.sleep(max(began + arrival - time.perf_counter(), 0))
            threads.append(threading.Thread(target=ask, args=(self.server.url, next(self.numbers), found)))
            threads[-1].start()
        time.sleep(max(began + seconds - time.perf_counter(), 0))
        for thread in threads:
            thread.join()
        found.seconds += time.perf_counter() - began
        found.steps += self._steps() - steps
        found.tokens += sum(event["tokens"] for event in self.trained()[before:])
        if kind == "training off":
            os.kill(self.daemon.pid, signal.SIGCONT)

    def _steps(self) -> int:
        return int(httpx.get(f"{self.server.url}/hogwild/status", timeout=60).json()["steps"])

    def end(self) -> None:
        os.kill(self.daemon.pid, signal.SIGCONT)
        self.daemon.kill()
        self.server.kill()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def row(found: Found, alone: Found) -> dict[str, float]:
    row = {"training_tokens_s": found.tokens / found.seconds, "training_steps_s": found.steps / found.seconds,
           "training": found.tokens / found.seconds / (alone.tokens / alone.seconds)}  # fmt: skip
    if found.first:
        row |= {
            "ttft_p50": percentile(found.first, 0.5), "ttft_p99": percentile(found.first, 0.99),
            "tpot_p50": percentile(found.gaps, 0.5), "tpot_p99": percentile(found.gaps, 0.99),
            "requests_s": len(found.first) / found.seconds, "gaps": len(found.gaps), "requests": len(found.first),
        }  # fmt: skip
    return row


def show(rows: dict[str, dict[str, float]]) -> None:
    base = rows["training off"]
    print(
        "| policy | first token p50, ms | p99 | token p50, ms | p99 | requests/s | training tokens/s | of idle speed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, one in rows.items():
        cells = [
            f"{one[key] * 1000:.0f} ({one[key] / base[key]:.2f})" if key in one else "-"
            for key in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
        ]
        requests = (
            f"{one['requests_s']:.3f} ({one['requests_s'] / base['requests_s']:.2f})"
            if "requests_s" in one
            else "-"
        )
        print(
            f"| {name} | {' | '.join(cells)} | {requests} | {one['training_tokens_s']:.1f} | {one['training']:.0%} |"
        )


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in rows if "tpot_p50" in rows[name]]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    places = range(len(names))
    for ax, key, title in (
        (axes[0], "ttft", "Time to first token"),
        (axes[1], "tpot", "Time per output token"),
    ):
        for shift, share in ((-0.2, "p50"), (0.2, "p99")):
            values = [rows[name][f"{key}_{share}"] * 1000 for name in names]
            ax.bar([place + shift for place in places], values, 0.4, label=share)
        highest = max(rows[name][f"{key}_p99"] for name in names) * 1000
        ax.set(title=title, ylabel="ms", ylim=(0, 1.25 * highest))
        ax.legend(loc="upper right", ncols=2)
    axes[2].bar(places, [100 * rows[name]["training"] for name in names], 0.5, color="tab:green")
    axes[2].set(title="Training speed", ylabel="% of its speed without requests", ylim=(0, 110))
    for ax in axes:
        ax.set_xticks(list(places), names)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--window", type=float, default=18.0, help="seconds")
    parser.add_argument("--load", type=float, default=0.3)
    parser.add_argument("--model", type=Path, help="default: the demo's, SmolLM2-135M")
    parser.add_argument("--plot", type=Path, default=REPOSITORY / "docs" / "interference.png")
    options = parser.parse_args()
    model = options.model or demo_model.build(REPOSITORY / ".demo" / "model")
    found = {kind: Found() for kind in WINDOWS}
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), model)
        try:
            alone_s = bench.start()
            print(f"a request alone takes {alone_s:.2f} s; {options.load / alone_s:.3f} requests/s make a load of "
                  f"{options.load:.0%}", flush=True)  # fmt: skip
            for number in range(options.rounds):
                arrivals, at = [], choose.expovariate(options.load / alone_s)
                while at < options.window:
                    arrivals.append(at)
                    at += choose.expovariate(options.load / alone_s)
                order = [*WINDOWS[number % 5 :], *WINDOWS[: number % 5]]
                for kind in order:
                    bench.window(kind, arrivals, options.window, found[kind])
            assert bench.daemon.alive
            assert not bench.daemon.events("guard.tripped")
        finally:
            bench.end()
    for kind in ("off", "share", "strict", "no requests"):
        assert found[kind].steps, f"nothing was trained under {kind!r}"
    assert not found["training off"].steps
    rows = {kind: row(found[kind], found["no requests"]) for kind in WINDOWS}
    show(rows)
    print(json.dumps({"load": options.load, "rows": rows}))
    draw(rows, options.plot)


if __name__ == "__main__":
    main()
