"""Legacy CUDA IPC where a driver has no other shared memory: who falls back to it, and what ends when its owner ends.

The driver is a stand-in (fake_cuda.py); processes, sockets, pidfds and SIGKILL are real.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda
from fake_cuda import GRANULARITY, UNDOING, CUresult, Driver
from hogwild import checkpoint
from hogwild import log as logs
from hogwild.arena import client, cuda_ipc, devices, owner, protocol
from hogwild.arena.client import Arena, Offer
from hogwild.arena.control import ControlPage
from hogwild.arena.cuda_ipc import IpcSegment
from hogwild.arena.cuda_memory import CudaSegment
from hogwild.arena.hub import Hub
from hogwild.arena.owner import Owner
from hogwild.checkpoint import Checkpoints
from hogwild.errors import ArenaError, CheckpointError, ProtocolError, UnshareableError
from hogwild.layout import Layout, Region, Source
from hogwild.weights import Weights, load_arena
from support import wait_until
from test_arena import exchange, offer_by_hand
from test_arena_cuda import Spawned, use_fake
from test_arena_gpu import IDS
from tiny import Child, llama, open_descriptors, tokenizer

NBYTES = 2 * GRANULARITY - 4096
REGION = Region(GRANULARITY - 512, (4, 256), (256, 1), "float32")
SOURCE = Source("/models/a", (("model.safetensors", 10, 20, 30),), "digest of config.json")
CUDA = torch.device("cuda", 0)
SHARING = [
    "cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemExportToShareableHandle", "cuMemMap",
    "cuMemSetAccess",
]  # fmt: skip


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The stand-in, in use."""
    made = Driver()
    use_fake(made, monkeypatch.setattr)
    return made


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Owners whose end would have ended this process. To be asked for before `start`, whose end kills them."""
    ended: list[int] = []
    monkeypatch.setattr(owner, "_end", ended.append)
    yield ended
    wait_until(
        lambda: "arena-owner" not in [one.name for one in threading.enumerate()], "nobody is watched", 30
    )


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def begin(work: Callable[..., None], *arguments: Any) -> Child:
        made.append(Child(work, *arguments))
        return made[-1]

    yield begin
    for child in made:
        child.kill()


def without_descriptors() -> Driver:
    """A driver that shares memory by legacy IPC only."""
    driver = Driver()
    driver.attributes[103] = 0
    return driver


def view(held: Any) -> torch.Tensor:
    return held.tensor(REGION.offset, REGION.shape, REGION.stride, REGION.torch_dtype)


def make_arena(source: Source = SOURCE) -> Arena:
    held = devices.allocate(NBYTES, CUDA)
    layout = Layout(
        NBYTES, {"w": REGION}, {}, {"model.w": REGION}, source, device=held.device_id, parts=held.parts
    )
    return Arena(held, ControlPage.create(layout.fingerprint()), layout)


# --- falling back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", [102, 103])
def test_a_device_that_cannot_share_by_descriptor_shares_by_ipc(driver, caplog, attribute):
    driver.attributes[attribute] = 0
    held = devices.allocate(NBYTES, CUDA)
    assert isinstance(held, IpcSegment)
    assert (held.fds, held.parts, held.nbytes) == ((), (NBYTES,), NBYTES)
    assert (held.device, held.device_id, len(bytes.fromhex(held.handle))) == (CUDA, IDS[0], 64)
    assert not held.bytes.any()
    assert held.bytes.data_ptr() == held.base
    assert driver.sizes() == [2 * GRANULARITY]
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for words in ("is 0", "legacy CUDA IPC", "gone when the server ends", "newest checkpoint"):
        assert words in said


@pytest.mark.parametrize("error", [CUresult.CUDA_ERROR_NOT_SUPPORTED, CUresult.CUDA_ERROR_NOT_PERMITTED])
@pytest.mark.parametrize("function", SHARING)
def test_a_driver_that_refuses_to_share_by_descriptor_shares_by_ipc(driver, caplog, function, error):
    CudaSegment.allocate(NBYTES)
    driver.fail_at, driver.failure = len(driver.calls) + driver.calls.index(function) + 1, error
    held = devices.allocate(NBYTES, CUDA)
    assert isinstance(held, IpcSegment)
    assert f"{function} failed with {error.name}" in caplog.text
    held.close()
    del held
    assert driver.left() == []


@pytest.mark.parametrize(
    "error",
    [CUresult.CUDA_ERROR_OUT_OF_MEMORY, CUresult.CUDA_ERROR_UNKNOWN, CUresult.CUDA_ERROR_INVALID_VALUE],
)
@pytest.mark.parametrize("function", SHARING)
def test_no_other_failure_is_a_reason(driver, function, error):
    CudaSegment.allocate(NBYTES)
    driver.fail_at, driver.failure = len(driver.calls) + driver.calls.index(function) + 1, error
    with pytest.raises(ArenaError, match=f"{function} failed with {error.name}") as raised:
        devices.allocate(NBYTES, CUDA)
    assert not isinstance(raised.value, UnshareableError)
    assert "cuMemAlloc" not in driver.calls


def test_too_large_an_arena_an_unknown_device_and_a_missing_package_are_none_either(driver, monkeypatch):
    with pytest.raises(ArenaError, match="OUT_OF_MEMORY"):
        devices.allocate(fake_cuda.CAPACITY + 1, CUDA)
    with pytest.raises(ArenaError, match="INVALID_DEVICE"):
        devices.allocate(NBYTES, torch.device("cuda", 7))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ArenaError, match="needs cuda-bindings"):
        devices.allocate(NBYTES, CUDA)
    assert "cuMemAlloc" not in driver.calls


def test_where_the_fallback_is_refused_too_both_refusals_are_said(driver):
    driver.attributes[103] = driver.attributes[41] = 0
    with pytest.raises(ArenaError) as raised:
        devices.allocate(NBYTES, CUDA)
    for words in ("cannot share memory by file descriptor", "no unified addressing", "train on the CPU"):
        assert words in str(raised.value)


def test_a_fallback_that_the_driver_refuses_is_said_with_the_first_refusal(driver, monkeypatch):
    driver.attributes[103] = 0
    refused = lambda _address: (CUresult.CUDA_ERROR_NOT_SUPPORTED, None)  # noqa: E731
    monkeypatch.setattr(driver, "cuIpcGetMemHandle", refused)
    with pytest.raises(ArenaError) as raised:
        devices.allocate(NBYTES, CUDA)
    assert "cannot share memory by file descriptor" in str(raised.value)
    assert "cuIpcGetMemHandle failed with CUDA_ERROR_NOT_SUPPORTED" in str(raised.value)
    assert driver.left() == []


# --- what is taken is given back ------------------------------------------------------------------------------------


def test_the_owner_frees_once_when_the_last_tensor_is_gone(driver):
    before = open_descriptors()
    segment = IpcSegment.allocate(NBYTES)
    tensor = segment.tensor(0, (4,), (1,), torch.bfloat16)
    segment.close()
    segment.close()
    del segment
    assert len(driver.mapped) == 1
    tensor.fill_(1)
    del tensor
    assert driver.calls.count("cuMemFree") == 1
    assert driver.left() == []
    assert open_descriptors() == before


def test_whatever_call_fails_is_named_and_nothing_is_left(driver, caplog):
    IpcSegment.allocate(NBYTES)
    calls = list(driver.calls[: driver.calls.index("cuIpcGetMemHandle") + 2])  # and the context's pop
    before = open_descriptors()
    for number, function in enumerate(calls):
        caplog.clear()
        driver.fail_at = len(driver.calls) + 1 + number
        if function in UNDOING:
            IpcSegment.allocate(NBYTES)
            assert f"{function} failed with CUDA_ERROR_UNKNOWN" in caplog.text
        else:
            with pytest.raises(ArenaError, match=f"{function} failed with CUDA_ERROR_UNKNOWN"):
                IpcSegment.allocate(NBYTES)
        assert driver.left() == [], function
        assert open_descriptors() == before, function


# --- over the socket -----------------------------------------------------------------------------------------------


def serve(pipe: Any, path: Path) -> None:
    """A server whose driver has legacy IPC only: offers its arena, and does what it is told."""
    use_fake(without_descriptors())
    arena = make_arena()
    view(arena.weights).fill_(5)
    offer = Offer(path, arena, {})
    offer.start()
    while True:
        pipe.send(("attached", offer.attached.wait(60)))
        word, *arguments = pipe.recv()
        if word == "write":
            view(arena.weights).fill_(arguments[0])
        pipe.send(("read", view(arena.weights).unique().tolist()))


@pytest.fixture
def daemon(tmp_path: Path, driver: Driver) -> Iterator[tuple[Path, list[Arena]]]:
    """A hub that takes everything, its socket, and what it has taken; its driver can do all that there is."""
    taken: list[Arena] = []
    hub = Hub(tmp_path / "arena.sock", taken.append, lambda _server, _begins: None)
    hub.start()
    assert driver.mapped == {}
    yield tmp_path / "arena.sock", taken
    hub.stop()


def test_each_process_sees_the_writes_of_the_other(daemon, deaths, start):
    sock, taken = daemon
    server = start(serve, sock)
    assert server.hear("attached")
    (arena,) = taken
    assert isinstance(arena.weights, IpcSegment)
    assert len(arena.fds) == 1, "the control page's"
    assert arena.weights.inode() == (0, 0)
    assert view(arena.weights).unique().tolist() == [5]
    view(arena.weights).fill_(6)
    server.tell(("read",))
    assert server.hear("read") == [6]
    server.tell(("write", 7))
    assert server.hear("read") == [7]
    assert view(arena.weights).unique().tolist() == [7]
    arena.weights.ensure_alive()
    assert deaths == []


def test_what_is_refused_is_given_back_once_and_its_owner_may_end(driver, tmp_path, deaths, start):
    def refuse(arena: Arena) -> None:
        assert driver.mapped
        raise ArenaError(f"{view(arena.weights).unique().tolist()} is no model")

    def offer(pipe: Any) -> None:
        use_fake(without_descriptors())
        arena = make_arena()
        pipe.recv()
        pipe.send(("reply", offer_by_hand(tmp_path / "arena.sock", arena, **arena.to_json())))
        pipe.recv()

    hub = Hub(tmp_path / "arena.sock", refuse, lambda _server, _begins: None)
    hub.start()
    server = start(offer)
    before = open_descriptors()
    server.tell("offer")
    assert "[0.0] is no model" in server.hear("reply")["error"]
    wait_until(lambda: driver.left() == [], "nothing is left open", 30)
    assert driver.calls.count("cuIpcOpenMemHandle") == driver.calls.count("cuIpcCloseMemHandle") == 1
    wait_until(lambda: open_descriptors() == before, "nor a descriptor", 30)
    server.kill()
    time.sleep(2 * owner._LOOK_S)
    assert deaths == []
    hub.stop()


def test_it_is_not_handed_to_another_server_nor_dropped_for_its_arena(daemon, deaths, start):
    sock, taken = daemon
    server = start(serve, sock)
    server.hear("attached")
    assert client.ask(sock, SOURCE, {}) is None
    rival = make_arena()
    assert isinstance(rival.weights, CudaSegment)
    reply = offer_by_hand(sock, rival)
    assert reply["status"] == "refused"
    assert "holds live weights of /models/a" in reply["error"]
    assert len(taken) == 1
    assert deaths == []


def test_an_arena_that_is_offered_again_is_mapped_and_watched_as_before(driver, daemon, deaths, start):
    sock, taken = daemon

    def offer_twice(pipe: Any) -> None:
        use_fake(without_descriptors())
        arena = make_arena()
        view(arena.weights).fill_(3)
        for _ in range(2):
            pipe.send(("reply", offer_by_hand(sock, arena, **arena.to_json())))
        pipe.recv()

    server = start(offer_twice)
    assert [server.hear("reply")["status"] for _ in range(2)] == ["attached"] * 2
    wait_until(lambda: driver.calls.count("cuIpcCloseMemHandle") == 1, "the second is let go of", 30)
    assert view(taken[0].weights).unique().tolist() == [3]
    server.kill()
    wait_until(lambda: deaths, "its end is seen", 30)
    time.sleep(2 * owner._LOOK_S)
    assert deaths == [server.pid]


def test_an_offer_of_a_handle_that_is_none_is_refused_and_leaves_nothing(driver, daemon, deaths, start):
    sock, taken = daemon
    layout = Layout(NBYTES, {"w": REGION}, {}, {}, SOURCE, device=IDS[0], parts=(NBYTES,))
    arena = Arena(CudaSegment.allocate(NBYTES), ControlPage.create(layout.fingerprint()), layout)
    page = arena.control.segment.fd

    def rival(pipe: Any) -> None:
        pipe.recv()
        for handle, fds in [
            ("00" * 63, (page,)), ("no hex", (page,)), (5, (page,)), ("00" * 64, (page,)), ("00" * 64, arena.fds),
            ("00" * 64, ()),
        ]:  # fmt: skip
            pipe.send(("reply", offer_by_hand(sock, arena, handle=handle, fds=fds)))
        pipe.recv()

    peer = start(rival)
    before, descriptors = driver.left(), open_descriptors()
    peer.tell("offer")
    words = [
        "no handle of legacy",
        "no handle of legacy",
        "no handle of legacy",
        "cuIpcOpenMemHandle failed",
        "1 descr",
        "1 descr",
    ]
    for expected in words:
        reply = peer.hear("reply")
        assert reply["status"] == "refused"
        assert expected in reply["error"]
    assert taken == []
    wait_until(lambda: driver.left() == before, "nothing is left open", 30)
    wait_until(lambda: open_descriptors() == descriptors, "nothing is left open", 30)
    assert deaths == []


@pytest.mark.usefixtures("driver")
def test_a_handle_from_whoever_only_holds_the_arena_is_refused():
    arena = make_arena()
    page = os.dup(arena.control.segment.fd)
    with pytest.raises(ProtocolError, match="the process that made it"):
        Arena.receive({"layout": arena.layout.to_json(), "handle": "00" * 64}, [page])


def test_a_daemon_of_the_version_before_refuses_by_name(daemon):
    sock, _ = daemon
    reply = exchange(sock, {"op": "offer", "version": protocol.VERSION - 1, "handle": "00" * 64})
    assert "install the same hogwild for both" in reply["error"]


# --- the end of the owner ------------------------------------------------------------------------------------------


def test_a_peer_that_has_hung_up_is_not_watched():
    ours, theirs = socket.socketpair()
    theirs.close()
    descriptors = open_descriptors()
    with pytest.raises(ArenaError, match="has hung up"):
        Owner(ours)
    assert open_descriptors() == descriptors
    ours.close()


def train(pipe: Any, path: Path, log: Path) -> None:
    """A daemon: takes what is offered, and goes on writing to it."""
    use_fake(Driver())
    logs.configure(format="json", stream=log.open("w"))
    hub = Hub(
        path, lambda arena: pipe.send(("took", type(arena.weights).__name__)), lambda _server, _begins: None
    )
    hub.start()
    pipe.send(("listens", None))
    while True:
        if hub.arena is not None:
            view(hub.arena.weights).add_(1)
        time.sleep(0.01)


def test_a_daemon_ends_with_the_server_that_is_killed(tmp_path, start):
    sock, log = tmp_path / "arena.sock", tmp_path / "log"
    daemon = start(train, sock, log)
    daemon.hear("listens")
    server = start(serve, sock)
    server.hear("attached")
    assert daemon.hear("took") == "IpcSegment"
    assert daemon.process.is_alive()
    server.kill()
    daemon.process.join(60)
    assert daemon.process.exitcode == 1
    (said,) = [one for one in map(json.loads, log.read_text().splitlines()) if one["level"] == "critical"]
    assert (said["event"], said["pid"]) == ("arena.owner_died", server.pid)
    assert "newest checkpoint" in said["follows"]


def test_a_server_outlives_the_daemon_and_attaches_to_the_next(tmp_path, start):
    sock = tmp_path / "arena.sock"
    first = start(train, sock, tmp_path / "log")
    first.hear("listens")
    server = start(serve, sock)
    first.hear("took")
    first.kill()
    second = start(train, sock, tmp_path / "log2")
    assert second.hear("took") == "IpcSegment"
    server.tell(("read",))
    assert len(server.hear("read")) == 1


def test_a_log_that_takes_no_line_does_not_keep_the_process():
    script = (
        "import os, sys, threading\n"
        "from hogwild import log\n"
        "from hogwild.arena import owner\n"
        "full, _ = os.pipe2(0)\n"
        "log.configure(format='json', stream=os.fdopen(_, 'w'))\n"
        "os.set_blocking(_, False)\n"
        "try:\n"
        "    while True: os.write(_, bytes(4096))\n"
        "except BlockingIOError: os.set_blocking(_, True)\n"
        "owner._end(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=120).returncode
        == 1
    )


def own_model(pipe: Any, path: Path, model: Path) -> None:
    use_fake(without_descriptors())
    arena = load_arena(model, CUDA)
    Offer(path, arena, {}).start()
    pipe.recv()


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_a_checkpoint_is_published_only_if_the_owner_outlived_its_reading(
    tmp_path, daemon, deaths, start, monkeypatch, dies
):
    sock, taken = daemon
    model = llama(tmp_path / "model", torch.bfloat16)
    tokenizer(model)
    server = start(own_model, sock, model)
    wait_until(lambda: taken, "the arena is taken", 60)
    weights, checkpoints = Weights(taken[0]), Checkpoints(tmp_path / "checkpoints", keep=3)
    state = {"step": 1, "epoch": 1, "ledger_position": 1}
    checkpoints.save(weights, model, {}, state)
    whole = checkpoints.folders()

    def written(*arguments: Any) -> str:
        checksum = write_tensors(*arguments)
        if dies:
            server.kill()
        return checksum

    write_tensors = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", written)
    if not dies:
        checkpoints.save(weights, model, {}, state)
        assert checkpoints.current_generation() == 2
        assert deaths == []
        return
    with pytest.raises(CheckpointError, match=f"process {server.pid}, ended while its weights were read"):
        checkpoints.save(weights, model, {}, state)
    assert checkpoints.folders() == whole
    assert checkpoints.current_generation() == 1
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["current", "generation-00000001"]
    wait_until(lambda: deaths == [server.pid], "and this process would have ended", 30)


def test_the_settling_time_is_ten_times_what_was_measured():
    assert cuda_ipc.SETTLE_S >= 10 * 0.005


# --- a device ------------------------------------------------------------------------------------------------------


def serve_on_a_device(pipe: Any, path: Path) -> None:
    segment = IpcSegment.allocate(NBYTES)
    layout = Layout(NBYTES, {"w": REGION}, {}, {}, SOURCE, device=segment.device_id, parts=segment.parts)
    arena = Arena(segment, ControlPage.create(layout.fingerprint()), layout)
    view(segment).fill_(5)
    torch.cuda.synchronize()
    Offer(path, arena, {}).start()
    pipe.recv()
    pipe.send(("read", view(segment).unique().tolist()))
    pipe.recv()


@pytest.mark.gpu
def test_two_processes_share_a_devices_memory_by_ipc(tmp_path):
    taken: list[Arena] = []
    hub = Hub(tmp_path / "arena.sock", taken.append, lambda _server, _begins: None)
    hub.start()
    child = Spawned(serve_on_a_device, tmp_path / "arena.sock")
    wait_until(lambda: taken, "the arena is taken", 120)
    arena = taken.pop()
    assert isinstance(arena.weights, IpcSegment)
    assert view(arena.weights).unique().tolist() == [5]
    assert int(arena.weights.bytes[:4096].sum()) == 0
    view(arena.weights).fill_(6)
    torch.cuda.synchronize()
    child.tell("read")
    assert child.hear("read") == [6]
    arena.weights.ensure_alive()
    arena.close()  # not watched any more
    hub.stop()
    child.kill()
