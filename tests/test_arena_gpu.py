"""An arena on a GPU from the server to the daemon: in parts, over the socket, on the GPU that is meant.

The driver is a stand-in (fake_cuda.py), which both ends share here; everything else is as it runs. Of the server only
the loader's own steps are here; with vLLM around them they are in test_loader_gpu.py.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda
from fake_cuda import GRANULARITY, UUIDS, Driver
from hogwild.arena import client, devices, protocol
from hogwild.arena.client import Arena, Offer
from hogwild.arena.control import ControlPage
from hogwild.arena.cuda_memory import CudaSegment
from hogwild.arena.hub import Hub
from hogwild.arena.memory import Segment
from hogwild.errors import ArenaError, ProtocolError
from hogwild.layout import Layout, Region, Source
from support import wait_until
from test_arena import offer_by_hand
from test_arena_cuda import LETTING_GO, UNDOING, Spawned, use_fake
from tiny import open_descriptors

NBYTES = 4 * GRANULARITY + 4096  # five parts of one granule, the last one smaller
PARTS = (*[GRANULARITY] * 4, 4096)
SOURCE = Source("/models/a", (("model.safetensors", 10, 20, 30),), "digest of config.json")
ACROSS = Region(
    GRANULARITY - 512, (4, 256), (256, 1), "float32"
)  # half in the first part, half in the second
IDS = [f"GPU-{uuid.UUID(bytes=one)}" for one in UUIDS]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The stand-in, in use."""
    made = Driver()
    use_fake(made, monkeypatch.setattr)
    return made


def allocate() -> CudaSegment:
    return CudaSegment.allocate(NBYTES, part_nbytes=GRANULARITY)


def settled_descriptors() -> int:
    """How many there are, once threads of earlier tests have let go of theirs."""
    seen = [open_descriptors()]

    def still() -> bool:
        time.sleep(0.3)
        seen.append(open_descriptors())
        return seen[-1] == seen[-2]

    wait_until(still, "no more descriptors are closed")
    return seen[-1]


def again(segment: CudaSegment, **changes: Any) -> CudaSegment:
    """Mapped a second time, as another process would."""
    given = {"fds": segment.fds, "parts": segment.parts, "device": segment.device_id, **changes}
    return CudaSegment.from_fds([os.dup(fd) for fd in given["fds"]], given["parts"], given["device"])


def view(held: Any, region: Region = ACROSS) -> torch.Tensor:
    return held.tensor(region.offset, region.shape, region.stride, region.torch_dtype)


# --- parts ---------------------------------------------------------------------------------------------------------


def test_a_large_segment_is_several_allocations_without_a_gap(driver):
    segment = allocate()
    assert segment.parts == PARTS
    assert len(set(segment.fds)) == 5
    assert sorted(driver.mapped.items()) == [
        (segment.base + number * GRANULARITY, GRANULARITY) for number in range(5)
    ]
    assert list(driver.reserved.items()) == [(segment.base, 5 * GRANULARITY)]
    assert segment.nbytes == len(segment.bytes) == NBYTES
    assert not segment.bytes.any()
    assert driver.handles == {}


@pytest.mark.usefixtures("driver")
def test_a_part_is_rounded_up_to_what_the_driver_maps():
    assert CudaSegment.allocate(NBYTES, part_nbytes=GRANULARITY // 2).parts == PARTS
    assert CudaSegment.allocate(2 * GRANULARITY, part_nbytes=GRANULARITY).parts == (GRANULARITY,) * 2
    assert CudaSegment.allocate(NBYTES).parts == (NBYTES,), "a small one is not split"


@pytest.mark.usefixtures("driver")
def test_a_tensor_may_lie_across_two_parts_and_is_one_in_both_mappings():
    mine = allocate()
    theirs = again(mine)
    view(mine).copy_(torch.arange(1024.0).view(4, 256))
    assert view(theirs).flatten().tolist() == [float(i) for i in range(1024)]
    view(theirs)[3, 255] = -1
    assert float(view(mine)[3, 255]) == -1
    last = Region(NBYTES - 8, (2,), (1,), "float32")
    view(mine, last).fill_(7)
    assert view(theirs, last).tolist() == [7, 7]
    assert theirs.parts == mine.parts
    assert theirs.device_id == mine.device_id == IDS[0]


@pytest.mark.usefixtures("driver")
def test_parts_are_mapped_in_the_order_of_their_descriptors():
    mine = allocate()
    for number in range(4):
        mine.bytes[number * GRANULARITY] = number + 1
    turned = again(mine, fds=[*mine.fds[3::-1], mine.fds[4]])
    assert [int(turned.bytes[number * GRANULARITY]) for number in range(4)] == [4, 3, 2, 1]


def test_all_parts_are_given_back_once(driver):
    before = open_descriptors()
    segment = allocate()
    tensor = view(segment)
    segment.close()
    segment.close()
    assert segment.fds == ()
    assert open_descriptors() == before
    del segment
    assert len(driver.mapped) == 5, "a tensor holds all of them"
    made = len(driver.calls)
    del tensor
    assert driver.calls[made:] == [*LETTING_GO[:3], *["cuMemUnmap"] * 5, *LETTING_GO[4:]]
    assert driver.left() == []


@pytest.mark.parametrize("how", ["allocate", "from_fds"])
def test_whichever_call_fails_for_whichever_part_nothing_is_left(driver, how):
    keeper = allocate()
    before, taken, descriptors = driver.left(), len(driver.mapped), open_descriptors()

    def make() -> CudaSegment:
        return allocate() if how == "allocate" else again(keeper)

    start = len(driver.calls)
    make().close()
    calls = driver.calls[start : -len(LETTING_GO) - 4]
    assert calls.count("cuMemMap") == 5
    for number, function in enumerate(calls):
        driver.fail_at = len(driver.calls) + 1 + number
        if function in UNDOING:
            make().close()
        else:
            with pytest.raises(ArenaError, match=f"{function} failed"):
                make()
        assert (driver.left(), len(driver.mapped), open_descriptors()) == (before, taken, descriptors), (
            number,
            function,
        )


def test_running_out_of_memory_says_which_part_was_the_first_too_many(driver, monkeypatch):
    monkeypatch.setattr(fake_cuda, "CAPACITY", 3 * GRANULARITY)
    with pytest.raises(ArenaError, match=r"0\.01 GiB .*part 4 of 5,.* CUDA_ERROR_OUT_OF_MEMORY"):
        allocate()
    assert driver.left() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": PARTS[1:]},
        {"parts": (*PARTS, 4096)},
        {"parts": (GRANULARITY + 4096, *PARTS[1:])},
        {"parts": (GRANULARITY // 2, *PARTS[1:])},
    ],
    ids=["fewer", "more", "larger", "smaller"],
)
def test_parts_that_would_not_lie_side_by_side_are_refused(driver, changes):
    keeper = allocate()
    before, descriptors = driver.left(), open_descriptors()
    with pytest.raises(ArenaError, match="same version of hogwild"):
        again(keeper, **changes)
    assert (driver.left(), open_descriptors()) == (before, descriptors)


def test_a_part_that_is_smaller_than_announced_is_refused(driver):
    keeper = allocate()
    before, descriptors = driver.left(), open_descriptors()
    with pytest.raises(ArenaError, match=r"cuMemMap failed .* same version of hogwild"):
        again(keeper, parts=(*PARTS[:4], GRANULARITY + 4096))
    assert (driver.left(), open_descriptors()) == (before, descriptors)


# --- which GPU -----------------------------------------------------------------------------------------------------


def test_a_gpu_is_known_by_its_uuid_whatever_number_it_has_here(driver):
    made = CudaSegment.allocate(NBYTES, device=1)
    assert (made.device, made.device_id) == (torch.device("cuda:1"), IDS[1])
    driver.visible = [1, 0]
    assert again(made).device == torch.device("cuda:0")
    driver.visible = [1]
    assert again(made).device == torch.device("cuda:0")


@pytest.mark.parametrize(("visible", "seen"), [([1], IDS[1]), ([], "no GPU")])
def test_a_gpu_that_is_not_seen_here_is_named_with_what_to_set(driver, visible, seen):
    made = allocate()
    before, descriptors = driver.left(), open_descriptors()
    driver.visible = visible
    with pytest.raises(ArenaError) as refused:
        again(made)
    words = str(refused.value)
    assert f"it is on {IDS[0]}, and this process sees {seen}" in words
    assert f"CUDA_VISIBLE_DEVICES={IDS[0]}" in words
    assert (driver.left(), open_descriptors()) == (before, descriptors), "and nothing of it is kept"


def test_a_process_without_the_driver_says_so(driver, monkeypatch):
    made = allocate()

    def fails(*_: Any) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuInit", fails)
    descriptors = open_descriptors()
    with pytest.raises(ArenaError, match=r"cannot map .* cuInit failed .*libcuda"):
        again(made)
    assert open_descriptors() == descriptors


# --- the layout ----------------------------------------------------------------------------------------------------


def layout_of(held: Any, **changes: Any) -> Layout:
    given = {"device": held.device_id, "parts": held.parts, **changes}
    return Layout(held.nbytes, {"w": ACROSS}, {}, {"model.w": ACROSS}, SOURCE, **given)


@pytest.mark.usefixtures("driver")
def test_the_layout_says_where_the_arena_is_and_of_which_parts_it_consists():
    layout = layout_of(allocate())
    told = Layout.from_json(layout.to_json())
    assert told == layout
    assert (told.device, told.allocations) == (IDS[0], PARTS)
    assert layout.fingerprint() != replace(layout, device=IDS[1]).fingerprint()
    assert layout.fingerprint() != replace(layout, parts=(NBYTES,)).fingerprint()
    assert Layout(NBYTES, {}, {}, {}, SOURCE).allocations == (NBYTES,)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": [GRANULARITY]}, "do not make it up"),
        ({"parts": [NBYTES + 1, -1]}, "do not make it up"),
        ({"parts": [NBYTES, 0]}, "do not make it up"),
        ({"parts": ["4096"]}, "malformed"),
        ({"parts": None}, "malformed"),
        ({"device": "GPU-0"}, "device that is none"),
        ({"device": "cuda:0"}, "device that is none"),
        ({"device": IDS[0] + "\n"}, "device that is none"),
        ({"device": ""}, "device that is none"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ProtocolError, match=words):
        Layout.from_json({**layout_of(allocate()).to_json(), **changes})


# --- over the socket -----------------------------------------------------------------------------------------------


@pytest.fixture
def arena(driver: Driver) -> Arena:
    assert driver.mapped == {}
    segment = allocate()
    layout = layout_of(segment)
    return Arena(segment, ControlPage.create(layout.fingerprint()), layout)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[Path, list[Arena]]]:
    """A hub that takes everything, its socket, and what it has taken."""
    taken: list[Arena] = []
    hub = Hub(tmp_path / "arena.sock", taken.append, lambda _server, _begins: None)
    hub.start()
    yield tmp_path / "arena.sock", taken
    hub.stop()


def test_the_daemon_maps_what_the_server_offers_and_gives_it_to_the_next_server(driver, arena, daemon):
    sock, taken = daemon
    view(arena.weights).fill_(5)
    offer = Offer(sock, arena, {})
    offer.start()
    assert offer.attached.wait(30)
    (held,) = taken
    assert held.layout == arena.layout
    assert held.weights.base != arena.weights.base, "a mapping of its own"
    assert view(held.weights).unique().tolist() == [5]
    view(held.weights).fill_(6)
    assert view(arena.weights).unique().tolist() == [6]
    assert isinstance(held.control.segment, Segment), "the control page is the host's"
    held.control.steps = 17
    answer = client.ask(sock, SOURCE, {})
    assert answer is not None
    successor, session = answer
    assert view(successor.weights).unique().tolist() == [6]
    assert (successor.layout, successor.control.steps) == (arena.layout, 17)
    assert len(driver.mapped) == 15
    session.close()


def test_the_daemon_refuses_weights_on_a_gpu_that_it_does_not_see(driver, arena, daemon):
    sock, taken = daemon
    descriptors = settled_descriptors()
    driver.visible = [1]
    reply = offer_by_hand(sock, arena)
    assert reply["status"] == "refused"
    assert f"CUDA_VISIBLE_DEVICES={IDS[0]}" in reply["error"]
    assert taken == []
    assert len(driver.mapped) == 5
    wait_until(lambda: open_descriptors() == descriptors, "nothing is left open", 30)
    driver.visible = [0, 1]
    assert offer_by_hand(sock, arena)["status"] == "attached", "and goes on to take what it can use"


def test_a_server_that_does_not_see_the_daemons_gpu_does_not_load_other_weights(driver, arena, daemon):
    sock, _ = daemon
    assert offer_by_hand(sock, arena)["status"] == "attached"
    driver.visible = [1]
    with pytest.raises(ArenaError, match=f"CUDA_VISIBLE_DEVICES={IDS[0]}"):
        client.ask(sock, SOURCE, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arena: {"fds": arena.fds[1:]}, "6 descriptors, the peer sent 5"),
        (lambda arena: {"fds": (*arena.fds, arena.fds[0])}, "6 descriptors, the peer sent 7"),
        (lambda arena: {"fds": (arena.fds[-1], *arena.fds[:-1])}, "announced 4096 bytes of sealed memory"),
        (
            lambda arena: {"layout": {**arena.layout.to_json(), "device": "cpu"}},
            "on a CPU are one allocation",
        ),
        (lambda arena: {"layout": {**arena.layout.to_json(), "device": IDS[1]}}, "another layout"),
        (lambda arena: {"layout": replace(arena.layout, tensors={}).to_json()}, "another layout"),
    ],
    ids=["one too few", "one too many", "page first", "on a CPU", "on another GPU", "of another fingerprint"],
)
def test_faulty_offers_are_refused_and_leave_nothing(driver, arena, daemon, change, words):
    sock, taken = daemon
    before, descriptors = driver.left(), settled_descriptors()
    reply = offer_by_hand(sock, arena, **change(arena))
    assert reply["status"] == "refused"
    assert words in reply["error"]
    assert taken == []
    wait_until(lambda: open_descriptors() == descriptors, "nothing is left open", 30)
    wait_until(lambda: driver.left() == before, "nothing is left mapped", 30)


def test_a_cpu_has_the_host_memory_that_it_had():
    held = devices.allocate(8192, torch.device("cpu"))
    assert isinstance(held, Segment)
    assert (held.device_id, held.parts, len(held.fds)) == ("cpu", (8192,), 1)
    theirs = devices.receive([os.dup(held.fd)], held.parts, "cpu")
    held.bytes[5] = 9
    assert int(theirs.bytes[5]) == 9
    descriptors = open_descriptors()
    with pytest.raises(ProtocolError, match="one allocation"):
        devices.receive([os.dup(held.fd), os.dup(held.fd)], (4096, 4096), "cpu")
    assert open_descriptors() == descriptors


# --- two processes, and a device -----------------------------------------------------------------------------------


def obey_in_parts(pipe: Any, sock: Any, number: int) -> None:
    """A server with an arena of several parts, which sends its descriptors and then waits to be killed."""
    use_fake(Driver())
    segment = allocate()
    view(segment).fill_(number)
    protocol.send(sock, {}, segment.fds)
    pipe.send(("sent", None))
    pipe.recv()


@pytest.mark.usefixtures("driver")
def test_all_parts_outlive_the_process_that_made_them():
    ours, theirs = socket.socketpair()
    child = Spawned(obey_in_parts, theirs, 8)
    child.hear("sent")
    child.kill()
    received = protocol.receive(ours, max_fds=protocol.MAX_FDS)
    assert received is not None
    mine = CudaSegment.from_fds(received[1], PARTS, IDS[0])
    assert view(mine).unique().tolist() == [8]


@pytest.mark.gpu
def test_parts_on_a_device_are_one_tensor():
    mine = CudaSegment.allocate(5 * GRANULARITY, part_nbytes=GRANULARITY)
    theirs = again(mine)
    numbers = torch.arange(1024.0, device="cuda").view(4, 256)
    view(mine).copy_(numbers)
    torch.cuda.synchronize()
    assert torch.equal(view(theirs), numbers)
    whole = Region(0, (5 * GRANULARITY // 4,), (1,), "float32")
    view(theirs, whole).fill_(1)
    torch.cuda.synchronize()
    assert float(view(mine, whole).double().sum()) == 5 * GRANULARITY // 4
    assert mine.device_id == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
