"""Keeps vLLM's linear weights plain on a CPU, so that the tensor that is served is the tensor that is trained."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import vllm
from vllm.model_executor.layers import utils

from hogwild.errors import ArenaError
from hogwild_kernels.linear import plain_linear

_KNOWN = ("0.32",)
_original = utils.dispatch_cpu_unquantized_gemm


_library = torch.library.Library("hogwild", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
_library.define(  # type: ignore[no-untyped-call]  # torch leaves it untyped
    "plain_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
_library.impl("plain_linear", plain_linear, "CPU")  # type: ignore[no-untyped-call]  # torch leaves it untyped


@torch.library.register_fake(  # type: ignore[untyped-decorator]  # torch leaves it untyped
    "hogwild::plain_linear", lib=_library
)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - as the operator
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """An operator that torch.compile leaves whole; without it, the function behind it, which is quicker to call."""
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = torch.ops.hogwild.plain_linear(x, weight, bias)
        return compiled
    return plain_linear(x, weight, bias)


def _dispatch_plain(layer: Any, remove_weight: bool) -> None:
    """Multiply with the weight itself, instead of with a packed copy that empties it.

    Replaces `vllm/model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm`, which vLLM's linear and embedding
    layers import at the time of the call. Can go when vLLM offers to keep CPU linears unpacked. What it costs
    is measured by benchmarks/serving.py.
    """
    if layer.weight.ndim == 2:
        layer.cpu_linear = _linear
    else:  # a convolution: its kernel expects packed weights, so it stays as vLLM wants it, and is not trained
        _original(layer, remove_weight)


@contextlib.contextmanager
def plain_linears() -> Iterator[None]:
    """While this is open, vLLM's post-processing leaves 2-D weights where they are.

    Raises:
        ArenaError: this vLLM is not one whose internals are known; silently dead weights would be the result.
    """
    parameters = list(inspect.signature(_original).parameters)
    if parameters != ["layer", "remove_weight"]:
        raise ArenaError(
            f"vLLM {vllm.__version__} packs CPU weights in a way hogwild does not know "
            f"(dispatch_cpu_unquantized_gemm{tuple(parameters)}): use vLLM {' or '.join(_KNOWN)}"
        )
    utils.dispatch_cpu_unquantized_gemm = _dispatch_plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = _original
