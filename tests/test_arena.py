"""The shared memory and how it changes hands: real descriptors, sockets and processes."""

import fcntl
import gc
import json
import mmap
import os
import signal
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hogwild.arena import client, protocol
from hogwild.arena.client import Arena, Offer
from hogwild.arena.control import MAGIC, ControlPage
from hogwild.arena.control import NBYTES as CONTROL_NBYTES
from hogwild.arena.hub import Hub
from hogwild.arena.memory import Segment
from hogwild.chat_settings import ChatSettings
from hogwild.errors import ArenaError, HogwildError, ProtocolError, VerificationError
from hogwild.layout import Layout, Region, Source
from support import DEADLINE_S, wait_until
from tiny import Child, open_descriptors

NOBODY = 65534
NBYTES = 8192
SOURCE = Source("/models/a", (("model.safetensors", 10, 20, 30),), "digest of config.json")
OTHER_SOURCE = replace(SOURCE, files=(("model.safetensors", 10, 21, 30),))
REGION = Region(256, (4, 8), (8, 1), "float32")


def make_arena(source: Source = SOURCE) -> Arena:
    layout = Layout(NBYTES, {"w": REGION}, {"f": "frozen for a test"}, {"model.w": REGION}, source)
    return Arena(Segment.allocate(NBYTES), ControlPage.create(layout.fingerprint()), layout)


def value(arena: Arena) -> float:
    return float(arena.weights.tensor(REGION.offset, REGION.shape, REGION.stride, torch.float32)[3, 7])


def set_value(arena: Arena, number: float) -> None:
    arena.weights.tensor(REGION.offset, REGION.shape, REGION.stride, torch.float32)[3, 7] = number


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "run" / "arena.sock"


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        if child.process.is_alive():
            child.kill()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_segment_can_neither_shrink_nor_grow():
    segment = Segment.allocate(NBYTES)
    for size in (0, NBYTES - 1, NBYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    assert segment.bytes.shape == (NBYTES,)
    assert not segment.bytes.any()


def test_two_processes_see_each_others_writes(children):
    segment = Segment.allocate(NBYTES)

    def peer(pipe: Any, fd: int) -> None:
        mine = Segment.from_fd(os.dup(fd), NBYTES)
        pipe.send(("saw", int(mine.bytes[5])))
        mine.bytes[6] = 66
        pipe.send(("wrote", mine.inode()))
        pipe.recv()

    segment.bytes[5] = 55
    child = Child(peer, segment.fd)
    children.append(child)
    assert child.hear("saw") == 55
    assert child.hear("wrote") == segment.inode()
    assert int(segment.bytes[6]) == 66


def test_descriptors_go_with_a_segment_that_nobody_has_any_more_and_its_tensors_stay():
    before = open_descriptors()
    segment = Segment.allocate(NBYTES)
    tensor = segment.tensor(0, (4,), (1,), torch.float32)
    del segment
    gc.collect()
    assert open_descriptors() == before + 1, "the mapping's own"
    tensor.fill_(3)
    assert tensor.tolist() == [3.0] * 4
    del tensor
    assert open_descriptors() == before
    fd = os.memfd_create("foreign")
    with pytest.raises(ArenaError):
        Segment.from_fd(fd, NBYTES)  # it takes the descriptor over, and closes it once
    gc.collect()
    assert open_descriptors() == before


def test_the_memory_outlives_its_creator_while_a_descriptor_is_held(pair):
    ours, theirs = pair

    def creator(pipe: Any) -> None:
        segment = Segment.allocate(NBYTES)
        segment.bytes[:] = 7
        protocol.send(theirs, {}, (segment.fd,))
        pipe.send(("sent", None))
        pipe.recv()

    child = Child(creator)
    child.hear("sent")
    child.kill()
    received = protocol.receive(ours, max_fds=1)
    assert received is not None
    segment = Segment.from_fd(received[1][0], NBYTES)
    assert bool((segment.bytes == 7).all())


def test_closing_the_descriptor_leaves_tensors_usable():
    before = open_descriptors()
    segment = Segment.allocate(NBYTES)
    tensor = segment.tensor(0, (4,), (1,), torch.float32)
    segment.close()
    segment.close()
    del segment
    tensor.fill_(3)
    assert tensor.tolist() == [3.0] * 4
    del tensor
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "flaw", ["unsealed", "half sealed", "smaller", "larger", "empty", "a pipe", "a file"]
)
def test_only_sealed_memory_of_the_announced_size_is_mapped(flaw, tmp_path):
    before = open_descriptors()
    announced = NBYTES
    if flaw == "a pipe":
        fd, writer = os.pipe()
        os.close(writer)
    elif flaw == "a file":
        (tmp_path / "file").write_bytes(bytes(NBYTES))
        fd = os.open(tmp_path / "file", os.O_RDWR)
    else:
        fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = {"smaller": NBYTES // 2, "larger": NBYTES * 2, "empty": 0}.get(flaw, NBYTES)
        os.ftruncate(fd, size)
        seals = {"unsealed": 0, "half sealed": fcntl.F_SEAL_GROW}
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals.get(flaw, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW))
        announced = 0 if flaw == "empty" else NBYTES
    with pytest.raises(ArenaError):
        Segment.from_fd(fd, announced)
    assert open_descriptors() == before, "the descriptor was taken over and must be closed"


def test_an_allocation_that_the_kernel_refuses_is_an_arena_error_and_leaves_nothing_open():
    before = open_descriptors()
    for nbytes in (2**62, 2**80):
        with pytest.raises(ArenaError, match="shared memory"):
            Segment.allocate(nbytes)
    assert open_descriptors() == before


def test_writes_of_another_view_do_not_trip_autograd():
    """Two views of one region are two tensors to autograd, which is what lock-free threads need."""
    segment = Segment.allocate(NBYTES)
    mine, theirs = (segment.tensor(0, (4, 4), (4, 1), torch.float32) for _ in range(2))
    x = torch.ones(4, requires_grad=True)
    loss = (mine @ x).sum()
    theirs.fill_(2)
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8.0] * 4, "backward reads the weights as they are now"
    loss = (mine @ x).sum()
    mine.fill_(3)  # the control experiment: the same view does trip it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_views_lie_where_they_say():
    segment = Segment.allocate(NBYTES)
    segment.tensor(0, (64,), (1,), torch.bfloat16).copy_(torch.arange(64))
    transposed = segment.tensor(8, (3, 5), (1, 8), torch.bfloat16)
    assert transposed.tolist() == [[float(4 + i + 8 * j) for j in range(5)] for i in range(3)]


def test_views_of_a_segment_whose_size_is_no_multiple_of_the_item():
    segment = Segment.allocate(4098)
    segment.tensor(4092, (1,), (1,), torch.float32).fill_(1)
    assert segment.bytes[4092:4096].any()


# --- control page --------------------------------------------------------------------------------------------------


def test_words_of_the_control_page_survive_a_kill_and_are_seen_by_the_other_side():
    page = ControlPage.create(b"f" * 32)

    def daemon(pipe: Any, fd: int) -> None:
        mine = ControlPage(Segment.from_fd(os.dup(fd), CONTROL_NBYTES))
        mine.steps, mine.epoch, mine.generation = 2**40, 7, 5
        mine.mark_trained()
        mine.beat_daemon()
        pipe.send(("id", mine.arena_id))
        pipe.recv()

    assert (page.steps, page.epoch, page.generation, page.trained) == (0, 0, 0, False)
    assert page.daemon_age_s is None
    child = Child(daemon, page.segment.fd)
    assert child.hear("id") == page.arena_id
    child.kill()
    assert (page.steps, page.epoch, page.generation, page.trained) == (2**40, 7, 5, True)
    assert page.daemon_age_s is not None
    assert page.daemon_age_s >= 0
    gauge = page.new_gauge()
    gauge.set_engine(3, 4)
    gauge.set_in_flight(7)
    assert (page.load.running, page.load.waiting, page.load.in_flight) == (3, 4, 7)
    assert page.busy
    assert page.steps == 2**40, "the server's words are not the daemon's"
    assert page.fingerprint == b"f" * 32


def test_every_arena_has_an_id_of_its_own():
    assert len({ControlPage.create(bytes(32)).arena_id for _ in range(5)}) == 5


def write_words(pipe: Any, fd: int) -> None:
    page = ControlPage(Segment.from_fd(os.dup(fd), CONTROL_NBYTES))
    pipe.send(("writing", None))
    for number in range(1 << 40, 1 << 62):
        page.epoch = number


def test_a_reader_sees_the_old_word_or_the_new_one():
    """Never what is neither: epoch 0 would be the salt of untrained weights."""
    page = ControlPage.create(bytes(32))
    page.epoch = 1 << 40
    child = Child(write_words, page.segment.fd)
    child.hear("writing")
    last, seen = 1 << 40, 0
    began = time.monotonic()
    while (waited := time.monotonic() - began) < 2.0 or (seen <= 100 and waited < DEADLINE_S):
        for _ in range(1000):
            now = page.epoch
            assert now >= last
            seen += now > last
            last = now
    child.kill()
    assert seen > 100, "it was written meanwhile"


def test_a_page_of_another_version_or_size_is_refused():
    page = ControlPage.create(bytes(32))
    page.segment.mapping[7] = MAGIC[7] + 1
    with pytest.raises(ArenaError, match="different versions of hogwild"):
        ControlPage(page.segment)
    with pytest.raises(ArenaError, match="4096 bytes"):
        ControlPage(Segment.allocate(2 * CONTROL_NBYTES))


# --- protocol ------------------------------------------------------------------------------------------------------


def test_a_message_and_its_descriptors_arrive(pair):
    ours, theirs = pair
    segments = [Segment.allocate(NBYTES), Segment.allocate(CONTROL_NBYTES)]
    message = {"op": "x", "text": "ü\n\u2028", "big": "y" * 300_000, "nested": {"a": [1, None, True]}}
    child = Child(lambda _pipe: protocol.send(theirs, message, tuple(s.fd for s in segments)))
    received = protocol.receive(ours, max_fds=2)
    assert received is not None
    assert received[0] == message
    for fd, segment in zip(received[1], segments, strict=True):
        assert os.fstat(fd).st_ino == segment.inode()[1]
        assert not os.get_inheritable(fd), "a child of this process must not hold the weights"
        os.close(fd)
    child.process.join()
    theirs.close()
    assert protocol.receive(ours, max_fds=2) is None, "a hang-up between messages is not an error"


def _frame(body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", len(body) if length is None else length) + body


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (_frame(b"{}", protocol.MAX_MESSAGE_BYTES + 1), "more than"),
        (_frame(b'{"a": 1', 100), "hung up after 7 of 100 bytes"),
        (b"\x05\x00", "hung up"),
        (_frame(b"{not json"), "not JSON"),
        (_frame(b"\xff\xfe{}"), "not JSON"),
        (_frame(b"[" * 200_000), "not JSON"),
        (_frame(b"[1]"), "not an object"),
        (_frame(b"12"), "not an object"),
        (_frame(b"null"), "not an object"),
        (_frame(b""), "not JSON"),
    ],
    ids=["oversize", "truncated", "header", "json", "utf8", "deep", "array", "number", "null", "empty"],
)
def test_what_is_no_message_is_refused_and_its_descriptors_are_closed(pair, data, fault):
    ours, theirs = pair
    before = open_descriptors()
    segment = Segment.allocate(NBYTES)
    socket.send_fds(theirs, [data[:4]], [segment.fd, segment.fd])
    theirs.sendall(data[4:])
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match=fault):
        protocol.receive(ours, max_fds=2)
    segment.close()
    del segment
    assert open_descriptors() == before


@pytest.mark.parametrize(("sent", "allowed"), [(3, 2), (1, 0), (40, 2)])
def test_more_descriptors_than_allowed_are_refused_and_closed(pair, sent, allowed):
    ours, theirs = pair
    reader, writer = os.pipe()
    before = open_descriptors()
    socket.send_fds(theirs, [_frame(b"{}")], [reader] * sent)
    with pytest.raises(ProtocolError, match="more descriptors"):
        protocol.receive(ours, max_fds=allowed)
    assert open_descriptors() == before
    os.close(reader)
    os.close(writer)


def test_an_oversize_message_is_not_sent(pair):
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        protocol.send(pair[0], {"a": "x" * protocol.MAX_MESSAGE_BYTES})


def test_the_peer_is_who_the_kernel_says(pair):
    assert protocol.peer(pair[0]) == (os.getpid(), os.geteuid())
    assert protocol.check_peer(pair[0]) == os.getpid()


# --- hub and client ------------------------------------------------------------------------------------------------


def run_daemon(pipe: Any, path: Path, refuse: str = "", fail: str = "") -> None:
    """A daemon: takes an arena, holds it, and says what happens."""

    def on_offer(arena: Arena) -> None:
        if fail:
            raise RuntimeError(fail)
        if refuse:
            raise VerificationError(refuse, ["w: one problem", "x: another"])
        pipe.send(("took", (arena.control.arena_id, arena.weights.inode()[1])))

    def on_session(server: dict[str, Any], begins: bool) -> None:
        pipe.send(("session" if begins else "lost", server))

    hub = Hub(path, on_offer, on_session)
    hub.start()
    pipe.send(("listening", None))
    while (command := pipe.recv()) != "stop":
        if command == "value":
            pipe.send(("value", hub.arena and value(hub.arena)))
        elif command == "descriptors":
            pipe.send(("descriptors", open_descriptors()))
        else:
            assert hub.arena is not None
            set_value(hub.arena, command)
            pipe.send(("written", None))
    hub.stop()
    pipe.send(("stopped", path.exists()))
    pipe.recv()


def run_server(pipe: Any, path: Path, source: Source = SOURCE) -> None:
    """A server: asks for an arena, makes one if there is none, and offers it for as long as it lives."""
    announcement = {"url": "http://127.0.0.1:1", "more": "is ignored"}
    held = client.ask(path, source, announcement)
    arena, session = held if held is not None else (make_arena(source), None)
    offer = Offer(path, arena, announcement)
    offer.start(session)
    pipe.send(("arena", (arena.control.arena_id, arena.weights.inode()[1])))
    pipe.send(("was held", held is not None))
    while True:
        command = pipe.recv()
        if command == "attached":
            offer.attached.wait()
            pipe.send(("attached", True))
        elif command == "detached":
            while offer.attached.is_set():
                time.sleep(0.01)
            pipe.send(("detached", True))
        elif command == "value":
            pipe.send(("value", value(arena)))
        else:
            set_value(arena, command)
            pipe.send(("written", None))


@pytest.fixture
def start(sock: Path, children: list[Child]):
    def start(work: Any, *arguments: Any) -> Child:
        child = Child(work, sock, *arguments)
        children.append(child)
        if work is run_daemon:
            child.hear("listening")
        return child

    return start


def told(child: Child, command: Any, answer: str) -> Any:
    child.tell(command)
    return child.hear(answer)


def test_the_daemon_first(start):
    daemon = start(run_daemon)
    server = start(run_server)
    arena = server.hear("arena")
    assert server.hear("was held") is False
    assert daemon.hear("took") == arena
    announced = daemon.hear("session")
    assert announced == {"url": "http://127.0.0.1:1", "pid": server.pid}, "the pid is the kernel's word"
    assert told(server, "attached", "attached")
    told(daemon, 1.5, "written")
    assert told(server, "value", "value") == 1.5
    told(server, 2.5, "written")
    assert told(daemon, "value", "value") == 2.5


def test_the_server_first(start):
    server = start(run_server)
    arena = server.hear("arena")
    assert start(run_daemon).hear("took") == arena


def test_a_killed_daemon_is_offered_the_same_memory_again(start):
    daemon = start(run_daemon)
    server = start(run_server)
    arena = daemon.hear("took")
    told(server, "attached", "attached")
    told(daemon, 4.25, "written")
    daemon.kill()
    assert told(server, "detached", "detached")
    assert told(server, "value", "value") == 4.25
    daemon = start(run_daemon)  # the socket that the killed one left is replaced
    assert daemon.hear("took") == arena
    daemon.hear("session")
    assert told(daemon, "value", "value") == 4.25


def test_a_killed_server_finds_the_memory_that_the_daemon_kept(start):
    daemon = start(run_daemon)
    server = start(run_server)
    arena = daemon.hear("took")
    daemon.hear("session")
    told(daemon, 8.5, "written")
    server.kill()
    assert daemon.hear("lost")["pid"] == server.pid
    assert told(daemon, "value", "value") == 8.5
    server = start(run_server)
    assert server.hear("arena") == arena
    assert server.hear("was held") is True
    assert daemon.hear("session")["pid"] == server.pid
    assert told(server, "value", "value") == 8.5
    assert told(server, "attached", "attached")
    assert "took" not in [name for name, _ in daemon.heard()], "what is held is not verified again"


def test_a_second_arena_is_refused_while_one_is_held_and_nothing_of_it_is_kept(start, sock):
    daemon = start(run_daemon)
    server = start(run_server)
    server.hear("arena")
    told(server, "attached", "attached")
    descriptors = told(daemon, "descriptors", "descriptors")
    for _ in range(5):
        reply = offer_by_hand(sock, make_arena(OTHER_SOURCE))
        assert reply["status"] == "refused"
        assert "will not drop them" in reply["error"]
    wait_until(
        lambda: told(daemon, "descriptors", "descriptors") == descriptors,
        "memory that was refused is let go of",
        30,
    )
    told(daemon, 3.5, "written")
    assert told(server, "value", "value") == 3.5, "the held one is still the first one"


@pytest.mark.parametrize("verifies", [True, False])
def test_a_server_that_comes_back_while_its_weights_are_verified_waits_for_what_becomes_of_them(
    sock, verifies
):
    """Filled anew from disk they would be refused as those of another server, for as long as both live."""
    began, go_on = threading.Event(), threading.Event()

    def on_offer(_arena: Arena) -> None:
        began.set()
        assert go_on.wait(60)
        if not verifies:
            raise VerificationError("not this model", ["w: one problem"])

    hub = Hub(sock, on_offer, lambda _server, _begins: None)
    hub.start()
    try:
        arena = make_arena()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
            gone.connect(str(sock))
            protocol.send(gone, {"op": "offer", "version": protocol.VERSION, **arena.to_json()}, arena.fds)
            assert began.wait(60)
        threading.Timer(1.0, go_on.set).start()
        held = client.ask(sock, SOURCE, {})
        assert go_on.is_set()
        if verifies:
            assert held is not None
            assert held[0].control.arena_id == arena.control.arena_id
            held[1].close()
        else:
            assert held is None
    finally:
        hub.stop()


def test_a_server_that_asks_a_daemon_just_started_gets_what_an_older_one_lives_on_with(start, sock):
    """The older one notices within half a second that there is a daemon again. Filled from disk meanwhile, the weights
    of the new one would be refused for as long as both live."""
    daemon = start(run_daemon)
    server = start(run_server)
    arena = server.hear("arena")
    told(server, "attached", "attached")
    daemon.tell("stop")
    told(server, "detached", "detached")
    time.sleep(1)  # it has tried in vain
    start(run_daemon)
    held = client.ask(sock, SOURCE, {})
    assert held is not None
    assert held[0].control.arena_id == arena[0]
    held[1].close()


def test_what_is_offered_and_refused_again_and_again_is_logged_once(sock, capsys):
    """A server goes on offering, every few seconds."""
    problem = ["w: one problem"]

    def on_offer(_arena: Arena) -> None:
        raise VerificationError("not this model", list(problem))

    hub = Hub(sock, on_offer, lambda _server, _begins: None)
    hub.start()
    try:
        for _ in range(3):
            assert offer_by_hand(sock, make_arena())["problems"] == problem
        problem[:] = ["x: another"]
        for _ in range(3):
            assert offer_by_hand(sock, make_arena())["problems"] == problem
    finally:
        hub.stop()
    assert capsys.readouterr().out.count("arena.refused") == 2


def test_what_does_not_verify_is_refused_with_its_problems_and_not_held(start, sock):
    daemon = start(run_daemon, "not this model")
    descriptors = told(daemon, "descriptors", "descriptors")
    for _ in range(3):
        reply = offer_by_hand(sock, make_arena())
        assert reply["status"] == "refused"
        assert reply["problems"] == ["w: one problem", "x: another"]
    assert client.ask(sock, SOURCE, {}) is None
    wait_until(
        lambda: told(daemon, "descriptors", "descriptors") == descriptors, "refused memory is let go of", 30
    )


def test_a_daemon_that_fails_to_verify_says_so_and_goes_on(start, sock):
    daemon = start(run_daemon, "", "no tokenizer in that folder")
    descriptors = told(daemon, "descriptors", "descriptors")
    reply = offer_by_hand(sock, make_arena())
    assert reply["status"] == "refused"
    assert "no tokenizer in that folder" in reply["error"]
    assert client.ask(sock, SOURCE, {}) is None
    wait_until(lambda: told(daemon, "descriptors", "descriptors") == descriptors, "it is let go of", 30)


def offer_by_hand(path: Path, arena: Arena, **changes: Any) -> dict[str, Any]:
    """One offer, with whatever a faulty server might say; {} when the daemon hangs up."""
    message = {
        "op": "offer",
        "version": protocol.VERSION,
        "layout": arena.layout.to_json(),
        "server": {},
        **changes,
    }
    fds = message.pop("fds", arena.fds)
    return exchange(path, message, fds)


def exchange(path: Path, message: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        protocol.send(sock, message, fds)
        reply = protocol.receive(sock, max_fds=2)
        if reply is None:
            return {}
        for fd in reply[1]:
            os.close(fd)
        return reply[0]


def _faulty_arenas() -> dict[str, Any]:
    good = make_arena()
    foreign_page = ControlPage.create(b"x" * 32)
    old_page = ControlPage.create(good.layout.fingerprint())
    old_page.segment.mapping[:8] = b"HOGWILD\x00"
    layout = good.layout.to_json()
    outside = {**layout, "tensors": {"w": {**layout["tensors"]["w"], "offset": NBYTES}}}
    pipe = os.pipe()
    return {
        "no layout": ({"layout": None}, "malformed"),
        "a region outside": ({"layout": outside}, "outside of the arena"),
        "another size": ({"layout": {**layout, "nbytes": NBYTES * 2}}, "announced 16384 bytes"),
        "one descriptor": ({"fds": good.fds[:1]}, "2 descriptors"),
        "no descriptor": ({"fds": ()}, "2 descriptors"),
        "a pipe for weights": ({"fds": (pipe[0], good.fds[1])}, "cannot map"),
        "a pipe for control": ({"fds": (good.fds[0], pipe[1])}, "cannot map"),
        "swapped": ({"fds": good.fds[::-1]}, "announced"),
        "another layout's page": ({"fds": (good.fds[0], foreign_page.segment.fd)}, "another layout"),
        "an older page": ({"fds": (good.fds[0], old_page.segment.fd)}, "different versions"),
        "keep": (good, foreign_page, old_page, pipe),
    }


def test_faulty_offers_are_refused_with_a_reason_and_leak_nothing(start, sock):
    daemon = start(run_daemon)
    faulty = _faulty_arenas()
    good, *others = faulty.pop("keep")
    descriptors = told(daemon, "descriptors", "descriptors")
    for name, (change, reason) in faulty.items():
        reply = offer_by_hand(sock, good, **change)
        assert reply.get("status") == "refused", name
        assert reason in reply["error"], name
    wait_until(lambda: told(daemon, "descriptors", "descriptors") == descriptors, "nothing is left open", 30)
    assert offer_by_hand(sock, good) == {"status": "attached"}, "and the daemon still takes a good one"
    for fd in others.pop():
        os.close(fd)


@pytest.mark.parametrize(
    "message",
    [
        {"op": "offer", "version": protocol.VERSION + 1},
        {"op": "ask", "version": None},
        {"op": "train", "version": protocol.VERSION},
        {},
    ],
)
def test_another_version_or_a_word_unheard_of_is_refused(start, sock, message):
    start(run_daemon)
    arena = make_arena()
    reply = exchange(sock, message, arena.fds)
    assert reply["status"] == "refused"
    assert "install the same hogwild" in reply["error"]


@pytest.mark.parametrize(
    "source", [None, {}, {"files": 3}, {"path": "", "files": [["a", 1e999, 1, 1]], "config": ""}]
)
def test_a_malformed_question_ends_that_session_only(start, sock, source):
    start(run_daemon)
    assert exchange(sock, {"op": "ask", "version": protocol.VERSION, "source": source}) == {}
    assert client.ask(sock, SOURCE, {}) is None


def test_what_a_server_says_about_itself_cannot_upset_the_daemon(start, sock):
    daemon = start(run_daemon)
    for server in (None, 3, ["url"], {"event": "x", "error": "y", "logger": 1, "pid": -1}, {"url": 5}):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(sock))
            question = json.dumps({"op": "ask", "version": 0, "server": server}).encode()
            raw.sendall(_frame(question) + b"more that nobody asked for")
        reply = offer_by_hand(sock, make_arena(), server=server, layout=None)
        assert reply["status"] == "refused"
    server = start(run_server)
    assert daemon.hear("took") == server.hear("arena")


def test_a_server_says_how_long_texts_may_be_and_how_it_makes_prompts(sock):
    """In an offer, before the trainers are built, and with every session: the memory may be that of an earlier one."""
    offered: list[Arena] = []
    sessions: list[dict[str, Any]] = []
    hub = Hub(sock, offered.append, lambda server, _begins: sessions.append(server))
    hub.start()
    Offer(sock, make_arena(), {"url": "", "max_model_len": 4096, "chat": {"template": "{{ 1 }}"}}).start()
    wait_until(lambda: sessions, "it is taken")
    assert offered[0].max_model_len == sessions[0]["max_model_len"] == 4096
    assert offered[0].chat == sessions[0]["chat"] == ChatSettings("{{ 1 }}")
    held = client.ask(sock, SOURCE, {"url": "", "max_model_len": 512})
    assert held is not None
    wait_until(lambda: len(sessions) > 1, "another server has mapped it")
    assert sessions[1]["max_model_len"] == 512
    assert "chat" not in sessions[1]
    held[1].close()
    hub.stop()


@pytest.mark.parametrize(
    "said", [{}, None, {"max_model_len": None}, *({"max_model_len": n} for n in ("7", 0, -1, 7.5, True))]
)
def test_a_server_that_does_not_say_how_long_texts_may_be_is_taken_too(sock, said):
    """One of an older hogwild has no word for it."""
    offered: list[Arena] = []
    sessions: list[dict[str, Any]] = []
    hub = Hub(sock, offered.append, lambda server, _begins: sessions.append(server))
    hub.start()
    assert offer_by_hand(sock, make_arena(), server=said) == {"status": "attached"}
    wait_until(lambda: sessions, "it is taken")
    assert offered[0].max_model_len is None
    assert "max_model_len" not in sessions[0]
    hub.stop()


def test_asking_with_other_files_finds_nothing(start, sock):
    daemon = start(run_daemon)
    start(run_server).hear("arena")
    daemon.hear("session")
    assert client.ask(sock, OTHER_SOURCE, {}) is None
    assert client.ask(sock, replace(SOURCE, config="another"), {}) is None
    moved = replace(SOURCE, path="/mnt/same/files/elsewhere")
    held = client.ask(sock, moved, {})
    assert held is not None
    held[1].close()


def test_asking_where_nobody_listens_finds_nothing(sock):
    assert client.ask(sock, SOURCE, {}) is None
    sock.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sock))
    assert client.ask(sock, SOURCE, {}) is None, "a stale socket"


def test_a_daemon_that_does_not_answer_is_an_error_not_an_empty_answer(sock, monkeypatch):
    """Loading from disk now would serve an untrained model beside a daemon that holds trained weights."""
    monkeypatch.setattr(client, "_ASK_TIMEOUT_S", 0.3)
    sock.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(sock))
        mute.listen()
        with pytest.raises(ArenaError, match="does not answer"):
            client.ask(sock, SOURCE, {})


def test_a_stopped_daemon_is_an_error_not_an_empty_answer(start, sock, monkeypatch):
    monkeypatch.setattr(client, "_ASK_TIMEOUT_S", 0.3)
    daemon = start(run_daemon)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ArenaError, match="does not answer"):
            client.ask(sock, SOURCE, {})
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_something_else_on_the_socket_is_a_protocol_error(sock):
    def babble(pipe: Any) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(sock))
            other.listen()
            pipe.send(("listening", None))
            connection, _ = other.accept()
            connection.sendall(_frame(b'{"status": "teapot"}'))
            pipe.recv()

    sock.parent.mkdir()
    child = Child(babble)
    child.hear("listening")
    with pytest.raises(ProtocolError, match="teapot"):
        client.ask(sock, SOURCE, {})
    child.kill()


def test_the_socket_is_for_its_owner_alone(start, sock):
    start(run_daemon)
    assert stat.S_IMODE(sock.stat().st_mode) == 0o600
    assert stat.S_IMODE(sock.parent.stat().st_mode) == 0o700


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on(start, sock):
    start(run_daemon)
    with pytest.raises(ArenaError, match="another daemon listens"):
        Hub(sock, lambda _arena: None, lambda _server, _begins: None)
    assert client.ask(sock, SOURCE, {}) is None


@pytest.mark.parametrize("obstacle", ["a file", "a folder", "a file for a folder"])
def test_a_path_that_is_in_use_is_an_error_with_its_name_and_is_not_removed(sock, obstacle):
    if obstacle == "a file for a folder":
        sock.parent.write_text("precious")
    elif obstacle == "a file":
        sock.parent.mkdir()
        sock.write_text("precious")
    else:
        sock.mkdir(parents=True)
    with pytest.raises(HogwildError, match=str(sock)):
        Hub(sock, lambda _arena: None, lambda _server, _begins: None)
    assert sock.parent.exists()
    assert sock.exists() or obstacle == "a file for a folder"


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # it had not been accepted yet
        return True


def test_stopping_hangs_up_and_removes_the_socket(start, sock):
    daemon = start(run_daemon)
    server = start(run_server)
    told(server, "attached", "attached")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(sock))
        silent.settimeout(60)
        assert told(daemon, "stop", "stopped") is False
        assert hung_up(silent), "also on somebody who has not said anything"
    assert told(server, "detached", "detached")
    assert client.ask(sock, SOURCE, {}) is None


def test_stopping_ends_the_accepting_thread(sock):
    hub = Hub(sock, lambda _arena: None, lambda _server, _begins: None)
    hub.start()
    hub.stop()
    hub._thread.join(60)
    assert not hub._thread.is_alive()


# --- users ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to others."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_the_daemon_refuses_another_user(open_folder, children):
    path = open_folder / "arena.sock"
    daemon = Child(run_daemon, path)
    children.append(daemon)
    daemon.hear("listening")

    def stranger(pipe: Any) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            pipe.send(("got", exchange(path, {"op": "ask", "version": protocol.VERSION})))
        except OSError as error:
            pipe.send(("got", type(error).__name__))

    intruder = Child(stranger)
    assert intruder.hear("got") == "PermissionError", "the mode of the socket keeps others out"
    path.chmod(0o777)
    intruder = Child(stranger)
    assert intruder.hear("got") in ({}, "ConnectionResetError", "BrokenPipeError"), (
        "so does the check of the peer"
    )
    assert "session" not in [name for name, _ in daemon.heard()]


def test_the_server_refuses_a_daemon_of_another_user_and_keeps_offering(open_folder, children):
    path = open_folder / "arena.sock"

    def impostor(pipe: Any) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            pipe.send(("listening", None))
            pipe.recv()

    child = Child(impostor)
    children.append(child)
    child.hear("listening")
    with pytest.raises(ProtocolError, match=f"user {NOBODY}"):
        client.ask(path, SOURCE, {})
    server = Child(run_offering, path)
    children.append(server)
    assert f"user {NOBODY}" in server.hear("said")
    child.kill()
    path.unlink()
    daemon = Child(run_daemon, path)
    children.append(daemon)
    daemon.hear("took")


def test_a_socket_that_may_not_be_opened_is_an_error_and_is_said(open_folder, children):
    """A daemon and a server of two users must not look like a daemon that is not there."""
    path = open_folder / "arena.sock"
    daemon = Child(run_daemon, path)
    children.append(daemon)
    daemon.hear("listening")

    def stranger(pipe: Any) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            pipe.send(("asked", client.ask(path, SOURCE, {})))
        except ArenaError as error:
            pipe.send(("asked", str(error)))
        run_offering(pipe, path)

    child = Child(stranger)
    children.append(child)
    assert f"{path}" in str(child.hear("asked"))
    assert "Permission denied" in child.hear("said")


def run_offering(pipe: Any, path: Path) -> None:
    """Offers an arena, and passes on what it would write to the server's log."""
    client.log.handlers = [_Telling(pipe)]
    client._RETRY_REFUSED_S = 0.2
    Offer(path, make_arena(), {}).start()
    pipe.recv()


class _Telling(client.logging.Handler):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: Any) -> None:
        self._pipe.send(("said", record.getMessage()))


def test_the_page_size_is_what_control_pages_have():
    assert mmap.PAGESIZE == CONTROL_NBYTES
