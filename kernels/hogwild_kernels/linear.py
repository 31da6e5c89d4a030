"""y = x W^T for a few rows of x, on bf16 weights as they lie: what a CPU server needs while it decodes.

Fast CPU kernels want the weight packed, and a packed copy is a second copy that training would not reach. Without
packing, a library's matrix product re-packs W in every call, which for one to a few dozen rows costs more than the
product. AVX512-BF16 has no need of it: `vdpbf16ps` multiplies 32 pairs along the inner dimension, so rows of W and rows
of x are read as they are. On AVX2, W is widened to fp32 in registers, on its way into the product. Either way W is read
once, the product accumulates in fp32 and is rounded once, to nearest (linear_blocks.py).

The kernel is generated as LLVM IR and runs in OpenMP's own threads (the ones that torch uses and that the server has
bound to cores), through libgomp's entry point. Elsewhere (`kind()` is None) `products.linear` takes its place.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding, ir
from torch import Tensor

from . import products
from .linear_blocks import AVX2, AVX512_BF16, ROWS, Kind, i32, i64


@functools.cache
def kind() -> Kind | None:
    """How this machine multiplies; None where it has neither AVX512-BF16 nor AVX2, or no OpenMP runtime is loaded."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if _openmp() is None:
        return None
    if "avx512_bf16" in flags:
        return AVX512_BF16
    return AVX2 if {"avx2", "fma"} <= flags else None


def plain_linear(
    x: Tensor,  # (..., n) bf16
    weight: Tensor,  # (m, n) bf16, rows contiguous
    bias: Tensor | None = None,  # (m,)
) -> Tensor:
    """x W^T + b, as torch.nn.functional.linear gives it, to the rounding of the fp32 sum.

    Falls back to `products.linear` for what the kernel is not made for: many rows, other dtypes or strides.
    """
    m, n = weight.shape
    rows = x.numel() // n if n else 0
    how = kind()
    if (
        how is None
        or not 0 < rows <= how.max_rows
        or not x.dtype == weight.dtype == torch.bfloat16
        or n % how.lanes
        or m % ROWS
        or weight.stride(1) != 1
    ):
        return products.linear(x, weight, bias)
    flat = x.reshape(rows, n).to(torch.float32 if how.x_bytes == 4 else torch.bfloat16).contiguous()
    out = torch.empty((rows, m), dtype=torch.bfloat16)
    task = (ctypes.c_int64 * 7)(
        weight.data_ptr(), weight.stride(0), flat.data_ptr(), out.data_ptr(), m // ROWS, n, rows
    )
    # A thread for every 64 KiB of weights at the most: fewer than that is not worth waking one.
    threads = max(1, min(torch.get_num_threads(), m * n // (1 << 15)))
    runtime, kernel = _openmp(), _kernel(how)
    assert runtime is not None
    runtime.GOMP_parallel(kernel, ctypes.byref(task), threads, 0)
    out = out.view(*x.shape[:-1], m)
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
    """Address of `void kernel(int64_t *task)`, compiled for this machine; every thread of the team runs it.

    task: address of W, elements between its rows, address of x, address of y, m / 4, n, rows of x.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    runtime = _openmp()
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        binding.add_symbol(name, ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value)
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    module = binding.parse_assembly(str(_module(how)))
    module.verify()
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("kernel"))


def _module(how: Kind) -> ir.Module:
    module = ir.Module("plain_linear")
    blocks = {columns: how.block(module, columns) for columns in range(1, how.columns + 1)}
    team = ir.FunctionType(i32, [])
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64.as_pointer()]), "kernel")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    task = [
        b.load(b.gep(function.args[0], [ir.Constant(i64, i)], source_etype=i64), typ=i64) for i in range(7)
    ]
    weight, stride, x, y, groups, n, rows = task
    me = b.zext(b.call(ir.Function(module, team, "omp_get_thread_num"), []), i64)
    all_ = b.zext(b.call(ir.Function(module, team, "omp_get_num_threads"), []), i64)
    first, last = b.udiv(b.mul(groups, me), all_), b.udiv(b.mul(groups, b.add(me, _int(1))), all_)
    m2 = b.mul(groups, _int(ROWS * 2))  # bytes of a row of y
    full = b.mul(b.udiv(rows, _int(how.columns)), _int(how.columns))

    def four_rows(group: Any) -> None:
        w = b.add(weight, b.mul(group, b.mul(stride, _int(ROWS * 2))))
        out = b.add(y, b.mul(group, _int(ROWS * 2)))

        def column_block(column: Any) -> None:
            at_x, at_y = b.add(x, b.mul(column, b.mul(n, _int(how.x_bytes)))), b.add(out, b.mul(column, m2))
            b.call(blocks[how.columns], [w, stride, at_x, at_y, m2, n])

        _loop(b, _int(0), full, how.columns, column_block)
        rest = b.sub(rows, full)
        at_x, at_y = b.add(x, b.mul(full, b.mul(n, _int(how.x_bytes)))), b.add(out, b.mul(full, m2))
        for columns in range(1, how.columns):
            with b.if_then(b.icmp_unsigned("==", rest, _int(columns))):
                b.call(blocks[columns], [w, stride, at_x, at_y, m2, n])

    _loop(b, first, last, 1, four_rows)
    b.ret_void()
    return module


def _loop(b: ir.IRBuilder, start: Any, stop: Any, step: int, body: Any) -> None:
    """for i in range(start, stop, step): body(i)"""
    before, head = b.block, b.append_basic_block()
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(i64)
    i.add_incoming(start, before)
    inside, after = b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_unsigned("<", i, stop), inside, after)
    b.position_at_end(inside)
    body(i)
    i.add_incoming(b.add(i, _int(step)), b.block)
    b.branch(head)
    b.position_at_end(after)


def _int(value: int) -> ir.Constant:
    return ir.Constant(i64, value)
