"""The arena on a GPU: against a stand-in of the driver everywhere, and again on a device where there is one.

The stand-in (fake_cuda.py) shows that the calls are right by the driver's documentation and that nothing leaks; it
replaces the one function that makes a CUDA tensor, `cuda_memory._wrap`. Tests that take `machine` run on both; those of
the device have not run yet.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fake_cuda
from fake_cuda import GRANULARITY, UNDOING, Driver
from hogwild.arena import cuda_driver, cuda_memory, protocol
from hogwild.arena.cuda_memory import CudaSegment
from hogwild.errors import ArenaError
from tiny import Child, open_descriptors

NBYTES = 3 * GRANULARITY - 4096  # no multiple of it
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int32, torch.int64, torch.bool,
]  # fmt: skip

LETTING_GO = [
    "cuCtxPushCurrent", "cuCtxSynchronize", "cuCtxPopCurrent",  # nothing on the device uses it any more
    "cuMemUnmap", "cuMemAddressFree", "cuDevicePrimaryCtxRelease",
]  # fmt: skip


def use_fake(driver: Driver, patch: Any = setattr) -> None:
    patch(cuda_driver, "load", lambda: driver)
    patch(cuda_memory, "_wrap", fake_cuda.wrap)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The stand-in, in use."""
    made = Driver()
    use_fake(made, monkeypatch.setattr)
    return made


@pytest.fixture(params=["fake", pytest.param("device", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> str:
    """Where the test runs."""
    if request.param == "fake":
        request.getfixturevalue("driver")
    return str(request.param)


# --- what is asked of the driver -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [64 << 10, GRANULARITY])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_sizes_are_rounded_up_to_what_the_driver_reports(monkeypatch, granularity, beyond):
    driver = Driver(granularity)
    use_fake(driver, monkeypatch.setattr)
    nbytes = 2 * GRANULARITY + beyond
    mine = CudaSegment.allocate(nbytes)
    theirs = CudaSegment.from_fd(os.dup(mine.fd), nbytes)
    assert driver.sizes() == [2 * GRANULARITY + (granularity if beyond > 0 else 0)] * 2
    assert mine.nbytes == theirs.nbytes == nbytes
    assert mine.bytes.shape == theirs.bytes.shape == (nbytes,)
    assert mine.base != theirs.base


@pytest.mark.parametrize("device", [0, 1])
def test_memory_access_and_context_are_of_the_device_that_was_asked_for(driver, device):
    segment = CudaSegment.allocate(NBYTES, device)
    CudaSegment.from_fd(os.dup(segment.fd), NBYTES, device)
    assert driver.devices == {device}


def test_everything_is_given_back_once_and_in_order_when_the_last_tensor_is_gone(driver):
    before = open_descriptors()
    segment = CudaSegment.allocate(NBYTES)
    assert driver.contexts == [], "the caller's thread has the context that it had"
    assert driver.handles == {}, "mapping and descriptor are enough"
    tensors = [segment.tensor(0, (4,), (1,), torch.bfloat16), segment.bytes[5:]]
    segment.close()
    segment.close()
    assert open_descriptors() == before
    del segment
    tensors.pop(0)
    assert len(driver.mapped) == 1
    tensors[0].fill_(3)
    made = len(driver.calls)
    tensors.clear()
    assert driver.calls[made:] == LETTING_GO
    assert driver.left() == []
    assert driver.calls.count("cuMemRelease") == 1


def test_at_exit_nothing_is_unmapped_under_threads_that_still_run():
    script = (
        "import test_arena_cuda as t\n"
        "driver = t.Driver()\n"
        "t.use_fake(driver)\n"
        "segment = t.CudaSegment.allocate(t.NBYTES)\n"
        "driver.cuMemUnmap = lambda *_: print('unmapped') or (0,)\n"
    )
    for end, said in (("del segment", "unmapped"), ("pass", "")):  # the first shows that the second can fail
        ran = subprocess.run(
            [sys.executable, "-c", script + end],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert ran.stdout.strip() == said


@pytest.mark.usefixtures("driver")
def test_a_descriptor_is_not_for_children():
    segment = CudaSegment.allocate(NBYTES)
    assert not os.get_inheritable(segment.fd)


def made_by_another(how: str) -> int:
    """A descriptor to import; nothing else is left of its maker."""
    fd = -1
    if how == "from_fd":
        segment = CudaSegment.allocate(NBYTES)
        fd = os.dup(segment.fd)
        segment.close()
    return fd


def make(how: str, fd: int) -> CudaSegment:
    return CudaSegment.allocate(NBYTES) if how == "allocate" else CudaSegment.from_fd(fd, NBYTES)


@pytest.mark.parametrize("how", ["allocate", "from_fd"])
def test_whatever_call_fails_is_named_and_nothing_is_left(driver, caplog, how):
    before = open_descriptors()
    fd = made_by_another(how)
    start = len(driver.calls)
    make(how, fd).close()
    calls = driver.calls[start : -len(LETTING_GO)]
    assert {"cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemRelease"} < set(calls)
    for number, function in enumerate(calls):
        fd = made_by_another(how)
        caplog.clear()
        driver.fail_at = len(driver.calls) + 1 + number
        if function in UNDOING:  # no reason to refuse what works; the log has it
            make(how, fd).close()
            assert f"{function} failed with CUDA_ERROR_UNKNOWN" in caplog.text
        else:
            with pytest.raises(ArenaError) as raised:
                make(how, fd)
            words = str(raised.value)
            assert f"{function} failed with CUDA_ERROR_UNKNOWN (the words for CUDA_ERROR_UNKNOWN)" in words
            assert "0.01 GiB" in words
            assert "GPU 0" in words
            assert ("of 1.00 GiB are free" in words) == (number > calls.index("cuCtxPushCurrent"))
            assert not caplog.text
        assert driver.left() == [], function
        assert open_descriptors() == before, function


@pytest.mark.parametrize("step", range(len(LETTING_GO)))
def test_a_failure_while_letting_go_is_logged_and_ends_nothing(driver, caplog, step):
    segment = CudaSegment.allocate(NBYTES)
    segment.close()
    driver.fail_at = len(driver.calls) + 1 + step
    del segment
    failed = LETTING_GO[step]
    assert f"{failed} failed with CUDA_ERROR_UNKNOWN" in caplog.text
    if failed in ("cuCtxPushCurrent", "cuCtxSynchronize"):
        assert len(driver.mapped) == 1, "the device may still write there"
        assert "stays mapped" in caplog.text
    else:
        assert driver.left() == []


# --- refusals, in words --------------------------------------------------------------------------------------------


def test_too_little_memory_says_how_much_is_wanted_and_free(driver):
    held = CudaSegment.allocate(64 << 20)
    with pytest.raises(ArenaError) as raised:
        CudaSegment.allocate(fake_cuda.CAPACITY)
    for words in (
        "cannot allocate 1.00 GiB", "GPU 0 (Fake GPU)", "cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY",
        "0.94 of 1.00 GiB are free", "nvidia-smi",
    ):  # fmt: skip
        assert words in str(raised.value)
    assert driver.sizes() == [held.nbytes]


@pytest.mark.parametrize("nbytes", [0, -1, 2**80])
def test_a_size_that_cannot_be_is_refused(driver, nbytes):
    before = open_descriptors()
    with pytest.raises(ArenaError, match="cannot allocate"):
        CudaSegment.allocate(nbytes)
    fd = made_by_another("from_fd")
    with pytest.raises(ArenaError, match="cannot map"):
        CudaSegment.from_fd(fd, nbytes)
    assert driver.left() == []
    assert open_descriptors() == before


def test_less_memory_than_announced_is_refused(driver):
    before = open_descriptors()
    fd = made_by_another("from_fd")
    with pytest.raises(ArenaError, match=r"peer announced .* cuMemMap failed .* same version of hogwild"):
        CudaSegment.from_fd(fd, NBYTES + GRANULARITY)
    assert driver.left() == []
    assert open_descriptors() == before, "the descriptor was taken over and must be closed"


def test_a_descriptor_of_something_else_is_refused(driver):
    before = open_descriptors()
    fd, writer = os.pipe()
    os.close(writer)
    with pytest.raises(ArenaError, match=r"cuMemImportFromShareableHandle failed .* CUDA_VISIBLE_DEVICES"):
        CudaSegment.from_fd(fd, NBYTES)
    assert driver.left() == []
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("attribute", "words"),
    [(102, "no virtual memory management"), (103, "cannot share memory by file descriptor")],
)
def test_a_device_that_cannot_share_is_refused_in_words(driver, attribute, words):
    driver.attributes[attribute] = 0
    before = open_descriptors()
    with pytest.raises(ArenaError, match=rf"GPU 0 \(Fake GPU\) .*{words}.*Use another GPU"):
        CudaSegment.allocate(NBYTES)
    with pytest.raises(ArenaError, match=words):
        CudaSegment.from_fd(os.memfd_create("x"), NBYTES)
    assert driver.left() == []
    assert open_descriptors() == before


@pytest.mark.usefixtures("driver")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ArenaError, match=r"GPU 3: cuDeviceGet failed .*INVALID_DEVICE.*nvidia-smi -L"):
        CudaSegment.allocate(NBYTES, device=3)


@pytest.mark.parametrize(
    ("function", "raised"),
    [
        ("cuInit", RuntimeError("Failed to dlopen libcuda.so.1")),  # no driver
        ("cuMemCreate", RuntimeError("Function cuMemCreate not found")),  # an old one
        ("cuMemCreate", ValueError("4242 is not a valid CUresult")),  # a new one
    ],
)
def test_what_cuda_bindings_raises_is_said_too(driver, monkeypatch, function, raised):
    def fail(*_arguments: Any) -> None:
        raise raised

    monkeypatch.setattr(driver, function, fail)
    with pytest.raises(ArenaError, match=rf"GPU 0.*: {function} failed with .*{raised}.*`nvidia-smi`"):
        CudaSegment.allocate(NBYTES)
    assert driver.left() == []


def test_without_cuda_bindings_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    before = open_descriptors()
    with pytest.raises(ArenaError, match=r"pip install 'hogwild\[cuda\]'"):
        CudaSegment.allocate(NBYTES)
    with pytest.raises(ArenaError, match="cuda-bindings"):
        CudaSegment.from_fd(os.memfd_create("x"), NBYTES)
    assert open_descriptors() == before


@pytest.mark.gpu
def test_the_stand_in_has_the_names_and_numbers_of_cuda_bindings():
    from cuda.bindings import driver as real  # of the [cuda] extra

    for name in vars(Driver):
        assert not name.startswith("cu") or callable(getattr(real, name))
    for enum in fake_cuda.ENUMS:
        assert {one.name: one.value for one in enum} == {
            one.name: int(getattr(getattr(real, enum.__name__), one.name)) for one in enum
        }
    handle = real.CUipcMemHandle()
    handle.reserved = bytes(range(192, 256))
    assert bytes(handle.reserved) == bytes(range(192, 256))
    for made in (real.CUmemAllocationProp(), real.CUmemAccessDesc()):
        fields = vars(getattr(Driver, type(made).__name__)())
        assert all(hasattr(made, field) for field in fields)
        assert all(hasattr(made.location, field) for field in vars(fields["location"]))


# --- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("machine")
def test_a_new_segment_is_all_zeros():
    assert not CudaSegment.allocate(NBYTES).bytes.any()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_every_dtype_lie_where_they_say(dtype):
    segment = CudaSegment.allocate(NBYTES)
    offset = 64 * dtype.itemsize
    values = (torch.arange(24) % 2).to(dtype)  # in every one of them
    segment.tensor(offset, (24,), (1,), dtype).copy_(values)
    transposed = segment.tensor(offset + 2 * dtype.itemsize, (3, 5), (1, 4), dtype)
    assert transposed.data_ptr() == segment.base + offset + 2 * dtype.itemsize, "no copy"
    assert transposed.dtype == dtype
    assert transposed.stride() == (1, 4)
    assert transposed.double().tolist() == [[float((2 + i + 4 * j) % 2) for j in range(5)] for i in range(3)]
    raw = segment.bytes[offset : offset + 24 * dtype.itemsize].cpu()
    assert torch.equal(raw, values.view(torch.uint8))
    with pytest.raises(RuntimeError, match="out of bounds"):
        segment.tensor(NBYTES - dtype.itemsize, (2,), (1,), dtype)


@pytest.mark.usefixtures("machine")
def test_views_of_a_segment_whose_size_is_no_multiple_of_the_item():
    segment = CudaSegment.allocate(4098)
    segment.tensor(4092, (1,), (1,), torch.float32).fill_(1)
    assert bool(segment.bytes[4092:4096].any())
    with pytest.raises(RuntimeError, match="out of bounds"):
        segment.tensor(4096, (1,), (1,), torch.float32)


@pytest.mark.usefixtures("machine")
def test_writes_of_another_view_do_not_trip_autograd():
    segment = CudaSegment.allocate(NBYTES)
    mine, theirs = (segment.tensor(0, (4, 4), (4, 1), torch.float32) for _ in range(2))
    x = torch.ones(4, device=mine.device, requires_grad=True)
    loss = (mine @ x).sum()
    theirs.fill_(2)
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8.0] * 4
    loss = (mine @ x).sum()
    mine.fill_(3)  # the control experiment
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- two processes -------------------------------------------------------------------------------------------------


class Spawned(Child):
    """Neither CUDA nor the threads of torch survive a fork."""

    method = "spawn"


def obey(pipe: Any, machine: str, sock: socket.socket) -> None:
    """Another process: does what it is told with one segment, whose descriptor comes or goes over the socket."""
    if machine == "fake":
        use_fake(Driver())
    segment: CudaSegment | None = None
    while True:
        word, *arguments = pipe.recv()
        answer = None
        if word == "make":
            segment = CudaSegment.allocate(NBYTES)
        elif word == "take":
            segment = CudaSegment.from_fd(receive(sock), NBYTES)
        else:
            assert segment is not None
            if word == "give":
                protocol.send(sock, {}, (segment.fd,))
            elif word == "write":
                weights(segment).fill_(arguments[0])
                settle(machine)
            else:
                answer = weights(segment).unique().tolist()
        pipe.send((word, answer))


def weights(segment: CudaSegment) -> torch.Tensor:
    """Not at the start, not contiguous, over more than one granule."""
    return segment.tensor(4096, (3, 500_000), (1, 4), torch.bfloat16)


def settle(machine: str) -> None:
    if machine == "device":
        torch.cuda.synchronize()


def receive(sock: socket.socket) -> int:
    message = protocol.receive(sock, max_fds=1)
    assert message is not None
    (fd,) = message[1]
    return fd


class Peer:
    """Another process, and the socket to it."""

    def __init__(self, machine: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.child = Spawned(obey, machine, theirs)
        theirs.close()

    def told(self, word: str, *arguments: Any) -> Any:
        self.child.tell((word, *arguments))
        return self.child.hear(word)

    def give(self) -> int:
        """The descriptor of its segment."""
        self.told("give")
        return receive(self.sock)

    def take(self, fd: int) -> None:
        protocol.send(self.sock, {}, (fd,))
        self.told("take")


@pytest.fixture
def peers(machine: str) -> Iterator[Any]:
    made: list[Peer] = []

    def start() -> Peer:
        made.append(Peer(machine))
        return made[-1]

    yield start
    for peer in made:
        peer.child.kill()
        peer.sock.close()


def test_each_process_sees_the_writes_of_the_other(machine, peers):
    peer = peers()
    mine = CudaSegment.allocate(NBYTES)
    peer.take(mine.fd)
    weights(mine).fill_(5)
    settle(machine)
    assert peer.told("read") == [5.0]
    peer.told("write", 6)
    assert weights(mine).unique().tolist() == [6.0]
    assert mine.bytes[:4096].sum() == 0, "and nothing beside it"


def test_the_memory_outlives_the_process_that_made_it(machine, peers):
    maker = peers()
    maker.told("make")
    maker.told("write", 7)
    mine = CudaSegment.from_fd(maker.give(), NBYTES)
    tensor = weights(mine)
    maker.child.kill()
    assert tensor.unique().tolist() == [7.0]
    tensor.fill_(8)
    settle(machine)
    assert weights(mine).unique().tolist() == [8.0]


def test_the_memory_outlives_the_process_that_received_it(machine, peers):
    receiver = peers()
    mine = CudaSegment.allocate(NBYTES)
    receiver.take(mine.fd)
    receiver.told("write", 9)
    receiver.child.kill()
    assert weights(mine).unique().tolist() == [9.0]
    weights(mine).fill_(1)
    settle(machine)
    assert weights(mine).unique().tolist() == [1.0]


def test_a_descriptor_is_passed_on_when_its_maker_is_dead(peers):
    """As when the server makes the arena, dies, and its successor gets the daemon's descriptor."""
    maker, successor = peers(), peers()
    maker.told("make")
    maker.told("write", 3)
    mine = CudaSegment.from_fd(maker.give(), NBYTES)
    maker.child.kill()
    successor.take(mine.fd)
    assert successor.told("read") == [3.0]
    successor.told("write", 4)
    assert weights(mine).unique().tolist() == [4.0]


def test_a_descriptor_alone_keeps_the_weights(peers):
    maker = peers()
    maker.told("make")
    maker.told("write", 2)
    fd = maker.give()
    maker.child.kill()
    assert weights(CudaSegment.from_fd(fd, NBYTES)).unique().tolist() == [2.0]


def test_one_process_may_map_the_same_memory_twice(machine, peers):
    """As a daemon does when a server offers the arena again after a broken connection."""
    maker = peers()
    maker.told("make")
    first, second = (CudaSegment.from_fd(maker.give(), NBYTES) for _ in range(2))
    weights(first).fill_(6)
    settle(machine)
    assert weights(second).unique().tolist() == [6.0]
    first.close()
    del first
    assert maker.told("read") == weights(second).unique().tolist() == [6.0]


def test_a_hundred_segments_leave_nothing(machine, request):
    def cycle() -> None:
        segment = CudaSegment.allocate(8 * GRANULARITY)
        tensor = segment.tensor(0, (16,), (1,), torch.bfloat16)
        segment.close()
        del segment
        tensor.fill_(1)

    def free() -> int:
        return torch.cuda.mem_get_info()[0] if machine == "device" else 0

    cycle()  # the first one makes the context
    descriptors, bytes_free = open_descriptors(), free()
    for _ in range(100):
        cycle()
    assert open_descriptors() == descriptors
    assert free() > bytes_free - 8 * GRANULARITY, "not even one of a hundred is missing"
    if machine == "fake":
        assert request.getfixturevalue("driver").left() == []


@pytest.mark.parametrize("machine", [pytest.param("device", marks=pytest.mark.gpu)], indirect=True)
def test_a_captured_graph_reads_what_the_other_process_writes(peers):
    """The address is in the graph; the weights are read when it runs."""
    peer = peers()
    segment = CudaSegment.allocate(NBYTES)
    peer.take(segment.fd)
    w = weights(segment)
    x = torch.ones(500_000, 1, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        w.float() @ x.float()  # cuBLAS makes its workspace outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = w.float() @ x.float()
    for value in (1, 2, -1):
        peer.told("write", value)
        graph.replay()
        assert y.flatten().tolist() == [500_000.0 * value] * 3


@pytest.mark.parametrize("machine", [pytest.param("device", marks=pytest.mark.gpu)], indirect=True)
def test_compiled_code_reads_what_the_other_process_writes(peers):
    peer = peers()
    segment = CudaSegment.allocate(NBYTES)
    peer.take(segment.fd)
    w = weights(segment)
    total = torch.compile(lambda: w.float().sum(1))
    for value in (1, 2, -1):
        peer.told("write", value)
        assert total().tolist() == [500_000.0 * value] * 3


@pytest.mark.gpu
def test_the_memory_is_free_again_when_the_last_tensor_is_gone():
    torch.zeros(1, device="cuda")  # the context takes memory too
    nbytes = 256 << 20
    before = torch.cuda.mem_get_info()[0]
    segment = CudaSegment.allocate(nbytes)
    tensor = segment.tensor(0, (4,), (1,), torch.bfloat16)
    segment.close()
    del segment
    assert before - torch.cuda.mem_get_info()[0] >= nbytes
    del tensor
    assert before - torch.cuda.mem_get_info()[0] < nbytes
