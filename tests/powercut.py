"""Power cut: a loop-mounted file system is shut down in the middle of accepting files and saving checkpoints.

    python tests/powercut.py [--cuts 10] [--seed N]      as root, with loop devices and xfsprogs

`xfs_io -x -c shutdown` stops a file system at once and throws away what it had not written, journal included, which is
what a power cut does to it. After each cut it is mounted again, the next daemon starts on what is there, with a fresh
arena (memory is gone too), and everything that had been acknowledged before the cut must be there.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from faults import LINE, begin_child, fingerprint, in_child, preload
from hogwild import generation
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.weights import load_arena
from studio import Studio, model

KINDS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
MIB = 320  # the least that XFS takes


class Disk:
    """A file system on a loop device."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.image, self.mounted = kind, folder / f"{kind}.img", folder / kind
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(MIB << 20)
        call(*KINDS[kind], str(self.image))

    def mount(self) -> None:
        call("mount", "-o", "loop", str(self.image), str(self.mounted))

    def cut(self) -> None:
        call("xfs_io", "-x", "-c", "shutdown", str(self.mounted))

    def unmount(self) -> None:
        for _ in range(50):  # what was killed may still have files open for a moment
            if (
                subprocess.run(["umount", str(self.mounted)], capture_output=True, check=False).returncode
                == 0
            ):
                return
            time.sleep(0.1)
        call("umount", "-l", str(self.mounted))


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def possible() -> str:
    """Why power cuts cannot be simulated here; "" if they can."""
    if os.geteuid() != 0:
        return "needs root"
    tools = ("mkfs.ext4", "mkfs.xfs", "xfs_io", "mount", "losetup")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (apt-get install e2fsprogs xfsprogs mount)"
    if subprocess.run(["losetup", "-f"], capture_output=True, check=False).returncode != 0:
        return "needs a loop device"
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in KINDS:
                disk = Disk(kind, Path(folder))
                disk.mount()
                disk.unmount()
        except AssertionError as error:
            return f"cannot mount: {error}"
    return ""


def spool_of(studio: Studio, accepted: Callable[[str], None]) -> Spool:
    return Spool(
        SpoolConfig(dir=studio.config.state_dir / "spool", settle_s=0),
        studio.ledger,
        passes=2,
        on_accepted=lambda record: accepted(record.name),
    )


def work(root: Path, number: int, tell: Callable[[str], None]) -> None:
    """Accept, train, save, until the power goes."""
    studio = Studio(root, checkpoint__keep=2)
    spool = spool_of(studio, lambda name: tell(f"accepted {name}"))
    spool.prepare()
    tell("ready")
    for count in range(10_000):
        name = f"cut{number}-{count}.jsonl"
        fresh = spool.incoming / f".{name}"
        fresh.write_text(LINE.format(count % 50, name) + LINE.format(count % 40, f"{name}:2"))
        fresh.rename(spool.incoming / name)
        spool.scan_once()
        studio.curriculum.wake()
        studio.train(1)
        tell(f"saved {studio.save()}")


def check(root: Path, accepted: set[str], saved: int) -> Iterator[str]:
    studio = Studio(root, checkpoint__keep=2)
    with studio.ledger._db.read() as db:
        names = [name for (name,) in db.execute("SELECT name FROM files WHERE state = 'accepted'")]
        if damage := [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]:
            yield f"the ledger is damaged: {damage}"
        lines = [name for (name,) in db.execute("SELECT name FROM examples")]
    if lost := accepted - set(names):
        yield f"acknowledged and lost: {sorted(lost)}"
    if len(set(lines)) != len(lines) or len(lines) != 2 * len(names):
        yield f"{len(names)} files, {len(lines)} examples, {len(set(lines))} different ones"
    current = studio.keeper.checkpoints.current_generation() or 0
    if current < saved:
        yield f"generation {saved} was acknowledged, {current} is current"
    for folder in studio.keeper.checkpoints.folders().values():
        generation.verify(folder)
    if current and fingerprint(studio.arena) != fingerprint(
        load_arena(studio.keeper.checkpoints.folders()[current])
    ):
        yield "the weights are not those of the current generation"
    studio.train()  # and everything that is left can be trained
    if studio.ledger.counts().pending:
        yield f"left over: {studio.states()}"
    studio.save()
    studio.close()


class Cuts:
    """Power cuts on one file system, each after the last one's recovery."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.disk, self._random = Disk(kind, folder), random.Random(seed)
        self._report = folder / f"{kind}.report"
        self.root = self.disk.mounted
        self.accepted: set[str] = set()
        self.saved = 0
        self.problems: list[str] = []

    def prepare(self) -> None:
        self.disk.mount()
        model(self.root / "model")
        os.sync()
        preload(lambda: self._check_into(self._report))
        self.saved = 0

    def _check_into(self, report: Path) -> None:
        try:
            problems = list(check(self.root, self.accepted, self.saved))
        except Exception as error:
            problems = [f"the next start fails: {error!r}"]
        report.write_text("\n".join(problems))

    def cut(self, number: int) -> None:
        """One more: work for a while, cut, mount again, check."""
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                begin_child()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                work(self.root, number, lambda word: theirs.sendall(f"{word}\n".encode()))
            os._exit(0)
        theirs.close()
        with ours, ours.makefile() as said:
            if said.readline() != "ready\n":
                self.problems.append(f"{self.disk.kind}, before cut {number}: the daemon does not start")
            wanted = self._random.randint(2, 9)
            for _ in range(wanted):
                self._note(said.readline())
            time.sleep(self._random.uniform(0, 0.15))
            self.disk.cut()
            os.kill(child, signal.SIGKILL)  # its memory is gone with the power
            for line in said:  # acknowledged before the cut was complete; nothing is after it, as fsync fails
                self._note(line)
        os.waitpid(child, 0)
        self.disk.unmount()
        self.disk.mount()
        in_child(lambda: self._check_into(self._report))
        self.problems += [
            f"{self.disk.kind}, cut {number}: {line}" for line in self._report.read_text().splitlines()
        ]

    def _note(self, line: str) -> None:
        word, _, what = line.strip().partition(" ")
        if word == "accepted":
            self.accepted.add(what)
        elif word == "saved":
            self.saved = max(self.saved, int(what))


def run(kind: str, cuts: int, seed: int) -> Cuts:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hogwild-power-"))
    world = Cuts(kind, folder, seed)
    try:
        world.prepare()
        for number in range(cuts):
            world.cut(number)
            if world.problems:
                break
    finally:
        world.disk.unmount()
        shutil.rmtree(folder)
    return world


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    given = parser.parse_args()
    if why := possible():
        print(f"no power cut can be simulated here: {why}", file=sys.stderr)
        return 2
    print(f"seed {given.seed}")
    failed = 0
    for kind in KINDS:
        began = time.monotonic()
        world = run(kind, given.cuts, given.seed)
        print(
            f"{kind}: {given.cuts} cuts, {len(world.accepted)} files acknowledged, generation {world.saved} the last "
            f"that was, {len(world.problems)} violations, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for problem in world.problems:
            print(f"VIOLATION {problem}", flush=True)
        failed += len(world.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
