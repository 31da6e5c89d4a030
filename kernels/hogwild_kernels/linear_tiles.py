"""The product of `linear` in the matrix unit of newer Intel processors (AMX), as LLVM IR.

A tile of W is the left operand of y^T = W x^T, which is read row by row as it lies. Only the right one has to be
packed, in pairs along the inner dimension, and that is x: each thread does that for itself, in scratch memory. A tile
of y^T is transposed on its way out.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .linear_ir import BFloat, Kind, begin, constant, declared, f32, i8, i32, i64, loop, prefetch, thread

SIDE = 16
"""Rows of W, and of x, in a tile."""
_DEPTH = 32  # elements of a row of a tile
_BYTES = 1024  # of a tile
_MOST = 4  # tiles of y at once
_W, _X = 4, (5, 6)  # the registers of the operands; those of y are 0 to 3

_i32x16, _f32x16, _bf16x16 = (ir.VectorType(one, SIDE) for one in (i32, f32, BFloat()))


def _module() -> ir.Module:
    module = ir.Module("linear_tiles")
    blocks = {tiles: _block(module, tiles) for tiles in range(1, _MOST + 1)}
    b, task, first, last = begin(module)
    weight, stride, x, y, groups, n, rows, scratch, mine = task
    packed = b.add(scratch, b.mul(mine, thread(b)[0]))
    row = b.mul(n, constant(2))
    tall = b.mul(row, constant(SIDE))  # bytes of a row of tiles of x, packed
    m2 = b.mul(groups, constant(2 * SIDE))
    across = b.udiv(b.add(rows, constant(SIDE - 1)), constant(SIDE))
    full = b.mul(b.udiv(across, constant(_MOST)), constant(_MOST))
    rest = b.sub(across, full)
    _call(b, "llvm.x86.ldtilecfg", [b.bitcast(_configuration(module), i64.as_pointer())])
    _pack(b, x, rows, row, across, packed)

    def group(number: Any) -> None:
        w = b.add(weight, b.mul(number, b.mul(stride, constant(2 * SIDE))))
        out = b.add(y, b.mul(number, constant(2 * SIDE)))

        def at(tile: Any) -> list[Any]:
            below = b.mul(tile, b.mul(m2, constant(SIDE)))
            return [w, stride, b.add(packed, b.mul(tile, tall)), b.add(out, below), m2, n]

        loop(b, constant(0), full, _MOST, lambda tile: b.call(blocks[_MOST], at(tile)))
        for tiles in range(1, _MOST):
            with b.if_then(b.icmp_unsigned("==", rest, constant(tiles))):
                b.call(blocks[tiles], at(full))

    loop(b, first, last, 1, group)
    _call(b, "llvm.x86.tilerelease", [])
    b.ret_void()
    return module


def _configuration(module: ir.Module) -> Any:
    """All registers hold 16 rows of 64 bytes."""
    content = bytearray(64)
    content[0] = 1  # the only palette
    for register in range(8):
        content[16 + 2 * register], content[48 + register] = 64, SIDE
    found = ir.GlobalVariable(module, ir.ArrayType(i8, 64), "configuration")
    found.initializer, found.global_constant = ir.Constant(ir.ArrayType(i8, 64), content), True
    found.linkage, found.align = "internal", 64
    return found


def _pack(b: ir.IRBuilder, x: Any, rows: Any, row: Any, across: Any, packed: Any) -> None:
    """Of each tile of x, its transpose in pairs of elements. What is missing of the last tile are copies of its last
    row."""
    last = b.sub(rows, constant(1))

    def tiles(number: Any) -> None:
        places = []
        for r in range(SIDE):
            wanted = b.add(b.mul(number, constant(SIDE)), constant(r))
            there = b.select(b.icmp_unsigned("<", wanted, last), wanted, last)
            places.append(b.add(x, b.mul(there, row)))
        out = b.add(packed, b.mul(number, b.mul(row, constant(SIDE))))

        def tile(at: Any) -> None:  # bytes along the row
            lines = [b.load(_place(b, b.add(place, at), _i32x16), align=2) for place in places]
            for pair, line in enumerate(_transposed(b, lines)):
                to = b.add(b.add(out, b.mul(at, constant(SIDE))), constant(64 * pair))
                b.store(line, _place(b, to, _i32x16), align=4)

        loop(b, constant(0), row, 2 * _DEPTH, tile)

    loop(b, constant(0), across, 1, tiles)


def _block(module: ir.Module, tiles: int) -> ir.Function:
    """(address of 16 rows of W, elements between them, address of packed x, address of y, bytes between rows of y, n):
    16 columns of y, of `tiles` tiles of x."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 6), f"tiles{tiles}")
    function.linkage = "internal"
    w, stride, x, y, m2, n = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    room = b.alloca(ir.ArrayType(f32, SIDE * SIDE))
    room.align = 64
    below, tall = b.mul(stride, constant(2)), b.mul(n, constant(2 * SIDE))
    for register in range(tiles):
        _call(b, "llvm.x86.tilezero", [ir.Constant(i8, register)])

    def inner(i: Any) -> None:
        at = b.add(w, b.mul(i, constant(2)))
        _call(b, "llvm.x86.tileloadd64", [ir.Constant(i8, _W), _place(b, at), below])
        for r in range(SIDE):  # the same of the next 16 rows, into L2
            prefetch(b, b.add(at, b.mul(below, constant(SIDE + r))))
        for register in range(tiles):
            other = ir.Constant(i8, _X[register % len(_X)])
            place = b.add(b.add(x, b.mul(tall, constant(register))), b.mul(i, constant(_BYTES // _DEPTH)))
            _call(b, "llvm.x86.tileloadd64", [other, _place(b, place), constant(64)])
            _call(b, "llvm.x86.tdpbf16ps", [ir.Constant(i8, register), ir.Constant(i8, _W), other])

    loop(b, constant(0), n, _DEPTH, inner)
    for register in range(tiles):
        start = b.ptrtoint(room, i64)
        _call(b, "llvm.x86.tilestored64", [ir.Constant(i8, register), _place(b, start), constant(64)])
        lines = [b.load(_place(b, b.add(start, constant(64 * r)), _f32x16), align=64) for r in range(SIDE)]
        for c, line in enumerate(_transposed(b, lines)):
            to = b.add(y, b.mul(m2, constant(SIDE * register + c)))
            b.store(b.fptrunc(line, _bf16x16), _place(b, to, _bf16x16), align=2)
    b.ret_void()
    return function


def _transposed(b: ir.IRBuilder, lines: list[Any]) -> list[Any]:
    """16 vectors of 16: off-diagonal blocks are exchanged, of one element, then of 2, 4 and 8 to a side."""
    for width in (1, 2, 4, 8):
        low = [j if not j & width else SIDE + j - width for j in range(SIDE)]
        high = [j + width if not j & width else SIDE + j for j in range(SIDE)]
        masks = [ir.Constant(_i32x16, mask) for mask in (low, high)]
        done = list(lines)
        for k in range(SIDE):
            if not k & width:
                for to, mask in zip((k, k + width), masks, strict=True):
                    done[to] = b.shuffle_vector(lines[k], lines[k + width], mask)
        lines = done
    return lines


def _call(b: ir.IRBuilder, name: str, arguments: list[Any]) -> None:
    takes = [argument.type for argument in arguments]
    b.call(declared(b.module, name, ir.VoidType(), takes), arguments)


def _place(b: ir.IRBuilder, address: Any, of: ir.Type = i64) -> Any:
    return b.inttoptr(address, of.as_pointer())


AMX_BF16 = Kind(
    "AMX-BF16",
    _module,
    height=SIDE,
    lanes=_DEPTH,
    rows=range(5, 257),
    whole=SIDE,
    scratch=lambda rows, n: -(-rows // SIDE) * (n // _DEPTH) * _BYTES,
)
