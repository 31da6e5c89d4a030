"""Keeps vLLM's linear weights plain on a CPU, so that the tensor that is served is the tensor that is trained."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import vllm
from vllm.model_executor.layers import utils

from hogwild.errors import ArenaError

_KNOWN = ("0.32",)
_original = utils.dispatch_cpu_unquantized_gemm


def _dispatch_plain(layer: Any, remove_weight: bool) -> None:
    """Use `torch.nn.functional.linear` on the weight itself, instead of on a packed copy that empties it.

    Replaces `vllm/model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm`, which vLLM's linear and embedding
    layers import at the time of the call. Can go when vLLM offers to keep CPU linears unpacked. Measured by
    benchmarks/serving.py: the same throughput within noise.
    """
    if layer.weight.ndim == 2:
        layer.cpu_linear = torch.nn.functional.linear
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
