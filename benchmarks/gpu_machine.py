"""Section 1: which device it is, and what it can do at best."""

from __future__ import annotations

import shutil
import subprocess

import torch

from gpu_bench import Bench
from gpu_timing import Clock, rates


def run(bench: Bench) -> None:
    name, memory = "CPU", None
    if bench.cuda:
        name = torch.cuda.get_device_name(bench.device)
        memory = torch.cuda.mem_get_info(bench.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(bench.device)))
        bench.out.fact(**{"compute capability": capability, "CUDA of torch": str(torch.version.cuda)})
    bench.out.fact(device=name, driver=_driver() if bench.cuda else "none")
    copy, matmul = rates(Clock(bench.device), bench.tiny)
    bench.out.check("both rates are above zero", copy > 0 and matmul > 0)
    bench.out.fact(copy=copy, matmul=matmul)
    bench.out.row(
        "measured rates",
        device=name,
        **{
            "memory, GiB": memory[1] / 2**30 if memory else None,
            "free, GiB": memory[0] / 2**30 if memory else None,
            "copy, GB/s": copy / 1e9,
            "matmul bf16, TFLOP/s": 2 * matmul / 1e12,
        },
    )


def _driver() -> str:
    """Version of the driver, as nvidia-smi has it; else the CUDA version that it knows."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.split()
        if said:
            return said[0]
    from hogwild.arena import cuda_driver

    _error, version = cuda_driver.load().cuDriverGetVersion()
    return f"one for CUDA {version // 1000}.{version % 1000 // 10}"
