"""Tensors as a safetensors file, read by safetensors' own reader."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild import tensor_file

PIECE = 4096


class Made(TorchDispatchMode):
    """The most bytes that an operator made anew."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, list | tuple) else [out]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self._known:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((300, 200), (0, 1)),
        ((300, 200), (1, 0)),  # a transposed layer
        ((6, 70, 50), (0, 2, 1)),  # a stack of transposed experts
        ((6, 70, 50), (2, 0, 1)),
        ((3, 5000, 2), (0, 2, 1)),  # a row alone is more than a piece
        ((20000,), (0,)),
        ((5, 4), (1, 0)),
        ((3, 0), (1, 0)),
        ((), ()),
    ],
)
def test_whatever_lies_however_is_written_without_a_second_copy(tmp_path, monkeypatch, dtype, shape, order):
    """On a GPU there may be no room for one, and training would end for a checkpoint."""
    monkeypatch.setattr(tensor_file, "PIECE", PIECE)
    whole = torch.arange(torch.Size(shape).numel()).to(torch.int32).reshape(shape).to(dtype).permute(order)
    every_other = torch.arange(40000).to(dtype)[::2]
    with Made(whole, every_other) as made:
        tensor_file.write_tensors(tmp_path / "a.safetensors", {"a": whole, "b": every_other})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["a"], whole)
    assert torch.equal(read["b"], every_other)
    assert read["a"].dtype == dtype
    assert made.nbytes <= PIECE
