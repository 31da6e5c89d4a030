"""y = x W^T for a few rows of x, on bf16 weights as they lie: what a CPU server needs while it decodes.

Fast CPU kernels want the weight packed, and a packed copy is a second copy that training would not reach. Without
packing, a library's matrix product re-packs W in every call, which for one to a few dozen rows costs more than the
product. AVX512-BF16 has no need of it: `vdpbf16ps` multiplies 32 pairs along the inner dimension, so rows of W and rows
of x are read as they are. W is read once, the product accumulates in fp32 and is rounded once, to nearest.

The kernel is generated as LLVM IR and runs in OpenMP's own threads (the ones that torch uses and that the server has
bound to cores), through libgomp's entry point. Elsewhere (`available()` is false) `products.linear` takes its place.
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

MAX_ROWS = 128
"""Rows of x up to which this is used. Re-packing W costs the less the more rows share it."""
_ROWS, _COLUMNS, _LANES = 4, 4, 32  # rows of W and of x in one block; bf16 elements in one vector
_AHEAD = 16  # rows of W between what is read and what is fetched into L2; without it one row of x takes twice as long

_i64, _i32, _i16, _void = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.VoidType()
_f32x16 = ir.VectorType(ir.FloatType(), 16)


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite is untyped and has no bfloat of its own
    def _to_string(self) -> str:
        return "bfloat"


_bf16x32, _bf16x16 = ir.VectorType(_BFloat(), 32), ir.VectorType(_BFloat(), 16)


@functools.cache
def available() -> bool:
    """Does this machine have AVX512-BF16, and this process an OpenMP runtime?"""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags and _openmp() is not None


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
    fits = (
        0 < rows <= MAX_ROWS
        and x.dtype == weight.dtype == torch.bfloat16
        and n % _LANES == 0
        and m % _ROWS == 0
        and weight.stride(1) == 1
        and available()
    )
    if not fits:
        return products.linear(x, weight, bias)
    flat = x.reshape(rows, n).contiguous()
    out = torch.empty((rows, m), dtype=torch.bfloat16)
    task = (ctypes.c_int64 * 7)(
        weight.data_ptr(), weight.stride(0), flat.data_ptr(), out.data_ptr(), m // _ROWS, n, rows
    )
    # A thread for every 64 KiB of weights at the most: fewer than that is not worth waking one.
    threads = max(1, min(torch.get_num_threads(), m * n // (1 << 15)))
    runtime, kernel = _openmp(), _kernel()
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
def _kernel() -> int:
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
    module = binding.parse_assembly(str(_module()))
    module.verify()
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("kernel"))


def _module() -> ir.Module:
    module = ir.Module("plain_linear")
    blocks = {columns: _block(module, columns) for columns in range(1, _COLUMNS + 1)}
    team = ir.FunctionType(_i32, [])
    function = ir.Function(module, ir.FunctionType(_void, [_i64.as_pointer()]), "kernel")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    task = [
        b.load(b.gep(function.args[0], [ir.Constant(_i64, i)], source_etype=_i64), typ=_i64) for i in range(7)
    ]
    weight, stride, x, y, groups, n, rows = task
    me = b.zext(b.call(ir.Function(module, team, "omp_get_thread_num"), []), _i64)
    all_ = b.zext(b.call(ir.Function(module, team, "omp_get_num_threads"), []), _i64)
    first, last = b.udiv(b.mul(groups, me), all_), b.udiv(b.mul(groups, b.add(me, _int(1))), all_)
    m2 = b.mul(groups, _int(_ROWS * 2))  # bytes of a row of y
    full = b.mul(b.udiv(rows, _int(_COLUMNS)), _int(_COLUMNS))

    def four_rows(group: Any) -> None:
        w = b.add(weight, b.mul(group, b.mul(stride, _int(_ROWS * 2))))
        out = b.add(y, b.mul(group, _int(_ROWS * 2)))

        def four_columns(column: Any) -> None:
            at_x, at_y = b.add(x, b.mul(column, b.mul(n, _int(2)))), b.add(out, b.mul(column, m2))
            b.call(blocks[_COLUMNS], [w, stride, at_x, at_y, m2, n])

        _loop(b, _int(0), full, _COLUMNS, four_columns)
        rest = b.sub(rows, full)
        at_x, at_y = b.add(x, b.mul(full, b.mul(n, _int(2)))), b.add(out, b.mul(full, m2))
        for columns in range(1, _COLUMNS):
            with b.if_then(b.icmp_unsigned("==", rest, _int(columns))):
                b.call(blocks[columns], [w, stride, at_x, at_y, m2, n])

    _loop(b, first, last, 1, four_rows)
    b.ret_void()
    return module


def _block(module: ir.Module, columns: int) -> ir.Function:
    """y[c, r] = sum over i of W[r, i] x[c, i], for 4 rows r and `columns` columns c; n is a multiple of 32."""
    function = ir.Function(module, ir.FunctionType(_void, [_i64] * 6), f"block{columns}")
    function.linkage = "internal"
    w, stride, x, y, m2, n = function.args
    entry = function.append_basic_block("entry")
    b = ir.IRBuilder(entry)
    dot = module.globals.get("llvm.x86.avx512bf16.dpbf16ps.512") or ir.Function(
        module, ir.FunctionType(_f32x16, [_f32x16, _bf16x32, _bf16x32]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    name, pointer = "llvm.prefetch.p0", _i64.as_pointer()
    prefetch = module.globals.get(name) or ir.Function(
        module, ir.FunctionType(_void, [pointer, _i32, _i32, _i32]), name
    )
    w_rows = [b.add(w, b.mul(stride, _int(2 * r))) for r in range(_ROWS)]
    x_rows = [b.add(x, b.mul(n, _int(2 * c))) for c in range(columns)]
    zero = ir.Constant(_f32x16, [0.0] * 16)
    body, done = function.append_basic_block("body"), function.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    i = b.phi(_i64)
    i.add_incoming(_int(0), entry)
    sums = [b.phi(_f32x16) for _ in range(_ROWS * columns)]
    at = b.mul(i, _int(2))
    ws, xs = ([_vector(b, b.add(row, at)) for row in rows] for rows in (w_rows, x_rows))
    for k, total in enumerate(sums):
        total.add_incoming(zero, entry)
        total.add_incoming(b.call(dot, [total, ws[k % _ROWS], xs[k // _ROWS]]), body)
    for row in w_rows:  # rows are too short for the hardware to see where they lead
        ahead = b.inttoptr(b.add(row, b.add(at, b.mul(stride, _int(2 * _AHEAD)))), _i64.as_pointer())
        b.call(prefetch, [ahead, *(ir.Constant(_i32, flag) for flag in (0, 2, 1))])  # read, into L2, data
    following = b.add(i, _int(_LANES))
    i.add_incoming(following, body)
    b.cbranch(b.icmp_unsigned("<", following, n), body, done)
    b.position_at_end(done)
    ends = [total.incomings[1][0] for total in sums] + [zero] * (16 - len(sums))
    four = b.bitcast(b.fptrunc(_sum_each(b, ends), _bf16x16), ir.VectorType(_i64, 4))
    for c in range(columns):
        place = b.inttoptr(b.add(y, b.mul(m2, _int(c))), _i64.as_pointer())
        b.store(b.extract_element(four, ir.Constant(_i32, c)), place, align=2)
    b.ret_void()
    return function


def _sum_each(b: ir.IRBuilder, vectors: list[Any]) -> Any:
    """16 vectors of 16 lanes -> one vector of their 16 sums: a transposition that adds as it goes."""
    width = 16
    while len(vectors) > 1:
        half = width // 2
        low = [g * width + j for g in range(32 // width) for j in range(half)]
        masks = [ir.Constant(ir.VectorType(_i32, 16), [k + d for k in low]) for d in (0, half)]
        vectors = [
            b.fadd(b.shuffle_vector(u, v, masks[0]), b.shuffle_vector(u, v, masks[1]))
            for u, v in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width = half
    return vectors[0]


def _vector(b: ir.IRBuilder, address: Any) -> Any:
    return b.load(b.inttoptr(address, _bf16x32.as_pointer()), typ=_bf16x32, align=2)


def _loop(b: ir.IRBuilder, start: Any, stop: Any, step: int, body: Any) -> None:
    """for i in range(start, stop, step): body(i)"""
    before, head = b.block, b.append_basic_block()
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(_i64)
    i.add_incoming(start, before)
    inside, after = b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_unsigned("<", i, stop), inside, after)
    b.position_at_end(inside)
    body(i)
    i.add_incoming(b.add(i, _int(step)), b.block)
    b.branch(head)
    b.position_at_end(after)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_i64, value)
