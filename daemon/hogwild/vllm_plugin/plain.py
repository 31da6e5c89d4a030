"""Keeps vLLM's linear weights plain on a CPU, so that the tensor that is served is the tensor that is trained."""

from typing import Any

import torch
from vllm.model_executor.layers import utils

from hogwild.vllm_plugin.patch import Patch, looks_like
from hogwild_kernels.linear import plain_linear

_original = utils.dispatch_cpu_unquantized_gemm


library = torch.library.Library("hogwild", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
library.define(  # type: ignore[no-untyped-call]  # torch leaves it untyped
    "plain_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
library.impl("plain_linear", plain_linear, "CPU")  # type: ignore[no-untyped-call]  # torch leaves it untyped


@torch.library.register_fake(  # type: ignore[untyped-decorator]  # torch leaves it untyped
    "hogwild::plain_linear", lib=library
)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - as the operator
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """An operator that torch.compile leaves whole; without it, the function behind it, which is quicker to call."""
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = torch.ops.hogwild.plain_linear(x, weight, bias)
        return compiled
    return plain_linear(x, weight, bias)


def _dispatch_plain(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001 - as the original
    """Multiply with the weight itself, instead of with a packed copy that empties it. vLLM's linear and embedding
    layers import the original at the time of the call. What it costs is measured by benchmarks/serving.py.

    A weight of three dimensions is that of a convolution, which is left as it is too: see convolution.py.
    """
    if layer.weight.ndim == 2:
        layer.cpu_linear = _linear


def _install() -> None:
    """A process has to ask Linux for the matrix unit of newer Intel processors (AMX). Packing weights does so, in
    passing; without it, the first token that vLLM's attention computes there ends the process: illegal instruction.
    """
    utils.dispatch_cpu_unquantized_gemm = _dispatch_plain
    torch.cpu._init_amx()  # says False, and does nothing, where there is none


PATCH = Patch(
    name="plain linear layers",
    replaces="vllm/model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm",
    why="vLLM packs the weights of linear layers and heads into copies and empties the originals: nothing "
    "could be trained",
    until="vLLM can be told to keep CPU linear weights unpacked",
    differs=lambda: looks_like(_original, ["layer", "remove_weight"], "layer.cpu_linear ="),
    install=_install,
)
