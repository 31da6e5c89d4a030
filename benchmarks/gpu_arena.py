"""Section 2: memory that two processes share, and that outlives either of them. The tests marked gpu show the same of
each part; here whole processes speak the real protocol, and there are figures."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_bench import Bench, Peer, listen, wait_for
from gpu_timing import Clock
from hogwild.arena import client, devices
from hogwild.arena.client import Arena, Offer
from hogwild.arena.control import ControlPage
from hogwild.arena.cuda_ipc import IpcSegment
from hogwild.layout import Layout, Region, Source

CYCLES = 100
_SOURCE = Source("/random", (), "none")
_SLACK = 2 << 20  # the driver's granularity
_AT_ONCE, _CODES = 32 << 20, 128
"""Elements that are written and read at once, while both go on; steps that their bits tell apart."""


def run(bench: Bench) -> None:
    nbytes = 8 << 20 if bench.tiny else min(4 << 30, (bench.free() or 0) // 4)
    if not _outlives(bench.device):
        bench.out.leave_out(
            "all of it: this device's memory does not outlive its owner (legacy CUDA IPC, docs/cuda.md)"
        )
        return
    sock = bench.folder / "arena.sock"
    peers = [bench.start(peer, sock, nbytes, bench.device) for _ in range(4)]  # on a GPU this takes seconds
    for one in peers:
        one.hear("ready")  # with a CUDA context each, which counts as used memory
    _cycles(bench, nbytes)
    _other_process_dies_as_server(bench, sock, *peers[:2])
    _other_process_dies_as_daemon(bench, sock, nbytes, *peers[2:])


def _outlives(device: torch.device) -> bool:
    """Is what is allocated there of the kind that this section is about, and not the fallback?"""
    with contextlib.closing(devices.allocate(_SLACK, device)) as held:
        return not isinstance(held, IpcSegment)


# --- one process ---------------------------------------------------------------------------------------------------


def _cycles(bench: Bench, nbytes: int) -> None:
    """Allocate, map a second time as a peer would, write through one, read through the other, let go: 100 times."""
    clock, allocating, mapping = Clock(bench.device), 0.0, 0.0
    _cycle(clock, nbytes)  # what is made once
    clock.wait()
    free, descriptors, used = bench.free(), _descriptors(), _nvidia_smi()
    for _ in range(CYCLES):
        took = _cycle(clock, nbytes)
        allocating, mapping = allocating + took[0], mapping + took[1]
    clock.wait()
    lost = 0 if free is None else free - (bench.free() or 0)
    bench.out.row(
        f"Allocated and mapped, {CYCLES} times",
        **{
            "GiB": nbytes / 2**30,
            "allocate and zero, ms": 1000 * allocating / CYCLES,
            "map, ms": 1000 * mapping / CYCLES,
            "lost, MiB (cuMemGetInfo)": None if free is None else lost / 2**20,
            "used before and after, MiB (nvidia-smi)": " and ".join(filter(None, (used, _nvidia_smi())))
            or None,
            "descriptors before and after": f"{descriptors} and {_descriptors()}",
        },
    )
    if free is None:
        bench.out.leave_out("memory of a device: there is none here")
    bench.out.check(f"no descriptor is left after {CYCLES} cycles", _descriptors() == descriptors)
    bench.out.check(f"no memory is left after {CYCLES} cycles", lost <= _SLACK, f"{lost / 2**20:.0f} MiB")


def _cycle(clock: Clock, nbytes: int) -> tuple[float, float]:
    """Seconds to allocate, and to map once more."""
    began = time.perf_counter()
    mine = devices.allocate(nbytes, clock.device)
    clock.wait()
    made = time.perf_counter()
    theirs = devices.receive([os.dup(fd) for fd in mine.fds], mine.parts, mine.device_id)
    mapped = time.perf_counter()
    for held, other, value in ((mine, theirs, 3), (theirs, mine, 4)):
        held.tensor(nbytes - 8, (8,), (1,), torch.uint8).fill_(value)
        assert other.tensor(nbytes - 8, (8,), (1,), torch.uint8).tolist() == [value] * 8
    mine.close()
    theirs.close()
    return made - began, mapped - made


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _nvidia_smi() -> str:
    """MiB used on the first GPU, by whomever; "" where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    return said[0] if said else ""


# --- the other process ---------------------------------------------------------------------------------------------


def peer(pipe: Any, sock: Path, nbytes: int, device: torch.device) -> None:
    """A server or a daemon that does as it is told, until it is killed."""
    arena, kept = None, list[Any]()
    if device.type == "cuda":
        torch.zeros(1, device=device)
    pipe.send(("ready", None))
    while True:
        what, *given = pipe.recv()
        answer: Any = None
        if what == "serve":
            arena = _new(nbytes, device)
            _write(arena, given[0])
            began = time.perf_counter()
            kept.append(Offer(sock, arena, {}))
            kept[-1].start()
            assert kept[-1].attached.wait(60)
            answer = time.perf_counter() - began
        elif what == "ask":
            began = time.perf_counter()
            found = client.ask(sock, _SOURCE, {})
            assert found is not None
            arena, answer = found[0], time.perf_counter() - began
            kept.append(found[1])
        elif what == "listen":
            kept.append(listen(sock))
            arena = wait_for(lambda: kept[-1].arena)
        elif what == "write":
            assert arena is not None
            _write(arena, given[0])
        elif what == "holds":
            assert arena is not None
            answer = _holds(arena, given[0])
        elif what == "step":
            assert arena is not None
            _step(arena, given[0])
        pipe.send((what, answer))


def _other_process_dies_as_server(bench: Bench, sock: Path, server: Peer, successor: Peer) -> None:
    """We are the daemon."""
    hub = listen(sock)
    offered = server.ask("serve", 1)
    arena = wait_for(lambda: hub.arena)
    bench.out.check("what a server wrote is what the daemon maps", _holds(arena, 1))
    seen = _reader(bench, arena)
    for value in (2, 3):
        server.ask("write", value)
        seen(value)
    _ordering(bench, arena, server)
    server.ask("write", 3)
    server.kill()
    bench.out.check("kill -9 of the server leaves the daemon's data intact", _holds(arena, 3))
    _write(arena, 4)
    asked = successor.ask("ask")
    bench.out.check("the next server maps them, as they have become since", successor.ask("holds", 4))
    successor.ask("write", 5)
    bench.out.check("and what it writes is what the daemon reads", _holds(arena, 5))
    successor.kill()
    bench.out.check("kill -9 of that one leaves them intact, too", _holds(arena, 5))
    hub.stop()
    bench.out.row(
        "Hand-over, both processes running",
        **{"server to daemon, ms": 1000 * offered, "daemon to the next server, ms": 1000 * asked},
    )
    _copies(bench, arena)
    arena.close()


def _other_process_dies_as_daemon(
    bench: Bench, sock: Path, nbytes: int, daemon: Peer, successor: Peer
) -> None:
    """We are the server."""
    arena = _new(nbytes, bench.device)
    _write(arena, 6)
    offer = Offer(sock, arena, {})
    offer.start()
    daemon.ask("listen")
    bench.out.check("a daemon that starts after the server gets its weights", daemon.ask("holds", 6))
    daemon.ask("write", 7)
    daemon.kill()
    bench.out.check("kill -9 of the daemon leaves the server's data intact", _holds(arena, 7))
    _write(arena, 8)
    successor.ask("listen")
    bench.out.check("the next daemon gets them, as they have become since", successor.ask("holds", 8))
    successor.ask("write", 9)
    successor.kill()
    bench.out.check("kill -9 of that one leaves them intact, too", _holds(arena, 9))


# --- while the other process writes -----------------------------------------------------------------------------------


def _elements(arena: Arena) -> torch.Tensor:
    """Those that are written and read at once, as their bits: int16."""
    return arena.weights.tensor(0, (min(arena.weights.nbytes // 64, _AT_ONCE),), (1,), torch.int16)


def _step(arena: Arena, seconds: float) -> None:
    """Write every element again and again, and count each time once it is written, as a trainer does."""
    elements, until = _elements(arena), time.perf_counter() + seconds
    while time.perf_counter() < until:
        step = arena.control.steps + 1
        elements.fill_(step % _CODES * 0x0101)  # both bytes alike
        _wait(elements)
        arena.control.steps = step


def _ordering(bench: Bench, arena: Arena, writer: Peer) -> None:
    """What docs/cuda.md says of a write in one process and a read in the other, on whatever is read meanwhile."""
    elements, seconds = _elements(arena), 0.3 if bench.tiny else 2.0
    elements.fill_(arena.control.steps % _CODES * 0x0101)
    _wait(elements)  # or it could be written after the first step
    looks = mixed = torn = stale = 0
    writer.tell("step", seconds)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        counted = arena.control.steps
        found = elements.clone()
        _wait(found)
        if arena.control.steps - counted >= _CODES // 2 - 1:  # the step under way is one more
            continue  # this process was held up, and can no longer tell old from new
        low = found & 0xFF
        looks, mixed = looks + 1, mixed + int(found.min() != found.max())
        torn += int((low != found >> 8).any())
        stale += int((((low - counted) & (_CODES - 1)) >= _CODES // 2).any())
    writer.hear("step")
    said = f"{looks} reads, {mixed} of them of elements of several steps"
    if mixed:
        bench.out.check(
            "an element that is read during a write is old or new, never a mixture", not torn, said
        )
    else:
        bench.out.leave_out(
            f"whether an element is ever a mixture: no read fell into a write ({looks} reads)"
        )
    if looks:
        bench.out.check(
            "whoever reads that a step is counted reads what it has written, or later", not stale, said
        )


# --- data ----------------------------------------------------------------------------------------------------------


def _new(nbytes: int, device: torch.device) -> Arena:
    held = devices.allocate(nbytes, device)
    region = Region(0, (nbytes // 2,), (1,), "bfloat16")
    layout = Layout(
        nbytes, {"w": region}, {}, {"w": region}, _SOURCE, device=held.device_id, parts=held.parts
    )
    return Arena(held, ControlPage.create(layout.fingerprint()), layout)


def _numbers(arena: Arena) -> torch.Tensor:
    """The whole of it, (bytes / 8,) int64."""
    return arena.weights.tensor(0, (arena.weights.nbytes // 8,), (1,), torch.int64)


def _write(arena: Arena, value: int) -> None:
    """Other numbers in every word, from `value`."""
    numbers = _numbers(arena)
    torch.arange(len(numbers), out=numbers)
    numbers.mul_(1_000_003).add_(value)
    _wait(numbers)


def _wait(tensor: torch.Tensor) -> None:
    """Until what is queued for its device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _holds(arena: Arena, value: int) -> bool:
    """Is every word as `_write` wrote it?"""
    numbers = _numbers(arena)
    step = 1 << 26  # what is compared at once
    for start in range(0, len(numbers), step):
        wanted = torch.arange(start, min(start + step, len(numbers)), device=numbers.device)
        if not torch.equal(numbers[start : start + step], wanted.mul_(1_000_003).add_(value)):
            return False
    return True


def _reader(bench: Bench, arena: Arena) -> Callable[[int], None]:
    """Code that was captured or compiled before another process writes, and what it reads afterwards."""
    part = _numbers(arena)[:4096]

    def read() -> torch.Tensor:
        return part.sum()

    ways: dict[str, Callable[[], torch.Tensor]] = {"eager code": read}
    if bench.cuda:
        out = torch.zeros_like(part[0])
        replay = Clock(bench.device).captured(lambda: out.copy_(read()))

        def replayed() -> torch.Tensor:
            replay()
            return out

        compiled = torch.compile(read)
        compiled()
        ways |= {"a replayed CUDA graph": replayed, "compiled code": compiled}
    else:
        bench.out.leave_out("CUDA graphs and compiled code, which only a device has")

    def seen(value: int) -> None:
        wanted = sum(range(4096)) * 1_000_003 + 4096 * value
        for name, look in ways.items():
            found = int(look())
            bench.out.check(
                f"{name} reads what another process has written ({value})", found == wanted, str(found)
            )

    return seen


def _copies(bench: Bench, arena: Arena) -> None:
    """Is shared memory as fast as the device's own?"""
    clock, nbytes = Clock(bench.device), arena.weights.nbytes // 2
    halves = [arena.weights.tensor(start, (nbytes,), (1,), torch.uint8) for start in (0, nbytes)]
    own = [torch.zeros(nbytes, dtype=torch.uint8, device=bench.device) for _ in range(2)]
    for name, (source, target) in (("shared between processes", halves), ("torch's own", own)):
        seconds = clock.on_device(lambda source=source, target=target: target.copy_(source), 10)
        bench.out.row("A copy within it", memory=name, **{"GB/s": 2 * nbytes / seconds / 1e9})
