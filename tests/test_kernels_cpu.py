"""The compiled CPU step against the reference: every type, form, orientation and memory layout, and from
many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hogwild_kernels import (
    AdamConfig,
    AdamState,
    ApolloConfig,
    ApolloState,
    adam_update,
    apollo_update,
    plan,
    reference,
)
from hogwild_kernels import numba_kernels as loops

SHAPES = [(96, 160), (160, 96), (64, 64), (1, 50), (50, 1), (700, 33)]


def batches(
    m: int, n: int, tokens: int, count: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)) for _ in range(count)]


@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_fp32_equals_the_reference(m: int, n: int, rank: int, form: str) -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=0.01, weight_decay=0.1, gap=10, form=form)  # type: ignore[arg-type]
    w = torch.randn(m, n)
    truth = w.double()
    fast = ApolloState("layer", (m, n), config)
    slow = ApolloState("layer", (m, n), config, dtype=torch.float64)
    for x, d in batches(m, n, 9, 25):
        one = apollo_update(w, x, d, fast)
        two = reference.factored_step(truth, x, d, slow)
        assert one.norm == pytest.approx(two.norm, rel=1e-5)
    assert (w.double() - truth).norm() <= 1e-5 * truth.norm()
    for name, tensor in slow.tensors().items():
        assert (fast.tensors()[name] - tensor).double().norm() <= 1e-5 * tensor.double().norm(), name


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_the_blocked_gram_matrices_give_the_same_norm(tokens: int) -> None:
    torch.manual_seed(0)
    for m, n in ((40, 60), (60, 40)):
        config = ApolloConfig(rank=8, lr=0.01, form="factored")
        x, d = batches(m, n, tokens, 1)[0]
        fast = apollo_update(torch.zeros(m, n), x, d, ApolloState("layer", (m, n), config))
        slow = reference.factored_step(torch.zeros(m, n), x, d, ApolloState("layer", (m, n), config))
        assert fast.norm == pytest.approx(slow.norm, rel=1e-5)


@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_half_weights_follow_the_reference_bit_for_bit(dtype: torch.dtype, rounding: str, form: str) -> None:
    """Same random bits, so only the few values that fp32 rounding carries over a threshold may differ."""
    assert _differing(dtype, torch.float32, rounding, form) < 0.0005


@pytest.mark.parametrize("tokens", [9, 100])
@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bf16_gradient_tiles_change_one_element_in_a_hundred(rounding: str, form: str, tokens: int) -> None:
    """With bf16 X and D a tile of G may pass through bf16, as autograd's gradient does: one part in 512 of
    the step. With many tokens all products may."""
    assert _differing(torch.bfloat16, torch.bfloat16, rounding, form, tokens) < 0.01


@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize("tokens", [plan.EXACT_TOKENS, 300])
@pytest.mark.parametrize(("m", "n", "rank"), [(96, 160, 8), (160, 96, 8), (96, 160, 96), (160, 96, 1)])
def test_products_in_bf16_are_as_exact_as_the_published_ones(
    m: int, n: int, rank: int, tokens: int, form: str
) -> None:
    """The published code projects a bf16 gradient with a bf16 P. Compared by R, which the first step leaves in M."""
    torch.manual_seed(0)
    x, d = batches(m, n, tokens, 1, torch.bfloat16)[0]
    state = ApolloState("layer", (m, n), ApolloConfig(rank=rank, form=form))  # type: ignore[arg-type]
    p, gradient = state.projection(), torch.mm(d.t(), x)
    if m < n:
        truth = p.double() @ (d.double().t() @ x.double())
        published = torch.mm(p.bfloat16(), gradient)
    else:
        truth = d.double().t() @ x.double() @ p.double().t()
        published = torch.mm(gradient, p.bfloat16().t())
    apollo_update(torch.zeros(m, n).bfloat16(), x, d, state)
    ours = (state.exp_avg / 0.1 - truth).norm()
    assert ours < 1.2 * (published.double() - truth).norm()


@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize(("m", "n", "rank"), [(96, 160, 8), (160, 96, 8), (96, 160, 96), (160, 96, 1)])
def test_products_in_bf16_hold_where_gradients_cancel(m: int, n: int, rank: int, form: str) -> None:
    """Tokens that have much in common, and output gradients whose sum is nothing: |U| is small beside its terms."""
    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=1e-3, form=form)  # type: ignore[arg-type]
    fast, slow = ApolloState("layer", (m, n), config), ApolloState("layer", (m, n), config)
    for x, d in batches(m, n, plan.EXACT_TOKENS, 5):
        x, d = (x + 2.0).bfloat16(), (d - d.mean(0)).bfloat16()
        one = apollo_update(torch.zeros(m, n).bfloat16(), x, d, fast)
        two = reference.factored_step(torch.zeros(m, n), x.float(), d.float(), slow)
        assert one.norm == pytest.approx(two.norm, rel=2.0**-7)
    for name in ("exp_avg", "exp_avg_sq"):
        error = (fast.tensors()[name] - slow.tensors()[name]).norm()
        assert error <= 2.0**-6 * slow.tensors()[name].norm(), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_any_size_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    m, n = 50, 83
    x, d = (torch.randint(-2, 3, (7, size)).to(dtype) for size in (n, m))  # sums that are exact in any order
    config = ApolloConfig(rank=4, lr=1e-3, form="factored")
    results = []
    for columns, size in ((plan.TILE_COLUMNS, plan.TILE_BYTES), (16, 1024), (2, 1)):
        monkeypatch.setattr(plan, "TILE_COLUMNS", columns)
        monkeypatch.setattr(plan, "TILE_BYTES", size)
        monkeypatch.setattr(plan, "LOW_TILE_BYTES", size)
        weight = torch.zeros(n, m).bfloat16().t() if transposed else torch.zeros(m, n).bfloat16()
        apollo_update(weight, x, d, ApolloState("layer", (m, n), config), seed=3)
        results.append(weight)
    assert results[0].count_nonzero() > 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _differing(dtype: torch.dtype, factors: torch.dtype, rounding: str, form: str, tokens: int = 9) -> float:
    torch.manual_seed(0)
    config = ApolloConfig(rank=8, lr=1e-4, weight_decay=0.1, rounding=rounding, form=form)  # type: ignore[arg-type]
    w = (torch.randn(96, 160) * 0.02).to(dtype)
    truth, start = w.clone(), w.clone()
    a, b = (ApolloState("layer", (96, 160), config) for _ in range(2))
    ((x, d),) = batches(96, 160, tokens, 1, factors)
    apollo_update(w, x, d, a, seed=5)
    reference.factored_step(truth, x, d, b, seed=5)
    assert float((w != start).double().mean()) > 0.05
    return float((w != truth).double().mean())


def layouts(m: int, n: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Views of the kinds that a fused or padded layout produces; each of shape (m, n)."""
    return {
        "part of a fused projection": lambda: torch.zeros(3 * m, n, dtype=dtype)[m : 2 * m],
        "padded rows": lambda: torch.zeros(m, n + 7, dtype=dtype)[:, :n],
        "columns of a wider weight": lambda: torch.zeros(m, 2 * n, dtype=dtype)[:, n:],
        "every second row": lambda: torch.zeros(2 * m, n, dtype=dtype)[::2],
        "stored transposed": lambda: torch.zeros(n, m, dtype=dtype).t(),
        "part of a transposed one": lambda: torch.zeros(n, 3 * m, dtype=dtype)[:, m : 2 * m].t(),
        "every second column": lambda: torch.zeros(m, 2 * n, dtype=dtype)[:, ::2],
        "offset by one element": lambda: torch.zeros(m * n + 1, dtype=dtype)[1:].view(m, n),
    }


@pytest.mark.parametrize("form", ["factored", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", layouts(1, 1, torch.float32))
def test_any_layout_gets_the_same_bits_and_its_neighbours_are_left_alone(
    layout: str, dtype: torch.dtype, form: str
) -> None:
    torch.manual_seed(0)
    m, n = 40, 56
    config = ApolloConfig(rank=8, lr=0.01, form=form)  # type: ignore[arg-type]
    start = torch.randn(m, n).to(dtype)
    contiguous, view = start.clone(), layouts(m, n, dtype)[layout]()
    view.copy_(start)
    whole = view._base if view._base is not None else view
    owned = torch.zeros_like(whole, dtype=torch.bool)
    torch.as_strided(owned, view.shape, view.stride(), view.storage_offset()).fill_(True)
    whole[~owned] = float("nan")  # poison: a stray write or read shows up
    a, b = (ApolloState("layer", (m, n), config) for _ in range(2))
    for x, d in batches(m, n, 6, 3, torch.float32):
        apollo_update(contiguous, x, d, a)
        apollo_update(view, x, d, b)
    assert not torch.equal(contiguous, start)
    # A transposed product sums in another order, so fp32 sums may differ in their last bits.
    if dtype == torch.float32:
        torch.testing.assert_close(view, contiguous, rtol=1e-5, atol=1e-6)
    else:
        assert float((view != contiguous).double().mean()) < 0.01
    assert bool(whole[~owned].isnan().all())


def test_inputs_may_be_views_too() -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=8, lr=0.01)
    x, d = torch.randn(40, 5).t(), torch.randn(5, 60)[:, ::2]
    one, two = torch.zeros(30, 40), torch.zeros(30, 40)
    apollo_update(one, x, d, ApolloState("layer", (30, 40), config))
    apollo_update(two, x.contiguous(), d.contiguous(), ApolloState("layer", (30, 40), config))
    assert torch.equal(one, two)


def test_wrong_shapes_are_refused_by_name() -> None:
    state = ApolloState("model.q_proj", (8, 6), ApolloConfig(rank=2))
    with pytest.raises(ValueError, match=r"model\.q_proj"):
        apollo_update(torch.zeros(8, 6), torch.zeros(3, 6), torch.zeros(4, 8), state)


def test_the_seed_changes_only_the_rounding() -> None:
    torch.manual_seed(0)
    (x, d) = batches(40, 60, 6, 1)[0]
    start = (torch.randn(40, 60) * 0.02).bfloat16()
    outcomes = []
    for seed in (0, 1):
        w = start.clone()
        norm = apollo_update(
            w, x, d, ApolloState("layer", (40, 60), ApolloConfig(rank=8, lr=1e-5)), seed=seed
        ).norm
        outcomes.append((w, norm))
    assert outcomes[0][1] == outcomes[1][1]
    assert not torch.equal(outcomes[0][0], outcomes[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_equals_torch_adamw(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = AdamConfig(lr=0.01, weight_decay=0.1)
    w = torch.randn(33, 4, 3)
    truth = torch.nn.Parameter(w.clone())
    mine = w.to(dtype)
    wide = w.clone()
    state, exact = AdamState("conv", (33, 4, 3), config), AdamState("conv", (33, 4, 3), config)
    optimizer = torch.optim.AdamW([truth], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        truth.grad = torch.randn(33, 4, 3)
        optimizer.step()
        before = wide.clone()
        result = adam_update(wide, truth.grad, exact)
        assert result.norm == pytest.approx(float((wide - before * (1 - 0.001)).norm()), rel=1e-4)
        adam_update(mine, truth.grad, state)
    torch.testing.assert_close(wide, truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.float(), truth.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shared", [True, False], ids=["one weight", "a weight each"])
def test_threads_never_deadlock_and_every_weight_stays_sound(shared: bool) -> None:
    torch.manual_seed(0)
    m, n, steps, count = 96, 128, 150, 4
    config = ApolloConfig(rank=8, lr=1e-3, gap=20)
    states = [ApolloState(f"layer.{i}", (m, n), config) for i in range(count)]
    weights = [(torch.randn(m, n) * 0.02).bfloat16() for _ in range(count)]
    if shared:
        states, weights = states[:1] * count, weights[:1] * count
    data = batches(m, n, 8, 10, torch.bfloat16)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        try:
            for step in range(steps):
                x, d = data[step % len(data)]
                assert not apollo_update(weights[i], x, d, states[i], seed=i).skipped
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not failures
    for weight, state in zip(weights, states, strict=True):
        assert bool(weight.isfinite().all())
        # Simultaneous steps may be counted once (an allowed race); nothing is counted that did not happen.
        assert steps <= state.step <= (steps * count if shared else steps)


def test_cost_model_prefers_the_form_that_is_cheaper_at_the_extremes() -> None:
    assert plan.choose("auto", 2048, 8192, 16, 64, low_precision=True).form == "factored"
    assert plan.choose("auto", 2048, 2048, 4096, 64, low_precision=True).form == "plain"
    forced = plan.choose("factored", 64, 64, 4096, 8, low_precision=False)
    assert forced.form == "factored"


def test_factored_form_allocates_nothing_of_the_size_of_the_weight() -> None:
    m, n, tokens = 1536, 2048, 32
    config = ApolloConfig(rank=64, form="factored")
    state = ApolloState("layer", (m, n), config)
    w = torch.zeros(m, n, dtype=torch.bfloat16)
    x, d = batches(m, n, tokens, 1, torch.bfloat16)[0]
    apollo_update(w, x, d, state)  # scratch and projection exist from here on
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        apollo_update(w, x, d, state)
    sizes = [event.self_cpu_memory_usage for event in profiler.events()]
    assert max(sizes) > 0  # the profiler saw the step's allocations
    assert max(sizes) < w.numel() * w.element_size() / 4
    assert w.numel() * w.element_size() / 4 > plan.TILE_BYTES


def test_kernels_work_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba raises at decoration when neither the package, the user nor NUMBA_CACHE_DIR offers a writable
    folder."""
    real = loops.njit

    def without_a_place(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(loops, "njit", without_a_place)
    assert loops.compiled()(lambda value: value + 1)(2) == 3
