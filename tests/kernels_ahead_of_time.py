"""Compiles every Triton kernel for compute capability 9.0 without a device; run by test_kernels_cuda.py in
its own process.

Types as `cuda.py` launches them. It shows that the kernels compile, not that they run.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hogwild_kernels import triton_elementwise as elementwise
from hogwild_kernels import triton_kernels as kernels

FLOATS, COUNTS, INT = "*fp32", "*i64", "i32"
BETAS = dict.fromkeys(("b1", "c1", "b2", "c2"), "fp32")
MOMENTS = dict.fromkeys(("r", "r_out", "mean", "square", "scale", "scalars", "sums"), FLOATS) | BETAS
LOGS = dict.fromkeys(("lr", "log_b1", "log_b2", "eps", "decay"), "fp32")
STEP = {**LOGS, "numbers": FLOATS, "phi": FLOATS, "counts": COUNTS}
CAN_BE_ONE = ("n", "m", "size", "rank", "tokens", "count", "row_stride", "column_stride", "run")

EVERYTHING = "--everything" in sys.argv
"""Every type; bf16 alone is what a test run can afford."""

Job = tuple[Any, dict[str, str], dict[str, Any]]


def jobs() -> list[Job]:
    """(kernel, argument types that are not int32, compile-time constants)"""
    more = dict.fromkeys(("root_alpha", "gamma", "floor"), "fp32")
    found: list[Job] = []
    for given in ("*bf16", "*fp16", "*fp32") if EVERYTHING else ("*bf16",):
        planes = 2 if given == "*bf16" else 1
        small = "*bf16" if planes == 2 else FLOATS
        types = {
            "y": given,
            "parts": FLOATS,
            "counts": COUNTS,
            "table": "*i32",
            "gain": "fp32",
            "finished": "*i32",
        }
        found.append(
            (
                kernels.project,
                types,
                {"WIDEN": False, "BLOCK_T": 16, "BLOCK_C": 64, "BLOCK_K": 64},
            )
        )
        types = {"parts": FLOATS, "out": small}
        found.append((kernels.collect, types, {"PLANES": planes, "BLOCK": 128, "DEPTH": 16}))
        types = {"z": given, "small": small, **MOMENTS, **STEP, **more, "finished": "*i32"}
        flags = {"BY_TENSOR": planes == 1, "BLOCK": 512, "PLANES": planes, "WIDEN": False}
        found.append((kernels.channels, types, {**flags, "BLOCK_T": 16, "BLOCK_R": 64, "BLOCK_C": 32}))
        types = {"weight": given, "gradient": given, **MOMENTS, **STEP}
        found.append((elementwise.adam, types, {"STOCHASTIC": True, "BLOCK": 1024}))
        types = {"weight": given, "x": given, "d": given, "counts": COUNTS, **MOMENTS}
        flags = {"STOCHASTIC": True, "WIDEN": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32}
        for yes in (True, False):
            found.append(
                (kernels.write, types, {**flags, **dict.fromkeys(("BY_ROW", "EVEN", "WHOLE", "FETCH"), yes)})
            )
    return found


for kernel, types, constants in jobs():
    signature = {name: types.get(name, INT) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # An argument of 1 is compiled in as a constant: the largest kernel a second time with everything that
    # can be 1.
    ones = [name for name in CAN_BE_ONE if name in signature]
    for fixed in ([], ones) if kernel is kernels.write and "*bf16" in types.values() else ([],):
        kinds = {**signature, **dict.fromkeys(fixed, "constexpr")}
        source = ASTSource(kernel, kinds, {**constants, **dict.fromkeys(fixed, 1)})
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        print(
            kernel.fn.__name__, *(t for t in types.values() if t.startswith("*")), "with ones" * bool(fixed)
        )
