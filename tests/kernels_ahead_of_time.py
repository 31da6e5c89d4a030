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

from hogwild_kernels import triton_kernels as kernels

FLOATS, COUNTS, INT = "*fp32", "*i64", "i32"
BETAS = dict.fromkeys(("b1", "c1", "b2", "c2"), "fp32")
MOMENTS = dict.fromkeys(("r_out", "mean", "square", "normal_sum", "raw_sum", "small"), FLOATS)
STEP = dict.fromkeys(("lr", "root_alpha", "log_b1", "log_b2", "gamma", "floor", "decay"), "fp32")
CAN_BE_ONE = ("n", "m", "size", "rank", "tokens", "count", "row_stride", "column_stride")

EVERYTHING = "--everything" in sys.argv
"""Every type; bf16 alone is what a test run can afford."""

Job = tuple[Any, dict[str, str], dict[str, Any]]


def jobs() -> list[Job]:
    """(kernel, argument types that are not int32, compile-time constants)"""
    found: list[Job] = [
        (kernels.finish, {"squared": FLOATS, "phi": FLOATS, "counts": COUNTS, "scalars": FLOATS, **STEP}, {}),
        (kernels.commit, {"r": FLOATS, **MOMENTS, "scalars": FLOATS, **BETAS}, {"BLOCK": 1024}),
    ]
    for given in ("*bf16", "*fp16", "*fp32") if EVERYTHING else ("*bf16",):
        types = {"y": given, "out": FLOATS, "counts": COUNTS, "table": "*i32", "gain": "fp32"}
        found.append((kernels.project, types, {"BLOCK_T": 16, "BLOCK_R": 32, "BLOCK_K": 64}))
        types = {"z": given, **MOMENTS, **BETAS, "eps": "fp32"}
        found.append((kernels.channels, types, {"BLOCK_T": 16, "BLOCK_R": 64, "BLOCK_C": 32}))
        types = {
            "weight": given,
            "x": given,
            "d": given,
            "scale": FLOATS,
            "scalars": FLOATS,
            "counts": COUNTS,
        }
        flags = {"STOCHASTIC": True, "WIDEN": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32}
        found += [(kernels.write, types, {**flags, "BY_ROW": by_row}) for by_row in (True, False)]
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
