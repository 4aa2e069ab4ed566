"""Triton kernels of one operation each, for Triton's interpreter: imported after ``interpreted.interpreter()``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def arithmetic(x, y, out, n: tl.constexpr):
    """Rows of x + y, x - y, x · y, -x, max(x, y), and x where x < y, otherwise y."""
    at = tl.arange(0, n)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + n + at, a - b)
    tl.store(out + 2 * n + at, a * b)
    tl.store(out + 3 * n + at, -a)
    tl.store(out + 4 * n + at, tl.maximum(a, b))
    tl.store(out + 5 * n + at, tl.where(a < b, a, b))


@triton.jit
def cast(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def truncating_cast(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def reductions(x, out, n: tl.constexpr):
    """Sum, greatest and least of each row of x [n, n]; then sum, greatest and least of all."""
    row = tl.arange(0, n)
    a = tl.load(x + row[:, None] * n + row[None, :])
    tl.store(out + row, tl.sum(a, 1))
    tl.store(out + n + row, tl.max(a, 1))
    tl.store(out + 2 * n + row, tl.min(a, 1))
    tl.store(out + 3 * n, tl.sum(a))
    tl.store(out + 3 * n + 1, tl.max(a))
    tl.store(out + 3 * n + 2, tl.min(a))


@triton.jit
def scan(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.cumsum(tl.load(x + at)))


@triton.jit
def fma(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    a = tl.load(x + at)
    tl.store(out + at, tl.fma(a, a, a))
