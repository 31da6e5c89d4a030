"""Ten thousand requests while the weights move: is prefix caching still worth something, and is anything ever wrong?

    python benchmarks/freshness.py [--requests 10000] [--clients 8] [--epoch-updates 8 64]

A real vLLM of a tiny model, and the real daemon. Clients ask in a closed loop, by chats, completions and responses,
half of them streamed; all prompts begin with the same 380 tokens. First nothing is trained; then the same again while
the daemon trains without a rest, once for each `--epoch-updates`. Every answer is looked at: its status, its end, and
that the epochs of its headers never go back. In the end, cached answers are compared with what is computed afresh.
Prints how much of the prompts came out of the cache, by vLLM's own count.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from support import Daemon, Server  # noqa: E402 - the processes of the test suite, started as a user starts them
from tiny import WORDS, chat_model  # noqa: E402

PREFIX = " ".join(WORDS[7 * i % 50] for i in range(380))
TOKENS = 4


class Clients:
    """Threads that ask until `count` answers are there."""

    def __init__(self, url: str, count: int, threads: int) -> None:
        self.url, self.left = url, count
        self.faults: list[str] = []
        self.epochs: set[int] = set()
        self.kinds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def run(self) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        return time.perf_counter() - began

    def _run(self, seed: int) -> None:
        choose, last = random.Random(seed), -1
        with httpx.Client(base_url=self.url, timeout=600) as client:
            while True:
                with self._lock:
                    if not self.left:
                        return
                    self.left -= 1
                kind, stream = (
                    choose.choice(("chat/completions", "completions", "responses")),
                    choose.random() < 0.5,
                )
                text = f"{PREFIX} {choose.choice(WORDS)} {choose.choice(WORDS)}"
                try:
                    epoch = ask(client, kind, stream, text)
                    fault = f"epoch {epoch} after {last}" if epoch < last else ""
                    last = epoch
                except (httpx.HTTPError, ValueError, KeyError, IndexError, AssertionError) as error:
                    epoch, fault = last, repr(error)
                with self._lock:
                    self.epochs.add(epoch)
                    name = f"{kind}{', streamed' if stream else ''}"
                    self.kinds[name] = self.kinds.get(name, 0) + 1
                    if fault:
                        self.faults.append(f"{name}: {fault}")


def ask(client: httpx.Client, kind: str, stream: bool, text: str) -> int:
    """One request, whose answer has to be whole. Returns the epoch that its header names."""
    body: dict[str, Any] = {"model": "demo", "temperature": 0.7, "stream": stream}
    if kind == "responses":
        body |= {"input": text, "max_output_tokens": TOKENS}
    elif kind == "completions":
        body |= {"prompt": text, "max_tokens": TOKENS}
    else:
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS}
    with client.stream("POST", f"/v1/{kind}", json=body) as response:
        data = response.read().decode()
        assert response.status_code == 200, f"{response.status_code}: {data:.300}"
        if not stream:
            found = json.loads(data)
            assert found.get("choices") or found["output"] is not None
        elif kind == "responses":
            assert "event: response.completed" in data or "event: response.incomplete" in data, data[-300:]
        else:
            pieces = [line.removeprefix("data: ") for line in data.splitlines() if line]
            assert pieces[-1] == "[DONE]", data[-300:]
            assert all("error" not in json.loads(piece) for piece in pieces[:-1]), data[-300:]
        return int(response.headers["x-hogwild-epoch"])


def cache(server: Server) -> tuple[float, float]:
    """(looked up, found) prompt tokens since the server started."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    looked_up, found = (
        sum(float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total.* (\S+)$", text, re.M))
        for name in ("queries", "hits")
    )
    return looked_up, found


def compare(server: Server) -> int:
    """Answers out of the cache against answers that nothing can have been cached for; how many were compared."""
    for number in range(20):
        body = {"model": "demo", "prompt": f"{PREFIX} {WORDS[number]}", "max_tokens": 8, "temperature": 0}
        texts = [
            httpx.post(f"{server.url}/v1/completions", json={**body, **salt}, timeout=600).json()["choices"][
                0
            ]["text"]
            for salt in ({}, {}, {"cache_salt": f"nobody-else-{number}"})
        ]
        if len(set(texts)) != 1:
            sys.exit(f"the cache answers {texts[:2]}, computed afresh it is {texts[2]!r}")
    return 20


class Work(threading.Thread):
    """Keeps the daemon's queue full."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._daemon, self.over = daemon, threading.Event()

    def run(self) -> None:
        choose, number = random.Random(0), 0
        while not self.over.wait(1.0):
            if self._daemon.alive and sum(1 for _ in (self._daemon.spool / "incoming").glob("*.jsonl")) < 2:
                number += 1
                lines = [{"text": " ".join(choose.choices(WORDS, k=8)), "passes": 2} for _ in range(100)]
                self._daemon.drop(f"work-{number}.jsonl", lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="in all")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--epoch-updates", type=int, nargs="+", default=[8, 64])
    options = parser.parse_args()
    each, faults, answered = options.requests // (1 + len(options.epoch_updates)), [], 0
    print(
        "steps of an epoch | requests | faults | requests/s | epochs seen | requests an epoch | out of the cache"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = Server(chat_model(root / "model"), root / "server.log", root / "arena.sock")
        daemon: Daemon | None = None
        try:
            server.wait_ready()
            for steps in (0, *options.epoch_updates):
                work = None
                if steps:
                    daemon = Daemon(
                        root / "daemon",
                        root / "arena.sock",
                        training__epoch_updates=steps,
                        governor__policy="off",  # weights move as fast as they can, whoever waits
                    )
                    daemon.wait_for("training.started")
                    work = Work(daemon)
                    work.start()
                    daemon.wait_for("example.pass")
                before = cache(server)
                clients = Clients(server.url, each, options.clients)
                seconds = clients.run()
                looked_up, found = (now - then for now, then in zip(cache(server), before, strict=True))
                faults, answered = [*faults, *clients.faults], answered + sum(clients.kinds.values())
                print(
                    f"{steps or 'no training':>17} | {each:8} | {len(clients.faults):6} | {each / seconds:10.1f} | "
                    f"{len(clients.epochs):11} | {each / len(clients.epochs):17.1f} | {found / looked_up:.1%}",
                    flush=True,
                )
                if work is not None and daemon is not None:
                    work.over.set()
                    work.join()
                    code = daemon.terminate()
                    if code or daemon.events("guard.tripped"):
                        sys.exit(f"the daemon ended with {code}:\n{daemon.tail()}")
                    same = compare(server)
            print(
                f"{answered} answers, {len(faults)} faults; "
                f"after training, {same} of {same} cached answers are those that are computed afresh"
            )
        finally:
            for process in (daemon, server):
                if process is not None:
                    process.kill()
    if faults:
        sys.exit("\n".join(faults[:20]))


if __name__ == "__main__":
    main()
