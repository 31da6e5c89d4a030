"""y = x W^T for some rows of x, on bf16 weights as they lie: what a CPU server needs while it decodes.

Fast CPU kernels want the weight packed, and a packed copy is a second copy that training would not reach. Without
packing, a library's matrix product re-packs W in every call, which for one to a few dozen rows costs more than the
product. AVX512-BF16 has no need of it: `vdpbf16ps` multiplies 32 pairs along the inner dimension, so rows of W and rows
of x are read as they are. On AVX2, W is widened to fp32 in registers, on its way into the product (linear_blocks.py).
AMX takes tiles of W as they lie if W is the left operand (linear_tiles.py). Either way W is read once, the product
accumulates in fp32 and is rounded once, to nearest.

A kernel is generated as LLVM IR and runs in OpenMP's own threads (the ones that torch uses and that the server has
bound to cores), through libgomp's entry point. Elsewhere (`kinds()` is empty) `products.linear` takes its place.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding
from torch import Tensor

from . import products
from .linear_blocks import AVX2, AVX512_BF16
from .linear_ir import Kind
from .linear_tiles import AMX_BF16


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """How this machine multiplies, the first that fits; none where it has no AVX2, or no OpenMP runtime is loaded."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if _openmp() is None:
        return ()
    found = []
    if "avx512_bf16" in flags:
        found.append(AVX512_BF16)
    elif {"avx2", "fma"} <= flags:
        found.append(AVX2)
    # A process has to ask Linux for it, and the compiler has to know it.
    if binding.get_host_cpu_features().get("amx-bf16") and torch.cpu._init_amx():
        # What is left to the others: a few rows, and weights that are not made of tiles. There a library's
        # product, which packs tiles in every call, takes over sooner.
        return AMX_BF16, *(replace(one, rows=range(1, 13)) for one in found)
    return tuple(found)


def plain_linear(
    x: Tensor,  # (..., n) bf16
    weight: Tensor,  # (m, n) bf16, rows contiguous
    bias: Tensor | None = None,  # (m,)
) -> Tensor:
    """x W^T, as torch.nn.functional.linear gives it, to the rounding of the fp32 sum. A bias is added to what has been
    rounded, which rounds a second time; torch adds it before.

    Falls back to `products.linear` for what no kernel is made for: many rows, other dtypes or strides.
    """
    m, n = weight.shape
    rows = x.numel() // n if n else 0
    plain = x.dtype == weight.dtype == torch.bfloat16 and weight.stride(1) == 1
    how = next((one for one in kinds() if rows in one.rows and not (n % one.lanes or m % one.height)), None)
    if how is None or not plain:
        return products.linear(x, weight, bias)
    flat = x.reshape(rows, n).to(torch.float32 if how.x_bytes == 4 else torch.bfloat16).contiguous()
    out = torch.empty((-(-rows // how.whole) * how.whole, m), dtype=torch.bfloat16)
    # A thread for every 64 KiB of weights at the most: fewer than that is not worth waking one.
    threads = max(1, min(torch.get_num_threads(), m * n // (1 << 15)))
    mine = how.scratch(rows, n)
    scratch = torch.empty(threads * mine, dtype=torch.uint8) if mine else None
    task = (ctypes.c_int64 * 9)(
        weight.data_ptr(), weight.stride(0), flat.data_ptr(), out.data_ptr(), m // how.height, n, rows,
        0 if scratch is None else scratch.data_ptr(), mine,
    )  # fmt: skip
    runtime, kernel = _openmp(), _kernel(how)
    assert runtime is not None
    runtime.GOMP_parallel(kernel, ctypes.byref(task), threads, 0)
    out = (out if len(out) == rows else out[:rows]).view(*x.shape[:-1], m)
    return out if bias is None else out.add_(bias.to(out.dtype))


@functools.cache
def _openmp() -> Any:
    """The OpenMP runtime that torch has loaded: libgomp, or whatever was preloaded in its place."""
    names = [None, *sorted({line.split()[-1] for line in _maps() if "libgomp" in line or "libiomp" in line})]
    for name in names:
        library = ctypes.CDLL(name)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def _maps() -> list[str]:
    path = Path("/proc/self/maps")
    return path.read_text().splitlines() if path.exists() else []


_engines: list[Any] = []  # owns the machine code


@functools.cache
def _kernel(how: Kind) -> int:
    """Address of `void kernel(int64_t *task)`, compiled for this machine."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    runtime = _openmp()
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        binding.add_symbol(name, ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value)
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    module = binding.parse_assembly(str(how.module()))
    module.verify()
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("kernel"))
