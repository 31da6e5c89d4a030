"""The innermost loops of `linear`: y[c, r] = sum over i of W[r, i] x[c, i], as LLVM IR, one for each kind of CPU.

A block is a function (address of 4 rows of W, elements between them, address of `columns` rows of x, address of y,
bytes between rows of y, n); W and y are bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from .linear_ir import BFloat, Kind, begin, constant, declared, f32, i16, i32, i64, loop, prefetch

ROWS = 4
"""Rows of W in a block."""
_AHEAD = 16  # rows of W between what is read and what is fetched into L2; without it one row of x takes twice as long

_f32x16, _f32x8 = ir.VectorType(f32, 16), ir.VectorType(f32, 8)
_bf16x32, _bf16x16 = ir.VectorType(BFloat(), 32), ir.VectorType(BFloat(), 16)


def _module(block: Callable[[ir.Module, int], ir.Function], most: int, x_bytes: int) -> ir.Module:
    """`block` makes the function for a number of columns, of which there are `most` at once."""
    module = ir.Module("linear_blocks")
    blocks = {columns: block(module, columns) for columns in range(1, most + 1)}
    b, task, first, last = begin(module)
    weight, stride, x, y, groups, n, rows, _scratch, _mine = task
    m2 = b.mul(groups, constant(ROWS * 2))  # bytes of a row of y
    full = b.mul(b.udiv(rows, constant(most)), constant(most))

    def four_rows(group: Any) -> None:
        w = b.add(weight, b.mul(group, b.mul(stride, constant(ROWS * 2))))
        out = b.add(y, b.mul(group, constant(ROWS * 2)))

        def column_block(column: Any) -> None:
            at_x, at_y = b.add(x, b.mul(column, b.mul(n, constant(x_bytes)))), b.add(out, b.mul(column, m2))
            b.call(blocks[most], [w, stride, at_x, at_y, m2, n])

        loop(b, constant(0), full, most, column_block)
        rest = b.sub(rows, full)
        at_x, at_y = b.add(x, b.mul(full, b.mul(n, constant(x_bytes)))), b.add(out, b.mul(full, m2))
        for columns in range(1, most):
            with b.if_then(b.icmp_unsigned("==", rest, constant(columns))):
                b.call(blocks[columns], [w, stride, at_x, at_y, m2, n])

    loop(b, first, last, 1, four_rows)
    b.ret_void()
    return module


def _avx512_bf16(module: ir.Module, columns: int) -> ir.Function:
    """y[c, r] = sum over i of W[r, i] x[c, i], for 4 rows r and `columns` columns c."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 6), f"block{columns}")
    function.linkage = "internal"
    w, stride, x, y, m2, n = function.args
    entry = function.append_basic_block("entry")
    b = ir.IRBuilder(entry)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = declared(module, name, _f32x16, [_f32x16, _bf16x32, _bf16x32])
    w_rows = [b.add(w, b.mul(stride, constant(2 * r))) for r in range(ROWS)]
    x_rows = [b.add(x, b.mul(n, constant(2 * c))) for c in range(columns)]
    zero = ir.Constant(_f32x16, [0.0] * 16)
    body, done = function.append_basic_block("body"), function.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    i = b.phi(i64)
    i.add_incoming(constant(0), entry)
    sums = [b.phi(_f32x16) for _ in range(ROWS * columns)]
    at = b.mul(i, constant(2))
    ws, xs = ([_vector(b, b.add(row, at)) for row in rows] for rows in (w_rows, x_rows))
    for k, total in enumerate(sums):
        total.add_incoming(zero, entry)
        total.add_incoming(b.call(dot, [total, ws[k % ROWS], xs[k // ROWS]]), body)
    for row in w_rows:  # rows are too short for the hardware to see where they lead
        prefetch(b, b.add(row, b.add(at, b.mul(stride, constant(2 * _AHEAD)))))
    following = b.add(i, constant(32))
    i.add_incoming(following, body)
    b.cbranch(b.icmp_unsigned("<", following, n), body, done)
    b.position_at_end(done)
    ends = [total.incomings[1][0] for total in sums] + [zero] * (16 - len(sums))
    four = b.bitcast(b.fptrunc(_sum_each(b, ends), _bf16x16), ir.VectorType(i64, 4))
    for c in range(columns):
        place = b.inttoptr(b.add(y, b.mul(m2, constant(c))), i64.as_pointer())
        b.store(b.extract_element(four, ir.Constant(i32, c)), place, align=2)
    b.ret_void()
    return function


def _sum_each(b: ir.IRBuilder, vectors: list[Any]) -> Any:
    """16 vectors of 16 lanes -> one vector of their 16 sums: a transposition that adds as it goes."""
    width = 16
    while len(vectors) > 1:
        half = width // 2
        low = [g * width + j for g in range(32 // width) for j in range(half)]
        masks = [ir.Constant(ir.VectorType(i32, 16), [k + d for k in low]) for d in (0, half)]
        vectors = [
            b.fadd(b.shuffle_vector(u, v, masks[0]), b.shuffle_vector(u, v, masks[1]))
            for u, v in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width = half
    return vectors[0]


def _vector(b: ir.IRBuilder, address: Any) -> Any:
    return b.load(b.inttoptr(address, _bf16x32.as_pointer()), typ=_bf16x32, align=2)


def _avx2(module: ir.Module, columns: int) -> ir.Function:
    """x is fp32; W is widened as it is read: bf16 is the upper half of fp32. Sums are rounded once, to nearest even."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 6), f"block{columns}")
    function.linkage = "internal"
    w, stride, x, y, m2, n = function.args
    entry = function.append_basic_block("entry")
    b = ir.IRBuilder(entry)
    multiply_add = declared(module, "llvm.fma.v8f32", _f32x8, [_f32x8] * 3)
    add_up = declared(module, "llvm.vector.reduce.fadd.v8f32", f32, [f32, _f32x8])
    w_rows = [b.add(w, b.mul(stride, constant(2 * r))) for r in range(ROWS)]
    x_rows = [b.add(x, b.mul(n, constant(4 * c))) for c in range(columns)]
    halves = (
        2 if columns == 1 else 1
    )  # sums of their own for each half: one column alone waits for its additions
    body, done = function.append_basic_block("body"), function.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    i = b.phi(i64)
    i.add_incoming(constant(0), entry)
    sums = [b.phi(_f32x8) for _ in range(halves * ROWS * columns)]
    totals = list(sums)
    for half in range(2):
        xs = [
            b.load(b.inttoptr(b.add(row, b.mul(b.add(i, constant(8 * half)), constant(4))), _f32x8.as_pointer()),
                   typ=_f32x8, align=4)
            for row in x_rows
        ]  # fmt: skip
        for r, row in enumerate(w_rows):
            wide = _widened(b, b.add(row, b.mul(b.add(i, constant(8 * half)), constant(2))))
            for c in range(columns):
                k = (half % halves) * ROWS * columns + c * ROWS + r
                totals[k] = b.call(multiply_add, [wide, xs[c], totals[k]])
    zero = ir.Constant(_f32x8, [0.0] * 8)
    for total, following_total in zip(sums, totals, strict=True):
        total.add_incoming(zero, entry)
        total.add_incoming(following_total, body)
    for row in w_rows:  # rows are too short for the hardware to see where they lead
        prefetch(b, b.add(row, b.add(b.mul(i, constant(2)), b.mul(stride, constant(2 * _AHEAD)))))
    following = b.add(i, constant(16))
    i.add_incoming(following, body)
    b.cbranch(b.icmp_unsigned("<", following, n), body, done)
    b.position_at_end(done)
    for c in range(columns):
        for r in range(ROWS):
            k = c * ROWS + r
            total = totals[k] if halves == 1 else b.fadd(totals[k], totals[ROWS * columns + k])
            value = b.call(add_up, [ir.Constant(f32, 0.0), total], fastmath=["reassoc"])
            place = b.add(y, b.add(b.mul(m2, constant(c)), constant(2 * r)))
            b.store(_rounded(b, value), b.inttoptr(place, i16.as_pointer()), align=2)
    b.ret_void()
    return function


def _widened(b: ir.IRBuilder, address: Any) -> Any:
    """8 bf16 numbers as fp32."""
    narrow = ir.VectorType(i16, 8)
    bits = b.load(b.inttoptr(address, narrow.as_pointer()), typ=narrow, align=2)
    wide = b.zext(bits, ir.VectorType(i32, 8))
    return b.bitcast(b.shl(wide, ir.Constant(ir.VectorType(i32, 8), [16] * 8)), _f32x8)


def _rounded(b: ir.IRBuilder, value: Any) -> Any:
    """fp32 -> bf16 (as i16), to nearest even; a NaN stays one."""
    bits = b.bitcast(value, i32)
    odd = b.and_(b.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
    nearest = b.add(bits, b.add(odd, ir.Constant(i32, 0x7FFF)))
    is_nan = b.fcmp_unordered("uno", value, value)
    quiet = b.or_(bits, ir.Constant(i32, 0x400000))
    return b.trunc(b.lshr(b.select(is_nan, quiet, nearest), ir.Constant(i32, 16)), i16)


AVX512_BF16 = Kind(
    "AVX512-BF16", partial(_module, _avx512_bf16, 4, 2), height=ROWS, lanes=32, rows=range(1, 129)
)
AVX2 = Kind("AVX2", partial(_module, _avx2, 3, 4), height=ROWS, lanes=16, rows=range(1, 17), x_bytes=4)
