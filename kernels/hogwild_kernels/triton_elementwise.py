"""The Triton kernels that work element by element: Adam on a small tensor, and rounding alone."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped"
# Triton functions are typed by their launch.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import ROUNDING_STREAM, round_bfloat16, round_float16, round_to, rounding_bits, subkey


@triton.jit(do_not_specialize=["key0", "key1", "seed"])
def adam(
    weight, gradient, mean, square,  # of `size` elements, contiguous
    counts, numbers,  # state; (2,) fp32 out: [|dW|, skipped]
    key0, key1, seed, size,
    lr, b1, c1, b2, c2, log_b1, log_b2, eps, decay,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`reference.adam_step` of a small tensor by one program."""
    i = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        g = tl.load(gradient + start + i, mask=start + i < size, other=0.0).to(tl.float32)
        squared = g * g  # what the second moment holds
        bad += (squared - squared != 0.0).to(tl.int32)  # infinity and NaN give NaN
    good = tl.sum(bad, 0) == 0
    done = tl.load(counts)
    t = (done + 1).to(tl.float64)
    correction = (1.0 - tl.exp(t * log_b2)).to(tl.float32)
    rate = (lr / (1.0 - tl.exp(t * log_b1))).to(tl.float32)
    a, b = subkey(key0, key1, ROUNDING_STREAM, done, seed)
    kind: tl.constexpr = weight.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    if good:
        for start in range(0, size, BLOCK):
            at = start + i
            inside = at < size
            g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            m = b1 * tl.load(mean + at, mask=inside, other=0.0) + c1 * g
            v = b2 * tl.load(square + at, mask=inside, other=0.0) + c2 * g * g
            update = m / (tl.sqrt(v / correction) + eps) * rate
            total += update * update
            value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * (1.0 - lr * decay) - update
            if STOCHASTIC and (kind == tl.bfloat16 or kind == tl.float16):
                rounded = round_to(value, rounding_bits(at, a, b), kind)
            else:
                rounded = value.to(kind)
            tl.store(weight + at, rounded, mask=inside)
            tl.store(mean + at, m, mask=inside)
            tl.store(square + at, v, mask=inside)
    tl.store(counts, tl.where(good, done + 1, done))
    tl.store(counts + 1, tl.load(counts + 1) + tl.where(good, 0, 1))
    tl.store(numbers, tl.sqrt(tl.sum(total, 0)))
    tl.store(numbers + 1, tl.where(good, 0.0, 1.0))


@triton.jit(do_not_specialize=["a_bits", "b_bits"])
def round_values(values, out, size, a_bits, b_bits, BLOCK: tl.constexpr):
    """Stochastic rounding alone, element = position: for the tests of the bits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = a_bits.to(tl.uint32, bitcast=True), b_bits.to(tl.uint32, bitcast=True)
    random = rounding_bits(i, a, b)
    value = tl.load(values + i, mask=i < size, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + i, round_bfloat16(value, random), mask=i < size)
    else:
        tl.store(out + i, round_float16(value, random), mask=i < size)
