"""Threads meet a kind of weight for the first time, two of them while Triton compiles for the first one; run by
test_kernels_cuda.py in its own process.

The real compiler, for compute capability 9.0. What needs a device, to load and to launch, is left out.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from hogwild_kernels import ApolloConfig, ApolloState, cuda, launch
from hogwild_kernels import triton_kernels as kernels

M, N, TOKENS = 256, 512, 48


class NoDevice:
    """What Triton asks of a driver before anything is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 1

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def loaded(kernel: Any) -> None:
    kernel.module, kernel.function, kernel._run = 1, 1, lambda *_arguments: None


def stream_of(_tensor: Tensor) -> int:
    return 1


def main() -> None:
    driver.set_active(NoDevice())
    CompiledKernel._init_handles = loaded
    cuda.stream_of = stream_of
    cuda._fastest = lambda _work: cuda.CANDIDATES[0]  # it is timed on a device
    begun, compiled = threading.Semaphore(0), launch.Prepared.compile

    def noted(prepared: launch.Prepared, *arguments: Any) -> Any:
        if prepared._kernel is kernels.write and not third.ident:
            third.start()
            third.join(1)  # while the last one is compiled; that it waits is what is wanted
        kernel = compiled(prepared, *arguments)
        begun.release()
        return kernel

    launch.Prepared.compile = noted
    config = ApolloConfig(rank=8)
    weight, state = torch.zeros(M, N, dtype=torch.bfloat16), ApolloState("layer", (M, N), config)
    failures: list[BaseException] = []

    def step(tokens: int) -> None:
        x, d = (torch.zeros(tokens, size, dtype=torch.bfloat16) for size in (N, M))
        try:
            cuda.step(weight, x, d, state, config, lr=1e-5)
        except BaseException as error:
            failures.append(error)

    first, second, third = (threading.Thread(target=step, args=(TOKENS,)) for _ in range(3))
    first.start()
    for _kernel in range(3):  # all that come before the write are being compiled
        assert begun.acquire(timeout=60)
    second.start()
    for thread in (first, second, third):
        thread.join()
    for failure in failures:
        raise failure


if __name__ == "__main__":
    main()
