"""Fault sweep: SIGKILL, EIO and ENOSPC at every write, fsync, rename, unlink and their kin.

    python tests/faults.py [--stride N] [--only accept,save,rollback]

For each call that accepting files, saving a checkpoint (with history and pruning) or rolling back makes, the work is
done once more from the same state with strace making just that call fail, or killing the process at it. Then a new
process starts on what is left, as the daemon would, and everything that had been acknowledged must be there, and
nothing torn. An error that is not a kill is followed by what the daemon does: it goes on, or ends and is started again.

Work runs in children forked from this process, which has done the imports and nothing else. Needs strace, and the right
to trace a child.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forks import renew_autograd
from hogwild import generation, log
from hogwild.arena.client import Arena
from hogwild.errors import CheckpointError, HogwildError, LedgerError
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_identity import MARK
from hogwild.weights import Weights, load_arena
from studio import Studio, model

CALLS = (
    "write", "pwrite64", "fsync", "fdatasync", "rename", "unlink", "unlinkat", "rmdir", "symlink", "mkdir", "ftruncate",
)  # fmt: skip
RARE = 25
FAULTS = ("SIGKILL", "EIO", "ENOSPC")

Tell = Callable[[str], None]
LINE = '{{"text": "w1 w2 w{}", "id": "{}"}}\n'


# --- accepting files -----------------------------------------------------------------------------------------------

DROPS = {
    "good.jsonl": (LINE.format(3, "g1") + LINE.format(4, "g2")).encode(),
    "mixed.jsonl": (LINE.format(5, "m1") + '{"text": 5}\n').encode(),
    "bad.jsonl": b"nothing\n",
    "packed.jsonl.gz": gzip.compress(LINE.format(6, "p1").encode(), mtime=0),
    "again.jsonl": (LINE.format(3, "g1") + LINE.format(4, "g2")).encode(),  # the content of good.jsonl
}
GOOD = {"g1", "g2", "m1", "p1"}


class Accept:
    """Five files, one of them half bad, one all bad, one compressed, one a duplicate."""

    name = "accept"

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        spool = self._spool(Ledger(self.root / "state" / "ledger.sqlite"))
        spool.prepare()
        for number, (name, data) in enumerate(DROPS.items()):
            (spool.incoming / name).write_bytes(data)
            os.utime(spool.incoming / name, (number, number))  # taken in this order

    def _spool(self, ledger: Ledger, tell: Tell = lambda _word: None) -> Spool:
        folder = self.root / "state" / "spool"
        return Spool(
            SpoolConfig(dir=folder, settle_s=0),
            ledger,
            passes=1,
            on_accepted=lambda record: tell(record.name),
        )

    def act(self, tell: Tell) -> Callable[[], None]:
        spool = self._spool(Ledger(self.root / "state" / "ledger.sqlite"), tell)
        spool.prepare()

        def work() -> None:
            for _ in range(3):  # an error heals with the next scan, as in `Spool.run`
                try:
                    spool.prepare()
                    spool.scan_once()
                except OSError:
                    continue

        return work

    def check(self, told: list[str]) -> Iterator[str]:
        folder = self.root / "state" / "spool"
        with Ledger(self.root / "state" / "ledger.sqlite") as ledger:
            accepted = {record.name for record in ledger.files()}
            if missing := set(told) - accepted:
                yield f"acknowledged and not in the ledger: {missing}"
            places = [path for path in folder.rglob("*") if path.is_file()]
            for name, data in DROPS.items():
                if sum(path.read_bytes() == data for path in places) != 1 + (
                    name in ("good.jsonl", "again.jsonl")
                ):
                    yield f"{name}: not in one place: {places}"
            for _ in range(3):
                spool = self._spool(ledger)
                spool.prepare()
                spool.scan_once()
            with ledger._db.read() as db:
                names = sorted(name for (name,) in db.execute("SELECT name FROM examples"))
                if names != sorted(GOOD):
                    yield f"examples {names}, not {sorted(GOOD)}"
                if damage := [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]:
                    yield f"the ledger is damaged: {damage}"
                if wrong := db.execute("SELECT * FROM files WHERE state = 'staging' OR NOT moved").fetchall():
                    yield f"unfinished files: {wrong}"
        left = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.name != MARK
        )
        done = [f"done/{name}" for name in DROPS if name not in ("bad.jsonl", "again.jsonl")]
        again = [name for name in left if name.startswith("done/again")]
        errors = ["failed/bad.jsonl.errors.jsonl", "failed/mixed.jsonl.errors.jsonl"]
        if left != sorted([*done, *again, "failed/bad.jsonl", *errors]) or len(again) != 1:
            yield f"the spool holds {left}"
        for name in errors:
            if [json.loads(line)["file"] for line in (folder / name).read_text().splitlines()] != [
                name.removeprefix("failed/").removesuffix(".errors.jsonl")
            ]:
                yield f"{name} is torn: {(folder / name).read_text()}"


# --- checkpoints ---------------------------------------------------------------------------------------------------


class OnArena:
    """Work on a tiny model: three generations saved, and some passes since."""

    settings: dict[str, Any] = {"checkpoint.keep": 1}  # noqa: RUF012

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arena = load_arena(model(root / "model"))
        self._as_prepared, self._trained = (b"", b""), ""

    def prepare(self) -> None:
        def work() -> None:
            studio = Studio(self.root, self.arena, **self.settings)
            known = {}
            for name in ("a", "b", "c"):
                studio.drop(name, 2)
                studio.train()
                number = studio.save()
                known[number] = {"bits": fingerprint(self.arena), "states": studio.states()}
            studio.drop("d", 2)
            studio.train()
            (self.root / "known.json").write_text(json.dumps(known))
            studio.close()

        preload(work)

    def keep_arena(self) -> None:
        self._as_prepared = bytes(self.arena.weights.mapping), bytes(self.arena.control.segment.mapping)
        self._trained = fingerprint(self.arena)

    def restore_arena(self) -> None:
        self.arena.weights.mapping[:], self.arena.control.segment.mapping[:] = self._as_prepared

    def known(self) -> dict[int, dict[str, Any]]:
        return {int(key): value for key, value in json.loads((self.root / "known.json").read_text()).items()}

    def _whole(self, studio: Studio) -> Iterator[str]:
        """What must hold after any start."""
        current = studio.keeper.checkpoints.current()
        assert current is not None
        generation.verify(current)
        for number, folder in studio.keeper.checkpoints.folders().items():
            generation.verify(folder)
            if number in self.known() and fingerprint(load_arena(folder)) != self.known()[number]["bits"]:
                yield f"generation {number} on disk has other bits"
        studio.keeper.tidy()
        history = studio.keeper.history
        if missing := set(self.known()) - set(history.nodes()):
            yield f"history has lost generations {missing}"
        for number, known in self.known().items():
            target = self.root / "exported"
            shutil.rmtree(target, ignore_errors=True)
            history.export(number, target)
            if fingerprint(load_arena(target)) != known["bits"]:
                yield f"generation {number} comes back with other bits"
        for folder in (studio.keeper.checkpoints.root, history.root):
            if left := sorted(folder.rglob(".unfinished*")):
                yield f"left behind: {left}"


class Save(OnArena):
    """The next generation: begin, write, point `current` at it, tell the ledger, note it in history, prune."""

    name = "save"

    def act(self, tell: Tell) -> Callable[[], None]:
        studio = Studio(self.root, self.arena, **self.settings)

        def work() -> None:
            about = {"base_path": str(studio.model), "base_digest": studio.ledger.get_meta("base_digest")}
            for _ in range(2):  # a disk that was full for a moment: the next one is tried when it is due
                saved = studio.keeper.save(studio.learner, {**about, "config": {}})
                if not isinstance(saved, CheckpointError):
                    tell(str(saved.generation))
                    studio.keeper.tidy()
                    break
            studio.keeper.tidy()

        return work

    def check(self, told: list[str]) -> Iterator[str]:
        """Arena and daemon are gone: everything comes from disk."""
        studio = Studio(self.root, **self.settings)
        number = studio.keeper.checkpoints.current_generation()
        if told and number != int(told[-1]):
            yield f"generation {told[-1]} was acknowledged, {number} is current"
        if number is None or number < 3:
            yield f"generation {number} is current, 3 was before"
        expected = self.known()[3]["bits"] if number == 3 else self._trained
        if fingerprint(studio.arena) != expected:
            yield f"the weights are not those of generation {number}"
        states = studio.states()
        if states["durable"] != (6 if number == 3 else 8) or sum(states.values()) != 8:
            yield f"generation {number} is current and the ledger says {states}"
        yield from self._whole(studio)
        studio.close()


class Rollback(OnArena):
    """From generation 3 (and what was trained since) to generation 1, in the weights that a server has mapped."""

    name = "rollback"

    def act(self, tell: Tell) -> Callable[[], None]:
        studio = Studio(self.root, self.arena, **self.settings)

        def work() -> None:
            for _ in range(2):
                try:
                    tell(str(studio.roll_back(1)["generation"]))
                    return
                except CheckpointError:  # refused before anything has changed; or the daemon ends
                    if studio.ledger.get_meta("rollback"):
                        raise

        return work

    def check(self, told: list[str]) -> Iterator[str]:
        """The server has kept the arena."""
        before = self.arena.control.steps, self.arena.control.epoch
        studio = Studio(self.root, self.arena, **self.settings)
        number = studio.keeper.checkpoints.current_generation()
        if number not in (1, 3) or (told and number != 1):
            yield f"generation {number} is current, acknowledged was {told}"
        bits, states = fingerprint(self.arena), studio.states()
        if number == 1:
            if bits != self.known()[1]["bits"]:
                yield "the served weights are not those of generation 1"
            if states != {"pending": 0, "trained": 0, "durable": 2, "failed": 0, "undone": 6}:
                yield f"the ledger says {states}"
        elif bits not in (self.known()[3]["bits"], self._trained):
            yield "the served weights are neither what they were nor a generation"
        elif states["undone"] or sum(states.values()) != 8:
            yield f"nothing was rolled back, and the ledger says {states}"
        if (self.arena.control.steps, self.arena.control.epoch) < before or self.arena.control.restoring:
            yield "a counter went backwards, or the arena is still marked as half-written"
        yield from self._whole(studio)
        studio.close()


def fingerprint(arena: Arena) -> str:
    """Of all weights, wherever they lie."""
    total = hashlib.sha256()
    weights = Weights(arena)
    for name in weights.names:
        total.update(weights.view(name).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# --- running it ----------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked process; threads that it starts never come into this one."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            begin_child()
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child failed"


def preload(work: Callable[[], None]) -> None:
    """Import here, once, what `work` makes a child import: each child would otherwise do it again."""
    reader, writer = socket.socketpair()

    def tell() -> None:
        work()
        writer.sendall("\n".join(sys.modules).encode())
        writer.close()

    with reader, writer:
        in_child(tell)
        writer.close()
        with reader.makefile() as names:
            for name in names.read().split():
                if name not in sys.modules and not name.startswith("__"):
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)


def begin_child() -> None:
    """First in a forked child: no log on stdout, for its writes would be among those that fail."""
    renew_autograd()
    log.configure("error", "json")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@dataclass
class Injection:
    call: str
    fault: str
    when: int

    def option(self) -> str:
        what = "signal=SIGKILL" if self.fault == "SIGKILL" else f"error={self.fault}"
        return f"inject={self.call}:{what}:when={self.when}"

    def __str__(self) -> str:
        return f"{self.fault} at {self.call} number {self.when}"


class Sweep:
    def __init__(self, root: Path, scenario: Any) -> None:
        self.root, self.scenario = root, scenario
        self.state, self.template = root / "state", root / "template"
        scenario.prepare()
        if isinstance(scenario, OnArena):
            scenario.keep_arena()
        self.state.rename(self.template)

    def counts(self) -> dict[str, int]:
        """How often each call is made when nothing fails."""
        _, _, trace = self.run(None)
        found = Counter(line.split("(", 1)[0].split()[-1] for line in trace.splitlines() if "(" in line)
        return {call: found[call] for call in CALLS if found[call]}

    def run(self, injection: Injection | None) -> tuple[list[str], list[str], str]:
        """(what was acknowledged, what is wrong afterwards, the trace)."""
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(self.template, self.state, symlinks=True)
        if isinstance(self.scenario, OnArena):
            self.scenario.restore_arena()
        told, trace = self._act(injection)
        return told, self._check(told), trace

    def _act(self, injection: Injection | None) -> tuple[list[str], str]:
        ours, theirs = socket.socketpair()  # not a pipe: write(2) is among the calls that fail
        child = os.fork()
        if child == 0:
            ours.close()
            code = 1
            try:
                begin_child()
                work = self.scenario.act(lambda word: theirs.send(f"{word}\n".encode()))
                theirs.send(b"ready\n")
                theirs.recv(1)
                work()
                code = 0
            except (HogwildError, LedgerError, OSError):
                code = 3  # the daemon says why and ends
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
        theirs.close()
        with ours, ours.makefile() as said:
            assert said.readline() == "ready\n", "the scenario does not come to its start"
            tracer = self._trace(child, injection)
            ours.send(b"x")
            told = said.read().split()
        _, status = os.waitpid(child, 0)
        tracer.wait()
        trace = (self.root / "trace").read_text()
        if injection is None or "INJECTED" not in trace:
            assert status == 0 or (injection and injection.fault == "SIGKILL"), (
                f"{injection}: status {status}"
            )
        else:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 3, -signal.SIGKILL), f"{injection}: exit code {code}"
        return told, trace

    def _trace(self, child: int, injection: Injection | None) -> "subprocess.Popen[bytes]":
        command = ["strace", "-f", "-qq", "-o", str(self.root / "trace"), "-p", str(child)]
        command += ["-e", f"trace={injection.call if injection else ','.join(CALLS)}"]
        if injection:
            command += ["-e", injection.option()]
        tracer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            assert tracer.poll() is None, "strace cannot attach to a child"
            time.sleep(0.002)
        return tracer

    def _check(self, told: list[str]) -> list[str]:
        """In a process of its own, as the daemon that is started next."""
        report = self.root / "report.json"
        report.unlink(missing_ok=True)

        def work() -> None:
            problems = []
            try:
                problems = list(self.scenario.check(told))
            except Exception as error:
                problems = [f"the next start fails: {error!r}"]
            report.write_text(json.dumps(problems))

        in_child(work)
        found: list[str] = json.loads(report.read_text())
        return found


def possible() -> str:
    """Why faults cannot be injected here; "" if they can."""
    if shutil.which("strace") is None:
        return "needs strace (apt-get install strace)"
    done = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"strace may not trace: {done.stderr.decode()[-200:]}"


SCENARIOS: tuple[type, ...] = (Accept, Save, Rollback)


def sweep(name: str, stride: int, say: Callable[[str], None] = print) -> tuple[int, list[str]]:
    """Sweep one scenario; returns how many faults there were, and what was wrong after them.

    Args:
        stride: every so many-th call site of the frequent calls (writes), eight times as many of the rare ones.
    """
    torch.set_num_threads(1)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="hogwild-faults-", dir=base))
    runs, problems = 0, []
    try:
        chosen = next(kind for kind in SCENARIOS if kind.name == name)  # type: ignore[attr-defined]
        one = Sweep(root, chosen(root))
        counts = one.counts()
        say(f"{name}: {', '.join(f'{count} {call}' for call, count in counts.items())}")
        seen = {False: 0, True: 0}
        for fault in FAULTS:
            for call, count in counts.items():
                rare, injected = count <= RARE, 0
                for when in range(1, count + 1):
                    seen[rare] += 1
                    if seen[rare] % (max(stride // 8, 1) if rare else stride):
                        continue
                    injection = Injection(call, fault, when)
                    _, wrong, trace = one.run(injection)
                    runs += 1
                    injected += "INJECTED" in trace or "killed by SIGKILL" in trace
                    for problem in wrong:
                        problems.append(f"{name}: {injection}: {problem}")
                        say(f"VIOLATION {problems[-1]}")
                if stride == 1 and injected < count:
                    say(f"{name}: {fault} reached {injected} of {count} {call}")
    finally:
        shutil.rmtree(root)
    return runs, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stride", type=int, default=1, help="every N-th call site")
    parser.add_argument("--only", default="accept,save,rollback")
    given = parser.parse_args()
    failed = 0
    for name in given.only.split(","):
        began = time.monotonic()
        runs, problems = sweep(name, given.stride)
        print(
            f"{name}: {runs} faults, {len(problems)} violations, {time.monotonic() - began:.0f} s", flush=True
        )
        failed += len(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
