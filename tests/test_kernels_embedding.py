"""Embeddings: the row-sparse step is the dense step, and rows that no token touched are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hogwild_kernels import (
    ApolloConfig,
    ApolloState,
    apollo_update,
    counter,
    embedding_update,
    reference,
    tied_factors,
)

F64 = torch.float64
V, N = 50, 12


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids with repeats, and a gradient for each."""
    return [(torch.randint(0, V // 2, (9,)), torch.randn(9, N, dtype=F64)) for _ in range(count)]


@pytest.mark.parametrize("rank", [1, 4])
def test_row_sparse_equals_dense_over_projection_changes(rank: int) -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=0.01, gap=10)
    sparse = torch.randn(V, N, dtype=F64)
    dense = sparse.clone()
    a, b = (ApolloState("embed", (V, N), config, dtype=F64) for _ in range(2))
    for tokens, grad in batches(25):
        one = embedding_update(sparse, tokens, grad, a)
        two = reference.factored_step(dense, grad, F.one_hot(tokens, V).to(F64), b)
        assert one.norm == pytest.approx(two.norm, rel=1e-9)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
    for name, tensor in b.tensors().items():
        torch.testing.assert_close(a.tensors()[name], tensor, rtol=1e-10, atol=1e-12)


def test_more_columns_than_rows_works_too() -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=3, lr=0.01)
    w = torch.randn(5, N, dtype=F64)
    dense, tokens, grad = w.clone(), torch.tensor([1, 4, 1]), torch.randn(3, N, dtype=F64)
    embedding_update(w, tokens, grad, ApolloState("embed", (5, N), config, dtype=F64))
    one_hot = F.one_hot(tokens, 5).to(F64)
    reference.factored_step(dense, grad, one_hot, ApolloState("embed", (5, N), config, dtype=F64))
    torch.testing.assert_close(w, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_touched_rows_change_and_round_as_the_dense_step_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=4, lr=1e-3)
    start = torch.randn(V, N).to(dtype)
    w, dense = start.clone(), start.clone()
    tokens, grad = torch.tensor([3, 7, 3, 0]), torch.randn(4, N)
    embedding_update(w, tokens, grad, ApolloState("embed", (V, N), config), seed=4)
    one_hot = F.one_hot(tokens, V).float()
    reference.factored_step(dense, grad, one_hot, ApolloState("embed", (V, N), config), seed=4)
    changed = (w != start).any(1).nonzero().flatten().tolist()
    assert changed == [0, 3, 7]
    torch.testing.assert_close(w, dense, rtol=1e-6, atol=1e-7)


def test_non_finite_gradient_touches_nothing() -> None:
    state = ApolloState("embed", (V, N), ApolloConfig(rank=4))
    w = torch.ones(V, N)
    grad = torch.randn(3, N)
    grad[1, 1] = torch.nan
    assert embedding_update(w, torch.tensor([1, 2, 3]), grad, state).skipped
    assert torch.equal(w, torch.ones(V, N))
    assert (state.step, state.skipped) == (0, 1)
    assert not bool(state.exp_avg.any())


def test_a_tied_weight_gets_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    config = ApolloConfig(rank=4, lr=0.01)
    w = torch.randn(V, N)
    dense = w.double()
    x, d = torch.randn(6, N), torch.randn(6, V)
    tokens, grad = torch.tensor([1, 1, 30]), torch.randn(3, N)
    apollo_update(w, *tied_factors(x, d, tokens, grad), ApolloState("tied", (V, N), config))
    g = d.double().T @ x.double()
    g.index_add_(0, tokens, grad.double())
    reference.published_step(dense, g, ApolloState("tied", (V, N), config, dtype=F64))
    torch.testing.assert_close(w.double(), dense, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_refused_by_name() -> None:
    state = ApolloState("model.embed_tokens", (V, N), ApolloConfig(rank=4))
    with pytest.raises(ValueError, match=r"model\.embed_tokens"):
        embedding_update(torch.zeros(V, N), torch.tensor([1, 2]), torch.zeros(3, N), state)


class OnDevice:
    """What `ApolloState.projection` asks of a tensor that is on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self) -> None:
        self.read_by: list[str] = []

    def to(self, _device: object) -> OnDevice:
        return self

    def record_stream(self, stream: str) -> None:
        self.read_by.append(stream)


def test_a_projection_that_several_streams_read_waits_for_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only for the stream of the thread that made it: the next epoch's takes its place while others still read."""
    state, made = ApolloState("embed", (V, N), ApolloConfig(rank=4, gap=1)), [OnDevice(), OnDevice()]
    epochs = iter(made)
    for stream in ("one", "two", "one"):
        monkeypatch.setattr("torch.cuda.current_stream", lambda _device, stream=stream: stream)
        state.projection(lambda *_: next(epochs))  # type: ignore[arg-type,return-value]
    state.counts[0] = 1
    state.projection(lambda *_: next(epochs))  # type: ignore[arg-type,return-value]
    assert [one.read_by for one in made] == [["one", "two", "one"], ["one"]]


@pytest.mark.gpu
def test_a_projection_is_not_overwritten_while_another_stream_reads_it() -> None:
    """Made in one stream, read late in a second one, and replaced meanwhile; then memory is asked for in the first."""
    device = torch.device("cuda")
    first, second = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    state = ApolloState("embed", (4096, 1024), ApolloConfig(rank=64, gap=1), device)
    expected = counter.projection(state.key, 0, 64, 1024).sum().item()
    with torch.cuda.stream(first):
        state.projection()
    with torch.cuda.stream(second):
        read = state.projection()
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        late = read + 0
        del read
    with torch.cuda.stream(first):
        state.counts[0] = 1
        state.projection()
        taken = [torch.full((64, 1024), 7.0, device=device) for _ in range(8)]
    torch.cuda.synchronize()
    assert late.sum().item() == pytest.approx(expected, rel=1e-3)
    assert len(taken) == 8
