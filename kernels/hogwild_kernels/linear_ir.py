"""What the kernels of `linear` have in common: LLVM IR by llvmlite, and when to take which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

i64, i32, i16, i8 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
f32 = ir.FloatType()


class BFloat(ir.Type):  # type: ignore[misc]  # llvmlite is untyped and has no bfloat of its own
    """bf16, as LLVM knows it."""

    def _to_string(self) -> str:
        return "bfloat"


@dataclass(frozen=True)
class Kind:
    """How one kind of CPU multiplies.

    Attributes:
        name: of its instructions.
        module: makes the code: `void kernel(int64_t *task)`, which every thread of a team runs. task: address of W,
            elements between its rows, address of x, address of y, m / `height`, n, rows of x, address of scratch, bytes
            of it for each thread.
        height: m has to be a multiple of this.
        lanes: n has to be a multiple of this.
        rows: of x, for which this is faster than what comes after it.
        x_bytes: of an element of x: 2 where bf16 is multiplied as it is, 4 where x is widened first.
        whole: y is given rows up to a multiple of this.
        scratch: (rows of x, n) -> bytes for each thread.
    """

    name: str
    module: Callable[[], ir.Module]
    height: int
    lanes: int
    rows: range
    x_bytes: int = 2
    whole: int = 1
    scratch: Callable[[int, int], int] = lambda _rows, _n: 0


def begin(module: ir.Module) -> tuple[ir.IRBuilder, list[Any], Any, Any]:
    """The beginning of `kernel`: where to go on, the task, and the groups of rows of W that are this thread's, from and
    to."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64.as_pointer()]), "kernel")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    task = [b.load(b.gep(function.args[0], [constant(i)], source_etype=i64), typ=i64) for i in range(9)]
    me, all_ = thread(b)
    groups = task[4]
    return b, task, b.udiv(b.mul(groups, me), all_), b.udiv(b.mul(groups, b.add(me, constant(1))), all_)


def thread(b: ir.IRBuilder) -> tuple[Any, Any]:
    """This thread's number in its team, and how many there are."""
    names = ("omp_get_thread_num", "omp_get_num_threads")
    me, all_ = (b.zext(b.call(declared(b.module, name, i32, []), []), i64) for name in names)
    return me, all_


def loop(b: ir.IRBuilder, start: Any, stop: Any, step: int, body: Callable[[Any], object]) -> None:
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
    i.add_incoming(b.add(i, constant(step)), b.block)
    b.branch(head)
    b.position_at_end(after)


def prefetch(b: ir.IRBuilder, address: Any) -> None:
    """Have the line at this address fetched into L2."""
    pointer = i64.as_pointer()
    function = declared(b.module, "llvm.prefetch.p0", ir.VoidType(), [pointer, i32, i32, i32])
    read, l2, data = (ir.Constant(i32, flag) for flag in (0, 2, 1))
    b.call(function, [b.inttoptr(address, pointer), read, l2, data])


def declared(module: ir.Module, name: str, returns: ir.Type, takes: list[ir.Type]) -> Any:
    """A function from elsewhere, or an instruction."""
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(returns, takes), name)


def constant(value: int) -> ir.Constant:
    return ir.Constant(i64, value)
