"""Spool storms: everything that is dropped is accepted exactly once, whatever the trainers and the events do.

    python tests/storms.py            20,000 files renamed in while trainer threads are busy
    python tests/storms.py --silent   the same without file events
    python tests/storms.py --large    100,000 queued files, then 1,000,000 queued lines in one file

Every run checks first that nothing was lost or doubled, then prints files/s, trainer throughput as a share of
what it is without a storm, and peak memory.
"""

import argparse
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hogwild import log
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_watch import Watch

MIB = 2**20


class Busy:
    """Trainer-like threads: matrix products outside the interpreter lock, or pure Python inside it."""

    def __init__(self, threads: int, kind: str) -> None:
        self.turns = [0] * threads
        self._stop = threading.Event()
        work = {"torch": self._torch, "python": self._python}[kind]
        self._threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
        torch.set_num_threads(1)
        for thread in self._threads:
            thread.start()

    def rate(self, seconds: float = 2.0) -> float:
        """Turns per second, all threads together."""
        before, began = sum(self.turns), time.perf_counter()
        time.sleep(seconds)
        return (sum(self.turns) - before) / (time.perf_counter() - began)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _torch(self, index: int) -> None:
        x = torch.randn(128, 576)
        w = torch.randn(576, 576) * 0.04
        while not self._stop.is_set():
            x = torch.tanh(x @ w)
            self.turns[index] += 1

    def _python(self, index: int) -> None:
        while not self._stop.is_set():
            sum(i * i for i in range(1000))
            self.turns[index] += 1


def memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


class Peak:
    """The most memory that the process has had meanwhile, beyond what it had at the start."""

    def __enter__(self) -> "Peak":
        self._before = self.highest = memory_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_mib(self) -> int:
        return round(self.highest - self._before)

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, memory_mib())


def wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s")
        time.sleep(0.05)


def make(folder: Path, files: int) -> None:
    """One example a file."""
    folder.mkdir(parents=True)
    for i in range(files):
        fd = os.open(f"{folder}/{i}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, b'{"text": "fact number %d", "id": %d}\n' % (i, i))
        os.close(fd)


def storm(
    root: Path, outside: Path, *, silent: bool, threads: int, kind: str, timeout_s: float = 900
) -> dict[str, float]:
    """Renames the files in `outside` into a running spool, and waits until it has taken them.

    Returns:
        Numbers, once it is certain that every file is in the ledger exactly once and in done/.
    """
    files = sum(1 for _ in outside.iterdir())
    busy = Busy(threads, kind) if threads else None
    alone = busy.rate() if busy else 0.0
    before, peak = memory_mib(), 0.0
    ensure = Watch.ensure
    if silent:
        Watch.ensure = lambda _self: None  # type: ignore[method-assign]  # as if every event were lost
    with Ledger(root / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=root / "spool"), ledger, passes=1)
        spool.prepare()
        stop = threading.Event()
        thread = threading.Thread(target=spool.run, args=(stop,))
        thread.start()
        began = time.perf_counter()
        turns = sum(busy.turns) if busy else 0
        for i in range(files):
            os.rename(f"{outside}/{i}.jsonl", f"{spool.incoming}/{i}.jsonl")  # noqa: PTH104  # as fast as can be
        renamed = time.perf_counter() - began

        def done() -> bool:
            nonlocal peak
            peak = max(peak, memory_mib())
            return ledger.counts().files >= files and len(ledger.unmoved()) == 0

        try:
            wait(done, timeout_s)
            seconds = time.perf_counter() - began
            share = (sum(busy.turns) - turns) / seconds / alone if busy else 1.0
        finally:
            stop.set()
            spool.wake()
            thread.join()
            Watch.ensure = ensure  # type: ignore[method-assign]
            if busy:
                busy.stop()
        left = [path for path in spool.incoming.iterdir() if not path.name.startswith(".")]
        assert left == [], left[:3]
        assert len(list(spool.done.iterdir())) == files
    with sqlite3.connect(root / "ledger.sqlite") as shell:
        ids = shell.execute(
            "SELECT count(*), count(DISTINCT name), min(name + 0), max(name + 0) FROM examples"
        )
        assert ids.fetchone() == (files, files, 0, files - 1)
        assert shell.execute("SELECT count(*) FROM examples WHERE state <> 'accepted'").fetchone() == (0,)
    return {
        "files": files,
        "seconds": round(seconds, 1),
        "seconds_of_renaming": round(renamed, 1),
        "files_per_s": round(files / seconds),
        "trainers_share": round(share, 2),
        "memory_before_mib": round(before),
        "memory_peak_mib": round(peak),
    }


def queued(root: Path, files: int) -> dict[str, float]:
    """Files that were there before the spool started."""
    incoming = root / "spool" / "incoming"
    make(incoming, files)
    with Peak() as peak, Ledger(root / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=root / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        began = time.perf_counter()
        scan = spool.scan_once()
        seconds = time.perf_counter() - began
        assert len(scan.accepted) == ledger.counts().pending == files
    return {"files": files, "seconds": round(seconds, 1), "files_per_s": round(files / seconds),
            "memory_growth_mib": peak.growth_mib}  # fmt: skip


def lines(root: Path, count: int) -> dict[str, float]:
    """One file of very many lines."""
    incoming = root / "spool" / "incoming"
    incoming.mkdir(parents=True)
    with (incoming / "long.jsonl").open("w") as file:
        for i in range(count):
            file.write(f'{{"prompt": "question {i}?", "completion": "answer {i}", "id": {i}}}\n')
    with Peak() as peak, Ledger(root / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=root / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        began = time.perf_counter()
        spool.scan_once()
        seconds = time.perf_counter() - began
        assert ledger.counts().pending == count
        next_ms = []
        for _ in range(5):
            at = time.perf_counter()
            assert len(ledger.pending(256)) == 256
            next_ms.append((time.perf_counter() - at) * 1000)
    return {"lines": count, "seconds": round(seconds, 1), "lines_per_s": round(count / seconds),
            "memory_growth_mib": peak.growth_mib,
            "next_256_ms": round(min(next_ms), 1),
            "ledger_mib": round((root / "ledger.sqlite").stat().st_size / MIB)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2, help="busy trainer threads")
    parser.add_argument("--kind", choices=["torch", "python"], default="torch")
    parser.add_argument("--silent", action="store_true", help="without file events")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    log.configure("error", "json")
    root = Path(tempfile.mkdtemp())
    try:
        if arguments.large:
            print(json.dumps(queued(root / "files", 100_000)))
            print(json.dumps(lines(root / "lines", 1_000_000)))
        else:
            make(root / "outside", arguments.files)
            options = {"silent": arguments.silent, "threads": arguments.threads, "kind": arguments.kind}
            print(json.dumps({**options, **storm(root, root / "outside", **options)}))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
