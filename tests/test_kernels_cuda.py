"""The Triton step against the reference: under Triton's interpreter everywhere, and on a device where there
is one.

The interpreter has to be chosen before Triton is imported, so outside it this file runs itself again in a
process of its own. What the interpreter cannot show, that the kernels compile for a real target, is checked
ahead of time without a device.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild_kernels import AdamConfig, AdamState, ApolloConfig, ApolloState, counter, reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(test: Callable[..., None]) -> Callable[..., None] | None:
    """A test of the interpreter's own process; outside it there is nothing to collect."""
    return test if INTERPRETED else None


SHAPES = [(40, 72), (72, 40), (33, 33), (1, 20), (20, 1)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(*s, torch.float32) for s in SHAPES] + [(*s, t) for s in SHAPES[:2] for t in TYPES[1:]]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_marked_interpreted() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def batch(m: int, n: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, n).to(dtype).to(device()), torch.randn(tokens, m).to(dtype).to(device())


def compare(
    m: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    tokens: int = 7,
    steps: int = 5,
    seed: int = 3,
    factors: torch.dtype | None = None,
) -> None:
    """`factors`: type of X and D, if it is not the weight's."""
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=1e-3, weight_decay=0.1, gap=3, seed=2**40)
    w = (torch.randn(m, n) * 0.02).to(dtype).to(device())
    truth = w.clone()
    fast, slow = (ApolloState("layer", (m, n), config, device=device()) for _ in range(2))
    for _ in range(steps):
        x, d = batch(m, n, tokens, factors or dtype)
        one = cuda.step(w, x, d, fast, config, lr=1e-3, seed=seed)
        two = reference.factored_step(truth, x, d, slow, config, lr=1e-3, seed=seed)
        assert float(one.norm) == pytest.approx(two.norm, rel=1e-5)
        assert not bool(one.skipped)
    assert (fast.step, fast.epoch) == (slow.step, slow.epoch) == (steps, steps // 3)
    for name, tensor in slow.tensors().items():
        assert (fast.tensors()[name] - tensor).double().norm() <= 1e-5 * tensor.double().norm(), name
    if dtype == torch.float32:
        assert (w - truth).norm() <= 1e-5 * truth.norm()
    else:  # the same random bits: only what fp32 rounding carries over a threshold may differ
        assert float((w != truth).double().mean()) < 0.005


@interpreted
@pytest.mark.parametrize(("m", "n", "dtype"), CASES)
@pytest.mark.parametrize("rank", [1, 8])
def test_step_equals_the_reference(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    compare(m, n, rank, dtype)


@interpreted
@pytest.mark.parametrize(
    ("m", "n", "rank", "tokens"), [(70, 130, 70, 40), (130, 70, 33, 17), (40, 72, 8, 1), (48, 40, 8, 150)]
)
def test_blocks_that_do_not_divide_the_shape(m: int, n: int, rank: int, tokens: int) -> None:
    compare(m, n, rank, torch.float32, tokens=tokens, steps=2, seed=2**31 + 5)


@interpreted
@pytest.mark.parametrize(("m", "n"), SHAPES[:2])
def test_factors_may_have_more_digits_than_the_weight(m: int, n: int) -> None:
    """As those of a model in fp16 have, whose gradients were scaled (backward.Gather)."""
    compare(m, n, 8, torch.float16, factors=torch.float32)


ON_A_DEVICE: list[tuple[int, int, int, torch.dtype, torch.dtype | None]] = [
    (m, n, rank, dtype, None) for dtype in TYPES for m, n in ((512, 2048), (2048, 512)) for rank in (1, 64)
]
ON_A_DEVICE += [(520, 2040, 200, torch.bfloat16, None), (2043, 511, 64, torch.bfloat16, None)]
ON_A_DEVICE += [(512, 2048, 64, torch.float16, torch.float32), (2043, 511, 64, torch.float16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", range(len(ON_A_DEVICE)), ids=lambda case: "-".join(map(str, ON_A_DEVICE[case]))
)
def test_step_equals_the_reference_on_a_device(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one after the other of the candidates that autotuning chooses from: compiling all of them for each case
    takes minutes."""
    from hogwild_kernels import cuda

    m, n, rank, dtype, factors = ON_A_DEVICE[case]
    candidate = cuda.CANDIDATES[case % len(cuda.CANDIDATES)]
    monkeypatch.setattr(cuda, "_tuned", {})
    monkeypatch.setattr(cuda, "_tune", lambda _work: candidate)
    compare(m, n, rank, dtype, tokens=300 if rank == 200 else 48, factors=factors)


@pytest.mark.gpu
def test_a_launch_that_was_prepared_serves_only_arguments_of_its_kind_on_a_device() -> None:
    """Of one shape: other weights, other numbers of tokens, and addresses that are multiples of 16 bytes or of 2."""
    from hogwild_kernels import cuda

    m, n, config = 192, 320, ApolloConfig(rank=8, lr=1e-3)
    for tokens, offset in ((32, 0), (32, 1), (32, 0), (31, 0), (1, 3), (32, 1)):
        w = (torch.randn(m * n + offset) * 0.02).bfloat16().to(device())[offset:].view(m, n)
        x, d = (
            torch.randn(tokens * k + offset).bfloat16().to(device())[offset:].view(tokens, k) for k in (n, m)
        )
        truth = w.clone()
        fast, slow = (ApolloState("layer", (m, n), config, device=device()) for _ in range(2))
        for lr in (1e-3, 2e-3):
            one = cuda.step(w, x, d, fast, config, lr=lr)
            two = reference.factored_step(truth, x, d, slow, config, lr=lr)
            assert float(one.norm) == pytest.approx(two.norm, rel=1e-5), (tokens, offset)
        assert float((w != truth).double().mean()) < 0.005, (tokens, offset)


@pytest.mark.gpu
def test_autotuning_chooses_a_candidate_and_leaves_the_weight_alone() -> None:
    from hogwild_kernels import cuda

    config, shape = ApolloConfig(rank=8, lr=0.0, rounding="nearest"), (256, 512)
    weight = torch.randn(shape, device="cuda").bfloat16()
    before = weight.clone()
    before_tuning = len(cuda._tuned)
    x, d = batch(*shape, 20, torch.bfloat16)
    cuda.step(weight, x, d, ApolloState("layer", shape, config, device="cuda"), config, lr=0.0)
    assert len(cuda._tuned) == before_tuning + 1
    assert set(cuda._tuned.values()) <= set(cuda.CANDIDATES)
    assert torch.equal(weight, before)


@interpreted
@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(("seed", "name"), [(0, "layer"), (2**33, "model.layers.3.mlp.up_proj")])
@pytest.mark.parametrize("rank", [20, 50])
def test_projection_has_the_bits_of_the_cpu(epoch: int, seed: int, name: str, rank: int) -> None:
    """Projecting the identity gives P itself: a product with zeros and one 1 rounds nothing. And the identity, where
    there is nothing to project away."""
    from hogwild_kernels import cuda
    from hogwild_kernels import triton_kernels as kernels

    size, gap = 50, 4
    key = counter.name_key(seed, name)
    counts = torch.tensor([epoch * gap + 3, 0])
    parts, finished = torch.empty(2, size, rank + size), torch.ones(1, dtype=torch.int32)
    kernels.project[(4, -(-rank // 32) + 2, 2)](
        torch.eye(size), size, 1, parts, counts, gap, cuda._signed(key[0]), cuda._signed(key[1]),
        counter.gaussian_table(), counter.gaussian_gain(rank), finished, size, size, rank, 32,
        WIDEN=True, BLOCK_T=16, BLOCK_C=32, BLOCK_K=16,
    )  # fmt: skip
    out = parts.sum(0)
    assert finished.item() == 0
    assert torch.equal(out[:, :rank].T, counter.projection(key, epoch, rank, size))
    assert torch.equal(out[:, rank:].triu(), torch.eye(size)), "the Gram matrix, down to its diagonal"


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    from hogwild_kernels import cuda
    from hogwild_kernels import triton_elementwise as kernels
    from hogwild_kernels.rounding import round_to

    torch.manual_seed(0)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-8, 6e-8, 65504.0, 2.0**-14, -(2.0**-24)]
    )
    values = torch.cat(
        (torch.tensor(special), (torch.randn(5000) * torch.randn(5000).mul(5).exp()).clamp(-60000, 60000))
    )
    a, b = counter.subkey((123, 456), counter.ROUNDING, 9)
    out = torch.empty(len(values), dtype=dtype)
    kernels.round_values[(5,)](values, out, len(values), cuda._signed(a), cuda._signed(b), BLOCK=1024)
    truth = round_to(values, dtype, counter.rounding_bits(1, len(values), a, b)[0])
    number = ~values.isnan()
    assert torch.equal(out[number].view(torch.int16), truth[number].view(torch.int16))
    assert bool(out[~number].isnan().all())


@interpreted
@pytest.mark.parametrize("layout", ["transposed", "padded", "every second column"])
def test_any_layout_is_written_in_place(layout: str) -> None:
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    m, n = 24, 40
    start = torch.randn(m, n).bfloat16()
    whole = torch.zeros(n, m).bfloat16() if layout == "transposed" else torch.zeros(m, 2 * n).bfloat16()
    view = {"transposed": whole.T, "padded": whole[:, :n], "every second column": whole[:, ::2]}[layout]
    view.copy_(start)
    config = ApolloConfig(rank=4, lr=0.01)
    straight = start.clone()
    x, d = batch(m, n, 5, torch.bfloat16)
    cuda.step(straight, x, d, ApolloState("layer", (m, n), config), config, lr=0.01)
    cuda.step(view, x, d, ApolloState("layer", (m, n), config), config, lr=0.01)
    assert torch.equal(view, straight)
    assert not torch.equal(view, start)
    if layout != "transposed":
        assert int((whole != 0).sum()) <= m * n


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, of which those alone take memory that something is written beside, in pages of 4 KiB."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    with suppress(OSError):  # a kernel that knows no other pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@interpreted
@pytest.mark.parametrize("far", ["weight", "x", "d"])
def test_places_that_32_bits_cannot_count(far: str) -> None:
    """As of a large embedding, or of rows in a much wider tensor. What lies in between takes no memory."""
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    m, n = 24, 40
    x, d = batch(m, n, 5, torch.bfloat16)
    near = {"weight": torch.randn(m, n).bfloat16(), "x": x, "d": d}
    rows, columns = near[far].shape
    apart = sparse(rows, 2**31 // (rows - 1) + 16, dtype=torch.bfloat16)[:, :columns].copy_(near[far])
    given = {name: one.clone() for name, one in near.items()} | {far: apart}
    config = ApolloConfig(rank=4, lr=0.01)
    for tensors in (near, given):
        state = ApolloState("layer", (m, n), config)
        cuda.step(tensors["weight"], tensors["x"], tensors["d"], state, config, lr=0.01)
    assert torch.equal(given["weight"], near["weight"])


@interpreted
def test_so_many_tokens_that_32_bits_cannot_count_their_products() -> None:
    """A row for each, as long as there are tokens: of the last ones' rows, the projection. (No more than that: to
    compute all of them takes hours.)"""
    from hogwild_kernels import cuda
    from hogwild_kernels import triton_kernels as kernels

    size, rank, tokens, block = 16, 16, 46_500, 1024
    assert tokens * (rank + tokens) > 2**31
    key = counter.name_key(0, "layer")
    y = torch.randn(1, size)
    parts, finished = sparse(1, tokens, rank + tokens), torch.ones(1, dtype=torch.int32)
    kernels.project[(-(-tokens // block), 1, 1)](
        y.expand(tokens, size), 0, 1, parts, torch.tensor([0, 0]), 200, cuda._signed(key[0]), cuda._signed(key[1]),
        counter.gaussian_table(), counter.gaussian_gain(rank), finished, tokens, size, rank, 64,
        WIDEN=True, BLOCK_T=block, BLOCK_C=16, BLOCK_K=64,
    )  # fmt: skip
    found = parts[0, :, :rank]
    torch.testing.assert_close(found, (y @ counter.projection(key, 0, rank, size).T).expand_as(found))


@interpreted
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e38, 1e20])
@pytest.mark.parametrize("where", ["x", "d"])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)])
def test_non_finite_input_touches_nothing_and_is_counted(m: int, n: int, where: str, bad: float) -> None:
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    config = ApolloConfig(rank=4, weight_decay=0.1)
    state = ApolloState("layer", (m, n), config)
    w = torch.randn(m, n)
    cuda.step(w, *batch(m, n, 5, torch.float32), state, config, lr=0.01)
    before = [w.clone(), *(t.clone() for name, t in state.tensors().items() if name != "counts")]
    x, d = batch(m, n, 5, torch.float32)
    (x if where == "x" else d)[2, 3] = bad
    result = cuda.step(w, x, d, state, config, lr=0.01)
    assert bool(result.skipped)
    assert float(result.norm) == 0.0
    after = [w, *(t for name, t in state.tensors().items() if name != "counts")]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert (state.step, state.skipped) == (1, 1)


@interpreted
def test_the_limiter_is_the_references_through_zeros_and_bursts() -> None:
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    config = ApolloConfig(rank=4, lr=0.01)
    fast, slow = (ApolloState("layer", (24, 40), config) for _ in range(2))
    w, truth = torch.zeros(24, 40), torch.zeros(24, 40)
    for size in (0.0, 1.0, 1.0, 1e-9, 1.0, 0.0, 50.0, 1.0):
        x, d = batch(24, 40, 5, torch.float32)
        cuda.step(w, x, d * size, fast, config, lr=0.01)
        reference.factored_step(truth, x, d * size, slow, config)
        assert float(fast.norm) == pytest.approx(float(slow.norm), rel=1e-5)
    torch.testing.assert_close(w, truth, rtol=1e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_adam_equals_the_reference(dtype: torch.dtype, bad: float) -> None:
    compare_adam((9, 5), dtype, bad)


@interpreted
def test_adam_takes_any_layout() -> None:
    compare_adam((5, 9), torch.bfloat16, torch.nan, transposed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(4099,), (300, 1, 4)], ids=str)
def test_adam_equals_the_reference_on_a_device(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare_adam(shape, dtype, torch.inf)


def compare_adam(shape: tuple[int, ...], dtype: torch.dtype, bad: float, transposed: bool = False) -> None:
    from hogwild_kernels import cuda

    torch.manual_seed(0)
    config = AdamConfig(lr=0.01, weight_decay=0.1)
    fast, slow = (AdamState("norm", shape, config, device=device()) for _ in range(2))
    w = torch.randn(shape).to(dtype).to(device())
    truth = w.clone()
    if transposed:
        w = w.T.contiguous().T
        assert not w.is_contiguous()
    for step in range(6):
        g = torch.randn(shape, device=device())
        if step == 3:
            g.view(-1)[7] = bad
        one, two = cuda.adam_step(w, g, fast, config, lr=0.01), reference.adam_step(truth, g, slow, config)
        assert bool(one.skipped) == two.skipped
        assert float(one.norm) == pytest.approx(two.norm, rel=1e-5)
    assert (fast.step, fast.skipped) == (slow.step, slow.skipped) == (5, 1)
    if dtype == torch.float32:
        torch.testing.assert_close(w, truth, rtol=1e-5, atol=1e-6)
    else:
        assert float((w != truth).double().mean()) < 0.005


class _NoScalarReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar_dense" not in str(func), "a step waited for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_scalar_reads() -> Iterator[None]:
    """Fails on bool(), float() or .item() of a tensor: on CUDA each of them waits for the device."""
    with _NoScalarReads():
        yield


@interpreted
def test_no_step_reads_a_scalar_back() -> None:
    from hogwild_kernels import cuda

    config = ApolloConfig(rank=4)
    state, small = ApolloState("layer", (24, 40), config), AdamState("norm", (24,))
    w, x, d, v, g = (
        torch.zeros(24, 40),
        torch.randn(5, 40),
        torch.randn(5, 24),
        torch.zeros(24),
        torch.randn(24),
    )
    with pytest.raises(AssertionError), no_scalar_reads():
        reference.factored_step(w, x, d, state)  # the measuring stick itself works
    with no_scalar_reads():
        cuda.step(w, x, d, state, config, lr=0.01)
        cuda.adam_step(v, g, small, small.config, lr=0.01)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_real_target_without_a_device(tmp_path: Any) -> None:
    """Ahead of time, for compute capability 9.0. It shows that they compile, not that they run."""
    run_without_a_device("kernels_ahead_of_time.py", tmp_path)


def test_a_second_thread_waits_for_what_the_first_compiles(tmp_path: Any) -> None:
    """Two trainer threads that begin at once, with nothing in Triton's cache."""
    run_without_a_device("kernels_two_threads.py", tmp_path)


def run_without_a_device(script: str, cache: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
