"""A day in 20 minutes: requests, drops, checkpoints, rollbacks and restarts, all at once, against real processes.

    python tests/soak.py [--seconds 1200] [--seed N] [--folder DIR]

A tiny model on the real vLLM and the real daemon, as in chaos.py, but nobody is killed: what is asked of a service on
an ordinary day, far more often. Clients stream and do not, files arrive, checkpoints and rollbacks are asked for,
the configuration is read again, metrics are scraped, daemon and server are restarted in an orderly way. Watched for as
long as each process lives: memory and descriptors. In the end everything that was dropped is accounted for.

Prints a table. Exit code 1 if anything is violated.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import chaos
from hogwild import commands
from hogwild.errors import HogwildError
from hogwild.report import page as report_page
from hogwild.settings import Config
from support import free_port
from tiny import WORDS
from zygote import Forked

SAMPLE_S = 2.0
LONG_ENOUGH_S = 90.0  # a life that is judged
WARM_UP = 1 / 3  # of a life, not judged
GROWTH, GROWTH_MIB, MORE_DESCRIPTORS = 1.10, 24, 6
CLIENTS = 2
ERRORS = ("trainer.died", "daemon.failed", "arena.refused", "spool.failed", "checkpoint.failed", "history.failed",
          "guard.stuck", "python.uncaught", "status.unwritten", "preparation.failed")  # fmt: skip
SETTINGS = {
    "HOGWILD_CHECKPOINT__INTERVAL_UPDATES": "40", "HOGWILD_HISTORY__KEEP": "12", "HOGWILD_HISTORY__BASE_EVERY": "4",
    "HOGWILD_PROBES__MARGIN": "50", "HOGWILD_PROBES__EVERY_UPDATES": "50",  # random weights know nothing to be lost
    "HOGWILD_TRAINING__LOW_PRIORITY": "false",  # or nothing is trained on a machine that is never idle
}  # fmt: skip
THINGS = ("checkpoint", "checkpoint", "rollback", "rollback to the model as it came", "USR1", "HUP", "status", "scrape",
          "report")  # fmt: skip


@dataclass
class Life:
    """What one process took, over time: (seconds, private MiB, open descriptors)."""

    name: str
    points: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.points[-1][0] - self.points[0][0] if self.points else 0.0

    def parts(self) -> tuple[list[tuple[float, float, int]], list[tuple[float, float, int]]]:
        """What comes after the warm-up, in two halves."""
        settled = self.points[int(len(self.points) * WARM_UP) :]
        return settled[: len(settled) // 2], settled[len(settled) // 2 :]

    def problems(self) -> list[str]:
        """Memory that grows, descriptors that leak; none of a life that was too short to tell."""
        if self.seconds < LONG_ENOUGH_S:
            return []
        early, late = self.parts()
        found = []
        was, now = (statistics.median(mib for _, mib, _ in part) for part in (early, late))
        if now > was * GROWTH + GROWTH_MIB:
            found.append(
                f"{self.name}: private memory grew from {was:.0f} to {now:.0f} MiB in {self.seconds:.0f} s"
            )
        had, has = (statistics.median(fds for _, _, fds in part) for part in (early, late))
        if has > had + MORE_DESCRIPTORS:
            found.append(f"{self.name}: {had:.0f} descriptors became {has:.0f} in {self.seconds:.0f} s")
        return found

    def __str__(self) -> str:
        if self.seconds < LONG_ENOUGH_S:
            return f"{self.seconds:.0f} s"
        early, late = self.parts()
        (was, now), (had, has) = (
            [statistics.median(point[column] for point in part) for part in (early, late)]
            for column in (1, 2)
        )
        return f"{self.seconds:.0f} s: {was:.0f} to {now:.0f} MiB, {had:.0f} to {has:.0f} descriptors"


class Requests(threading.Thread):
    """A client: completions and chats, streamed and not. Minds every fault while the server is meant to be up."""

    def __init__(self, url: str, seed: int, up: threading.Event) -> None:
        super().__init__(name=f"client-{seed}", daemon=True)
        self._url, self._random, self._up = url, random.Random(seed), up
        self.over = threading.Event()
        self.answers: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=120.0, trust_env=False) as http:
            while not self.over.is_set():
                if not self._up.wait(0.5):
                    continue
                stream, chat = self._random.random() < 0.5, self._random.random() < 0.5
                words = " ".join(self._random.choices(WORDS, k=6))
                body: dict[str, Any] = {
                    "model": "tiny",
                    "max_tokens": 12,
                    "stream": stream,
                    "temperature": 0.5,
                }
                body |= {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
                path = "/v1/chat/completions" if chat else "/v1/completions"
                try:
                    answer = http.post(f"{self._url}{path}", json=body).raise_for_status()
                    if stream and not answer.text.rstrip().endswith("[DONE]"):
                        raise ValueError(f"a stream that does not end: {answer.text[-100:]!r}")
                    self.answers["streamed" if stream else "whole"] += 1
                except (httpx.HTTPError, ValueError) as error:
                    if self._up.is_set():  # not cut off by a restart
                        self.faults.append(repr(error)[:200])
                self.over.wait(self._random.uniform(0, 0.3))


class Soak(chaos.Chaos):
    """One run in `root`."""

    def __init__(self, root: Path, seed: int, say: Callable[[str], None] = print) -> None:
        super().__init__(root, seed, say)
        self._metrics = free_port()
        self.settings |= {**SETTINGS, "HOGWILD_METRICS__PORT": str(self._metrics)}
        self._server_up = threading.Event()
        self.clients = [Requests(self.url, seed + n, self._server_up) for n in range(CLIENTS)]
        self.lives: list[Life] = []
        self.done: Counter[str] = Counter()
        self._lines = 0
        self._sampled = threading.Event()  # enough

    def run_for(self, seconds: float) -> list[str]:
        """An ordinary day; returns what was violated."""
        began = time.monotonic()
        sampling = threading.Thread(target=self._sample, daemon=True)
        try:
            self.drops.start()
            self.start_server()
            self.start_daemon()
            if not self.wait_for("training.started", timeout_s=chaos.PATIENCE_S):
                self._violation("training did not start at all")
            self._server_up.set()
            sampling.start()
            for client in self.clients:
                client.start()
            self._day(time.monotonic() + seconds, seconds)
            for client in self.clients:
                client.over.set()
            self._server_up.wait(chaos.PATIENCE_S)
            self.finish()
            self._judge()
        finally:
            self._server_up.clear()
            for client in self.clients:
                client.over.set()
            self.end()
            self._say(self.table(time.monotonic() - began))
        return self.tally.violations

    def _day(self, until: float, seconds: float) -> None:
        """Something every few seconds; each process is restarted a few times, and then left alone to be watched."""
        daemon_at = [until - seconds * share for share in (0.75, 0.55)]
        server_at = [until - seconds * 0.65]
        while (now := time.monotonic()) < until:
            self.look()
            self._must_run()
            if daemon_at and now > daemon_at[0]:
                daemon_at.pop(0)
                self._restart_daemon()
            elif server_at and now > server_at[0]:
                server_at.pop(0)
                self._restart_server()
            else:
                self._something()
            time.sleep(self._random.uniform(0.5, 3.0))

    def _something(self) -> None:
        what = self._random.choice(THINGS)
        daemon = self.daemon
        assert daemon is not None
        attached = any(event["event"] == "arena.attached" for event in self.events())
        try:
            if what == "checkpoint":
                commands.send(self.root / "arena.sock", "checkpoint")
            elif what == "rollback":
                self._ask_to_roll_back()
            elif what == "rollback to the model as it came":
                if self._random.random() < 0.3:
                    self._least = 0
                    commands.send(self.root / "arena.sock", "rollback", generation=0, retrain=True)
            elif what == "USR1":
                daemon.signal(signal.SIGUSR1)
            elif what == "HUP":
                daemon.signal(signal.SIGHUP)
            elif what == "status":
                json.loads((self.state / "status.json").read_text())
            elif what == "scrape":
                httpx.get(f"http://127.0.0.1:{self._metrics}/metrics", trust_env=False).raise_for_status()
            else:
                self._report()
            self.done[what] += 1
        except HogwildError as error:
            self.done[f"{what} refused"] += 1
            early = not attached and "no server has brought its weights yet" in str(error)
            if not early and "no generation" not in str(error):
                self._violation(f"{what}: {error}")
        except FileNotFoundError:
            self.done[f"{what} too early"] += 1
        except httpx.HTTPError as error:
            self._violation(f"{what}: {error!r}")

    def _report(self) -> None:
        page = report_page(Config(state_dir=self.state, socket=self.root / "arena.sock"))
        (self.root / "report.html").write_text(page)

    def _restart_daemon(self) -> None:
        daemon = self.daemon
        assert daemon is not None
        daemon.signal(signal.SIGTERM)
        if not daemon.wait(chaos.PATIENCE_S):
            self._violation("the daemon does not stop")
            daemon.kill()
        self._check_log()
        self._after_daemon(killed=False)
        self.start_daemon()
        self.done["restart of the daemon"] += 1

    def _restart_server(self) -> None:
        server = self.server
        assert server is not None
        self._server_up.clear()
        server.signal(signal.SIGTERM)
        if not server.wait(chaos.PATIENCE_S):
            self._violation("the server does not stop")
        server.kill()
        self.start_server()
        deadline = time.monotonic() + chaos.PATIENCE_S
        while not self._greeted and time.monotonic() < deadline:
            self.look()
            time.sleep(0.2)
        self._server_up.set()
        self.done["restart of the server"] += 1

    def _check_log(self) -> None:
        """Every line of the daemon that has ended is one JSON object (`events` minds that), and none is an error."""
        for event in self.events():
            self._lines += 1
            if event["event"] in ERRORS:
                self._violation(f"the daemon logged {event}")

    def finish(self) -> None:
        super().finish()
        self._check_log()

    def _sample(self) -> None:
        """Memory and descriptors of both, for as long as they live."""
        lives: dict[str, tuple[Forked, Life]] = {}
        while not self._sampled.wait(SAMPLE_S):
            for name, process in (("daemon", self.daemon), ("server", self.server)):
                if (
                    process is None
                    or not process.alive
                    or (name == "server" and not self._server_up.is_set())
                ):
                    continue
                known = lives.get(name)
                if known is None or known[0] is not process:
                    lives[name] = known = process, Life(f"{name} {process.pid}")
                    self.lives.append(known[1])
                try:
                    known[1].points.append(
                        (time.monotonic(), private_mib(process.pid), descriptors(process.pid))
                    )
                except OSError:  # it has just ended
                    continue

    def end(self) -> None:
        self._sampled.set()
        super().end()

    def _judge(self) -> None:
        for life in self.lives:
            for problem in life.problems():
                self._violation(problem)
        for client in self.clients:
            for fault in client.faults[:5]:
                self._violation(f"a request failed: {fault}")
        if not all(client.answers for client in self.clients):
            self._violation("a client got no answer at all")

    def table(self, seconds: float) -> str:
        answers = sum((client.answers for client in self.clients), Counter())
        more = [
            ("requests answered, failed", f"{dict(answers)}, {sum(len(c.faults) for c in self.clients)}"),
            ("asked for", ", ".join(f"{name} {count}" for name, count in sorted(self.done.items()))),
            ("lines of the log, each valid JSON", str(self._lines)),
            *((f"memory and descriptors of {life.name}", str(life)) for life in self.lives),
        ]
        return "\n".join([super().table(seconds), *(f"  {name:58} {value}" for name, value in more)])


def private_mib(session: int) -> float:
    """Resident memory that no other process shares, of every process of a session."""
    return sum(_private_kib(pid) for pid in members(session)) / 1024


def descriptors(session: int) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in members(session))  # noqa: PTH208


def members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def _private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument(
        "--folder", type=Path, help="kept afterwards; default: a temporary one, kept on a violation"
    )
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="hogwild-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    print(f"seed {given.seed}, folder {root}", flush=True)
    violations = Soak(root, given.seed).run_for(given.seconds)
    if not violations and given.folder is None:
        shutil.rmtree(root)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
