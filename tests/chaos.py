"""Chaos: SIGKILL at random moments, of the daemon, the server or both, under a steady stream of drops.

    python tests/chaos.py [--kills 220] [--seconds 840] [--seed N] [--folder DIR]

A tiny model on the real vLLM, the real daemon, real signals. Both are forked from processes that have done the
imports (zygote.py), so that most of the time is spent in what can go wrong. Checkpoints follow each other closely, so
that kills land in them. After each kill, and in the end, everything is accounted for from outside: what was dropped,
what the ledger says, what the control page (which this process keeps mapped) has counted, what lies on disk, what is
served.

Prints a table. Exit code 1 if anything is violated. The seed is printed; it fixes what is done, not how threads and
processes interleave.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
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
import torch
from safetensors.torch import load_file

from hogwild import commands, generation
from hogwild.arena.control import ControlPage
from hogwild.errors import HogwildError
from hogwild.history import History
from hogwild.ledger import Ledger
from hogwild.ledger_schema import OWN
from hogwild.settings import Config
from hogwild.vllm_plugin import launch, page
from hogwild.vllm_plugin.names import PAGE_VARIABLE
from hogwild.weights import read_tensors
from support import environment, free_port
from tiny import WORDS, chat_model
from zygote import Forked, Zygote

THREADS = 2
SERVER_ARGUMENTS = (
    "--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4",
    "--kv-cache-memory-bytes", str(16 << 20), "--distributed-executor-backend", "uni",
    "--disable-log-stats", "--uvicorn-log-level", "warning",
)  # fmt: skip
SETTINGS = {
    "HOGWILD_TRAINING__THREADS": str(THREADS), "HOGWILD_TRAINING__PASSES": "2", "HOGWILD_OPTIMIZER__RANK": "8",
    "HOGWILD_CHECKPOINT__INTERVAL_S": "0", "HOGWILD_CHECKPOINT__INTERVAL_UPDATES": "6",
    "HOGWILD_METRICS__PORT": "0", "HOGWILD_PROBES__MARGIN": "50",  # random weights know nothing that could be lost
    "HOGWILD_CHECKPOINT__KEEP": "3", "HOGWILD_SPOOL__SETTLE_S": "0.2", "HOGWILD_SPOOL__RESCAN_INTERVAL_S": "0.5",
}  # fmt: skip
AIMS = ("any", "starting", "starting", "training", "saving", "rolling back")
KILLS_WHILE_LOADING = 3
BACKLOG = 40  # examples that wait
PATIENCE_S = 300.0  # nothing here is about how long something takes


@dataclass
class Arena:
    """What this process knows of one arena: its control page, and the counter when the daemon first took it."""

    control: ControlPage
    first_step: int | None = None
    kills: int = 0  # of a daemon that had it
    unrecorded: int = 0  # steps without a pass in the ledger, as of the last kill
    jumped: set[int] = field(
        default_factory=set
    )  # steps that it went past to those of a generation that came back


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)  # the last thing that a killed daemon had logged
    server_starts: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    generations: int = 0
    rollbacks: Counter[str] = field(default_factory=Counter)
    restores: int = 0
    requeued: int = 0
    repeated: int = 0


class Drops(threading.Thread):
    """Somebody who drops files, in every way that a file can arrive, and keeps a list of what was in them."""

    def __init__(self, spool: Path, seed: int, pause_s: float, backlog: Callable[[], int]) -> None:
        super().__init__(name="drops", daemon=True)
        self._backlog = backlog
        self._incoming, self._random, self._pause_s = spool / "incoming", random.Random(seed), pause_s
        self._outside = spool.parent / "outside"
        self._over = threading.Event()
        self.examples: dict[str, str] = {}  # id -> file
        self.files: dict[str, bytes] = {}
        self.duplicates: set[str] = set()  # files with the content of another

    def run(self) -> None:
        self._outside.mkdir(parents=True, exist_ok=True)
        self._incoming.mkdir(parents=True, exist_ok=True)
        number = 0
        while not self._over.wait(self._random.uniform(0.3, 1.7) * self._pause_s):
            if self._backlog() > BACKLOG and self._random.random() < 0.75:
                continue  # a stream that training can nearly keep up with, however slow the machine
            number += 1
            name = f"drop-{number:05d}.jsonl"
            if self.files and self._random.random() < 0.05:
                data = self.files[self._random.choice(sorted(self.files))]
                self.duplicates.add(name)
            else:
                data = self._content(name)
            self.files[name] = data
            self._put(name, data)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _content(self, name: str) -> bytes:
        lines = []
        for line in range(self._random.randint(1, 4)):
            one = f"{name}:{line}"
            text = " ".join(self._random.choices(WORDS, k=8))
            lines.append(json.dumps({"text": text, "id": one, "passes": self._random.randint(1, 3)}))
            self.examples[one] = name
        if self._random.random() < 0.1:
            lines.insert(self._random.randrange(len(lines) + 1), '{"text": 5}')
        return "".join(f"{line}\n" for line in lines).encode()

    def _put(self, name: str, data: bytes) -> None:
        target, outside, how = self._incoming / name, self._outside / name, self._random.random()
        if how < 0.2:  # a slow writer
            with target.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(0.05)
                file.write(data[len(data) // 2 :])
            return
        outside.write_bytes(data)
        if how < 0.3:
            target.hardlink_to(outside)
        elif how < 0.4:
            shutil.copy(outside, target)
        else:
            outside.rename(target)


class Chaos:
    """One run in `root`."""

    def __init__(self, root: Path, seed: int, say: Callable[[str], None] = print) -> None:
        self.root, self.state, self._say = root, root / "state", say
        self.settings = dict(SETTINGS)
        self._random = random.Random(seed)
        self.model = chat_model(root / "model")
        self.tally = Tally()
        self._base = environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1",
            OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0",
        )  # fmt: skip
        self._daemons, self._servers = Zygote("daemon", self._base), Zygote("server", self._base)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._http = httpx.Client(timeout=5.0, trust_env=False)
        self.daemon: Forked | None = None
        self.server: Forked | None = None
        self._log = root / "daemon.log"
        self._log.touch()
        self._log_from = 0
        self._arenas: dict[str, Arena] = {}
        self._least = 0  # generation that a server must be of, if it has come up since it was last set
        self._daemons_started = 0
        self._asked: list[tuple[int, int]] = []  # daemon, generation: rollbacks whose end nobody has heard of
        self._greeted = False
        self._since_server = 0  # kills
        self.drops = Drops(self.state / "spool", seed + 1, pause_s=0.8, backlog=self._backlog)

    # --- processes -------------------------------------------------------------------------------------------------

    def start_daemon(self) -> None:
        env = {
            **self._base,
            **self.settings,
            "HOGWILD_STATE_DIR": str(self.state),
            "HOGWILD_SOCKET": str(self.root / "arena.sock"),
        }
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        self._daemons_started += 1
        self.daemon = self._daemons.start(["hogwild", "serve"], env, self._log)

    def start_server(self) -> None:
        arguments = ["--port", str(self._port), *SERVER_ARGUMENTS]
        command = launch.command(str(self.model), arguments)[3:]
        env = launch.environment(
            self.root / "arena.sock", self.state, arguments, self._base, base_weights=False
        )
        os.environ[PAGE_VARIABLE] = env[PAGE_VARIABLE]
        self._least = min(self._current_generation(), *self._may_go_back_to(), 1 << 30)
        self._greeted, self._since_server = False, 0
        self.server = self._servers.start(["vllm", *command], env, self.root / "server.log")

    def _may_go_back_to(self) -> list[int]:
        """A rollback that waits for weights to be verified, or that the next daemon has to finish before it starts."""
        started = any(event["event"] == "daemon.started" for event in self.events())
        return [target for number, target in self._asked if number == self._daemons_started or not started]

    def events(self) -> list[dict[str, Any]]:
        """What the daemon that runs now (or ran last) has logged; its last line may be half-written."""
        with self._log.open("rb") as file:
            file.seek(self._log_from)
            lines = file.read().split(b"\n")[:-1]
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                self._violation(f"a line of the log is not JSON: {line[:200]!r}")
        return found

    def look(self) -> None:
        """Greet a server that is up, and map the control page of an arena that is new."""
        if self._greeted or self.server is None:
            return
        if not self.server.alive:
            self._violation(f"the server ended by itself: {self.root / 'server.log'}")
            self.start_server()
            return
        try:
            headers = self._http.get(f"{self.url}/health").raise_for_status().headers
            control, _ = page.ask()
        except (httpx.HTTPError, HogwildError):
            return
        self._arenas.setdefault(control.arena_id, Arena(control))
        self._greeted = True
        said = headers.get("x-hogwild-generation", "nothing")
        self.tally.server_starts.append(said)
        if not said.isdigit() or int(said) < self._least:
            self._violation(f"a server came up with generation {said}, {self._least} was complete before")

    def wait_for(self, *names: str, timeout_s: float) -> bool:
        """Until the daemon logs one of these; False if it does not in that time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.look()
            if any(event["event"] in names for event in self.events()):
                return True
            self._must_run()
            time.sleep(0.05)
        return False

    def _must_run(self) -> None:
        if self.daemon is not None and not self.daemon.alive:
            self._violation(f"the daemon ended by itself: {self.events()[-1:]}")
            self.start_daemon()

    # --- kills -----------------------------------------------------------------------------------------------------

    def kill(self, victims: str, aim: str) -> None:
        """Kill `victims` ("daemon", "server", "both") and start them again.

        Args:
            aim: "any" moment, or while the daemon is "starting", "training", "saving" or "rolling back".
        """
        self._wait_until(aim)
        self.look()
        daemon, server = self.daemon, self.server
        assert daemon is not None
        assert server is not None
        if victims in ("daemon", "both"):
            daemon.signal(signal.SIGKILL)
        if victims in ("server", "both"):
            server.signal(signal.SIGKILL)
        self.tally.kills[victims] += 1
        self._since_server += 1
        if victims != "server":
            daemon.kill()
            self._after_daemon(killed=True)
        if victims != "daemon":
            server.kill()
            self.start_server()
        if victims != "server":
            self.start_daemon()

    def come_back_alone(self) -> None:
        """Both are killed, and only the server comes back: it serves the newest checkpoint, and says so."""
        deadline = time.monotonic() + PATIENCE_S
        while self._current_generation() == 0 and time.monotonic() < deadline:
            self.look()
            self._must_run()
            time.sleep(0.1)
        daemon, server = self.daemon, self.server
        assert daemon is not None
        assert server is not None
        daemon.kill()
        self._after_daemon(killed=True)
        server.kill()
        self.tally.kills["both"] += 1
        self.daemon = None
        newest = self._current_generation()
        self.start_server()
        while not self._greeted and time.monotonic() < deadline + PATIENCE_S:
            self.look()
            time.sleep(0.1)
        status = self._http.get(f"{self.url}/hogwild/status").json()
        if newest == 0 or (status["generation"], status["daemon"]["alive"]) != (newest, False):
            self._violation(f"a server came back alone to generation {newest}, and says {status}")
        live = arena_bytes(self.server.pid) if self.server is not None else b""
        for name, tensor in read_tensors((self.state / "checkpoints" / "current").resolve()):
            if tensor.contiguous().view(torch.uint8).numpy().tobytes() not in live:
                self._violation(f"a server came back alone without the checkpoint's {name}")
        self.start_daemon()

    def _choose(self, server_share: float) -> str:
        """Whom to kill. While a server loads, few kills: nothing can be trained, and that is what kills should hit."""
        if not self._greeted and self._since_server >= KILLS_WHILE_LOADING:
            deadline = time.monotonic() + self._random.choice(
                (5.0, *(3 * [PATIENCE_S]))
            )  # the 5: it dies young
            while not self._greeted and time.monotonic() < deadline:
                self.look()
                self._must_run()
                time.sleep(0.1)
            if not self._greeted:
                return self._random.choice(("server", "both"))
        dice = self._random.random() if self._greeted else 1.0
        return "both" if dice < server_share / 2 else "server" if dice < server_share else "daemon"

    def _wait_until(self, aim: str) -> None:
        wait_s = self._random.uniform(0, 1.0 if aim == "starting" else 2.5)
        if not self._greeted:
            pass  # no server, so nothing is trained: any moment
        elif aim == "training":
            self.wait_for("example.pass", "example.trained", timeout_s=15)
        elif aim == "saving" and self.wait_for("example.pass", "example.trained", timeout_s=15):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not list(
                (self.state / "checkpoints").glob(".unfinished-*")
            ):
                time.sleep(0.001)
            wait_s = self._random.uniform(0, 0.05)
        elif aim == "rolling back" and self.wait_for("arena.attached", timeout_s=5):
            threading.Thread(target=self._ask_to_roll_back, daemon=True).start()
            wait_s = self._random.uniform(0, 0.4)
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0:
            self.look()
            self._must_run()
            time.sleep(min(left, 0.1))

    def _ask_to_roll_back(self) -> None:
        """To one of the last generations, with what is undone trained again."""
        target = max(self._current_generation() - self._random.randint(1, 4), 0)
        self._least = min(self._least, target)
        asked = (self._daemons_started, target)
        self._asked.append(asked)
        try:
            commands.send(self.root / "arena.sock", "rollback", generation=target, retrain=True)
            self.tally.rollbacks["done"] += 1
            self._asked.remove(asked)
        except HogwildError as error:
            self.tally.rollbacks["refused" if "no generation" in str(error) else "interrupted"] += 1

    def _after_daemon(self, *, killed: bool) -> None:
        """The daemon is dead: what does it leave?"""
        events = self.events()
        names = [event["event"] for event in events]
        self.tally.moments[names[-1] if names else "nothing logged yet"] += killed
        self._note_jumps(events)
        for event in events:
            if event["event"] in (
                "trainer.died",
                "daemon.failed",
                "guard.tripped",
                "arena.refused",
                "spool.failed",
            ):
                self._violation(f"the daemon logged {event}")
            if event["event"] == "ledger.requeued":
                self.tally.requeued += event["passes"]
            if event["event"] == "arena.attached":
                self.tally.restores += event["restored"] is not None
                self.tally.repeated += event["repeated"]
                if arena := self._arenas.get(event["arena"]):
                    arena.first_step = event["step"] if arena.first_step is None else arena.first_step
                    arena.kills += killed
                    self._count_steps(event["arena"], arena)
        self._check_checkpoint(self.state / "checkpoints" / "current")

    def _note_jumps(self, events: list[dict[str, Any]]) -> None:
        """A generation that comes back into an arena brings its counter, if that was further: steps that this arena has
        not made."""
        arena, before = None, 0
        for event in events:
            if event["event"] == "arena.stale":
                before = event["step"]
            elif event["event"] == "arena.attached":
                arena = self._arenas.get(event["arena"])
                if arena is not None and event["restored"] and before:
                    arena.jumped.update(range(before + 1, event["step"] + 1))
            elif event["event"] == "rollback.started" and event["live"] and arena is not None:
                made = self._step_of(event["generation"])  # also where a kill left no `rollback.done`
                arena.jumped.update(range(event["step"] + 1, made + 1))

    def _step_of(self, generation: int) -> int:
        name = f"generation-{generation:08d}"
        for path in (self.state / "history" / name, self.state / "checkpoints" / name / "hogwild"):
            if (path / "state.json").exists():
                return int(json.loads((path / "state.json").read_bytes())["step"])
        return 0  # the model as it came

    def _count_steps(self, arena_id: str, arena: Arena) -> None:
        """Steps that the arena has made, against those in the ledger: a kill costs one for each thread at most."""
        assert arena.first_step is not None
        steps = arena.control.steps
        with self._ledger() as ledger, ledger._db.read() as db:
            rows = db.execute("SELECT DISTINCT step FROM passes WHERE arena = ?", (arena_id,)).fetchall()
        recorded = {step for (step,) in rows}
        unrecorded = set(range(arena.first_step + 1, steps + 1)) - recorded - arena.jumped
        if stray := recorded - set(range(arena.first_step + 1, steps + 1)):
            self._violation(
                f"arena {arena_id}: the ledger has steps that were never made: {sorted(stray)[:5]}"
            )
        if len(unrecorded) - arena.unrecorded > THREADS:
            self._violation(
                f"arena {arena_id}: one kill left {len(unrecorded) - arena.unrecorded} steps unrecorded, not "
                f"{THREADS} at most"
            )
        arena.unrecorded = len(unrecorded)

    # --- checks ----------------------------------------------------------------------------------------------------

    def _ledger(self) -> Ledger:
        return Ledger(self.state / "ledger.sqlite", readonly=True)

    def _backlog(self) -> int:
        try:
            with self._ledger() as ledger:
                return ledger.counts().pending
        except HogwildError:  # there is none yet, or it is being made
            return 0

    def _violation(self, what: str) -> None:
        self.tally.violations.append(what)
        self._say(f"VIOLATION: {what}")

    def _current_generation(self) -> int:
        current = self.state / "checkpoints" / "current"
        return int(generation.read_state(current.resolve())["generation"]) if current.exists() else 0

    def _check_checkpoint(self, folder: Path) -> None:
        """Complete: a state, every tensor of the model, the optimizer's, the tokenizer."""
        if not os.path.lexists(folder):
            return
        try:
            generation.verify(folder.resolve())
            tensors = dict(read_tensors(folder.resolve()))
            load_file(folder / "hogwild" / "optimizer.safetensors")
            base = {name: tensor.shape for name, tensor in read_tensors(self.model)}
            if {name: tensor.shape for name, tensor in tensors.items()} != base:
                self._violation(f"{folder}: other tensors than the model's")
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                self._violation(f"{folder}: not finite")
            for file in ("config.json", "tokenizer.json"):
                if (folder / file).read_bytes() != (self.model / file).read_bytes():
                    self._violation(f"{folder}: {file} differs")
        except (OSError, HogwildError, ValueError) as error:
            self._violation(f"{folder}: {error!r}")

    def finish(self) -> None:
        """Let everything be trained, stop gracefully, and check the whole."""
        self.drops.stop()
        deadline, steps = time.monotonic() + PATIENCE_S, -1
        while time.monotonic() < deadline:
            self.look()
            self._must_run()
            if self._greeted and self._all_trained():
                break
            if (
                now := self._newest_pass()
            ) != steps:  # a busy machine takes long; a daemon that hangs makes no step
                deadline, steps = time.monotonic() + PATIENCE_S, now
            time.sleep(0.5)
        else:
            self._violation(
                f"nothing was trained for {PATIENCE_S:.0f} s, with some left: {self.events()[-3:]}"
            )
        daemon, server = self.daemon, self.server
        assert daemon is not None
        assert server is not None
        daemon.signal(signal.SIGTERM)
        if not daemon.wait(PATIENCE_S):
            self._violation("the daemon does not stop")
            daemon.kill()
        if self.events()[-1].get("code") != 0:
            self._violation(f"the daemon did not stop cleanly: {self.events()[-1]}")
        self._after_daemon(killed=False)
        self._account_for_drops()
        for folder in sorted((self.state / "checkpoints").iterdir()):
            if folder.name.startswith("."):
                self._violation(f"left behind: {folder}")
            elif folder.is_dir():
                self._check_checkpoint(folder)
        self._check_history()
        self._compare_live_weights(server)

    def _check_history(self) -> None:
        """Every generation comes back, with the checksums that it was saved with."""
        history = History.reading(Config(state_dir=self.state, socket=self.root / "arena.sock"))
        self.tally.generations = len(history.nodes())
        for number in history.nodes():
            target = self.root / "exported"
            try:
                history.export(number, target)
            except (OSError, HogwildError) as error:
                self._violation(f"generation {number} does not come back: {error}")
            shutil.rmtree(target, ignore_errors=True)

    def _newest_pass(self) -> int:
        with self._ledger() as ledger:
            return ledger.newest_pass()

    def _all_trained(self) -> bool:
        if any((self.state / "spool" / "incoming").glob("*.jsonl")):
            return False
        with self._ledger() as ledger:
            return ledger.is_idle()

    def _account_for_drops(self) -> None:
        spool = self.state / "spool"
        with self._ledger() as ledger, ledger._db.read() as db:
            found = Counter(name for (name,) in db.execute("SELECT name FROM examples"))
            wrong = db.execute(
                "SELECT name, state, passes, passes_done, (SELECT count(*) FROM passes p"
                f" WHERE p.example_id = e.example_id AND NOT p.undone AND {OWN}) AS counted FROM examples e"
                " WHERE state <> 'durable' OR passes_done <> passes OR passes_done <> counted"
            ).fetchall()
        for what, names in (
            ("lost", set(self.drops.examples) - set(found)),
            ("accepted more than once", {name for name, count in found.items() if count > 1}),
            ("never dropped", set(found) - set(self.drops.examples)),
        ):
            if names:
                self._violation(f"examples {what}: {sorted(names)[:10]}")
        if wrong:
            self._violation(f"not durable with all passes: {wrong[:10]}")
        places = Counter(
            path.name.removesuffix(".errors.jsonl").split(".")[0]
            for folder in ("incoming", "done", "failed", ".moving")
            for path in (spool / folder).glob("*.jsonl")
            if not path.name.endswith(".errors.jsonl")
        )
        wanted = Counter(name.split(".")[0] for name in self.drops.files)
        if places != wanted:
            self._violation(
                f"files that are not in one place: {sorted((places - wanted) + (wanted - places))[:10]}"
            )
        leftovers = [
            *(spool / ".moving").iterdir(),
            *(spool / "failed").glob(".*"),
            *self.state.glob("*.tmp"),
        ]
        if leftovers:
            self._violation(f"left behind: {leftovers}")

    def _compare_live_weights(self, server: Forked) -> None:
        """After a graceful stop, memory and checkpoint are equal bit for bit."""
        live = arena_bytes(server.pid)
        for name, tensor in read_tensors((self.state / "checkpoints" / "current").resolve()):
            if tensor.contiguous().view(torch.uint8).numpy().tobytes() not in live:
                self._violation(f"live weights and final checkpoint differ: {name}")
        status = self._http.get(f"{self.url}/hogwild/status").json()
        if status["generation"] != self._current_generation():
            self._violation(
                f"the server says generation {status['generation']}, {self._current_generation()} is saved"
            )

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self, kills: int, seconds: float, server_share: float) -> Tally:
        """Kill until there were `kills` of them, or `seconds` are over; then finish."""
        began = time.monotonic()
        try:
            self.drops.start()
            self.start_server()
            self.start_daemon()
            if not self.wait_for("training.started", timeout_s=PATIENCE_S):
                self._violation("training did not start at all")
            began = time.monotonic()
            while sum(self.tally.kills.values()) < kills and time.monotonic() - began < seconds:
                self.kill(self._choose(server_share), self._random.choice(AIMS))
            self.come_back_alone()
            if sum(self.tally.kills.values()) < kills:
                self._violation(f"only {sum(self.tally.kills.values())} of {kills} kills in {seconds:.0f} s")
            self.finish()
        finally:
            self.end()
            self._say(self.table(time.monotonic() - began))
        return self.tally

    def end(self) -> None:
        self.drops._over.set()
        for process in (self.daemon, self.server):
            if process is not None:
                process.kill()
        self._daemons.close()
        self._servers.close()
        self._http.close()

    def table(self, seconds: float) -> str:
        with self._ledger() as ledger, ledger._db.read() as db:
            passes, undone = db.execute("SELECT count(*), coalesce(sum(undone), 0) FROM passes").fetchone()
            checkpoints = db.execute("SELECT count(*) FROM checkpoints").fetchone()[0]
        daemon_kills = sum(arena.kills for arena in self._arenas.values())
        rows = [
            ("seconds", f"{seconds:.0f}"),
            ("kills", f"{sum(self.tally.kills.values())} ({dict(self.tally.kills)})"),
            ("daemons killed that had the arena, rollbacks", f"{daemon_kills}, {dict(self.tally.rollbacks)}"),
            ("last word of a killed daemon", ", ".join(f"{k} {v}" for k, v in self.tally.moments.most_common())),
            ("servers came up with generation", ", ".join(self.tally.server_starts)),
            ("files dropped", f"{len(self.drops.files)}, {len(self.drops.duplicates)} of them twice the same content"),
            ("examples dropped", str(len(self.drops.examples))),
            ("arenas, checkpoints restored", f"{len(self._arenas)}, {self.tally.restores}"),
            ("checkpoints completed", f"{checkpoints}; {self.tally.generations} generations come back from history"),
            ("passes recorded, undone with lost weights", f"{passes}, {undone}"),
            ("steps in the weights that no pass records (trained twice)",
             f"{sum(arena.unrecorded for arena in self._arenas.values())}"
             f" (bound: {THREADS} x {daemon_kills} kills of a daemon on a living arena)"),
            ("violations", str(len(self.tally.violations))),
        ]  # fmt: skip
        return "\n".join(f"  {name:58} {value}" for name, value in rows)


def arena_bytes(session: int) -> bytes:
    """The weights that a server serves, from the memory of its engine, which is a process of the same session."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                for fd in (entry / "fd").iterdir():
                    if str(fd.readlink()).startswith("/memfd:hogwild-weights"):
                        return fd.read_bytes()
    raise AssertionError("the server has no arena")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument(
        "--server-share", type=float, default=0.05, help="kills that hit the server, alone or with it"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument(
        "--folder", type=Path, help="kept afterwards; default: a temporary one, kept on a violation"
    )
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="hogwild-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    print(f"seed {given.seed}, folder {root}", flush=True)
    tally = Chaos(root, given.seed).run(given.kills, given.seconds, given.server_share)
    if not tally.violations and given.folder is None:
        shutil.rmtree(root)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
