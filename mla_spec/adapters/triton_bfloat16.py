"""bfloat16 in Triton's interpreter, repaired.

The interpreter of triton 3.9 keeps a bfloat16 number as its bits in a uint16, and computes with these integers (triton issue 11584).
There are four faults, each with a repair of its own:

* "dot": ``tl.dot`` multiplies bits.
* "arithmetic": so do +, *, comparisons and maxima.
* "casts": float32 is cut off to bfloat16, where a GPU rounds to nearest even; integers, float16 and float64 become bits.
* "reductions": ``tl.sum``, ``tl.max``, ``tl.min`` and ``tl.cumsum`` add and compare bits.

Numbers are widened to float32, which is exact, and what an operation gives is rounded back. In a sum every partial sum is rounded, as
on a GPU; halves are added to each other first, where a compiler may choose another order. ``tl.fma``, ``tl.dot_scaled`` and atomic
operations are not repaired: they raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

Replacements = Mapping[tuple[Any, str], Callable[..., Any]]
"""By (class, name of the method), what takes the method's place."""

RELEASED: dict[tuple[Any, str], Callable[..., Any]] = {}
"""The methods whose place was taken."""


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers whose bits are given, of the same shape."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the bfloat16 numbers nearest to x, ties to even; of the same shape."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # the carry steps the exponent, up to infinity
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def repairs() -> dict[str, Replacements]:
    """The repairs by name. Triton has been imported as its interpreter."""
    interpreter = import_module("triton.runtime.interpreter")
    return {
        "dot": _dot(interpreter),
        "arithmetic": _arithmetic(interpreter),
        "casts": _casts(interpreter),
        "reductions": _reductions(interpreter),
    }


def repair() -> None:
    """Make all repairs, once."""
    for replacements in repairs().values():
        for (owner, method), replacement in replacements.items():
            if (owner, method) not in RELEASED:
                RELEASED[owner, method] = getattr(owner, method)
                setattr(owner, method, replacement)


def _is_bfloat16(x: Any) -> bool:
    return bool(x.dtype.scalar.is_bf16())


def _dot(interpreter: Any) -> Replacements:
    handle, builder, float32 = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.tl.float32
    before = builder.create_dot

    def wide(x: Any) -> Any:
        return handle(widened(x.data), float32) if _is_bfloat16(x) else x

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = before(self, wide(a), wide(b), wide(d), *options)
        return handle(rounded(product.data), d.dtype.scalar) if _is_bfloat16(d) else product

    return {(builder, "create_dot"): create_dot}


def _arithmetic(interpreter: Any) -> Replacements:
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    unary, binary, clamp = builder.unary_op, builder.binary_op, builder.create_clampf

    def computed(op: Callable[..., Any], *operands: Any) -> Any:
        result = op(*(widened(operand.data) for operand in operands))
        return handle(result if result.dtype == np.bool_ else rounded(result), operands[0].dtype.scalar)

    def unary_op(self: Any, x: Any, op: Callable[..., Any]) -> Any:
        return computed(op, x) if _is_bfloat16(x) else unary(self, x, op)

    def binary_op(self: Any, x: Any, y: Any, op: Callable[..., Any]) -> Any:
        return computed(op, x, y) if _is_bfloat16(x) else binary(self, x, y, op)

    def create_clampf(self: Any, x: Any, low: Any, high: Any, nans: Any) -> Any:
        by_two_steps = nans == interpreter._ir.PROPAGATE_NAN.NONE
        return (
            clamp(self, x, low, high, nans) if by_two_steps or not _is_bfloat16(x) else computed(np.clip, x, low, high)
        )

    def refused(name: str) -> Callable[..., Any]:
        before = getattr(builder, name)

        def method(self: Any, *arguments: Any) -> Any:
            if any(isinstance(each, handle) and _is_bfloat16(each) for each in arguments):
                raise NotImplementedError(f"{name} of bfloat16 numbers: Triton's interpreter has no right answer")
            return before(self, *arguments)

        return method

    replaced = {f.__name__: f for f in (unary_op, binary_op, create_clampf)}
    replaced |= {name: refused(name) for name in ("create_fma", "create_dot_scaled", "create_atomic_rmw")}
    return {(builder, name): method for name, method in replaced.items()}


def _casts(interpreter: Any) -> Replacements:
    handle, builder, tl = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.tl
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if _is_bfloat16(x):
            x = handle(widened(x.data), tl.float32)
        if not dtype.scalar.is_bf16():
            return x if dtype.scalar.is_fp32() and x.dtype.is_fp32() else cast(self, x, dtype)
        if not x.dtype.scalar.is_fp32():
            x = cast(self, x, tl.float32)
        return handle(rounded(x.data), tl.bfloat16)

    def create_fp_to_fp(self: Any, x: Any, dtype: Any, mode: Any) -> Any:
        if x.dtype.scalar.is_fp32() and dtype.scalar.is_bf16() and mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(x, dtype)
        return convert(self, x, dtype, mode)

    return {(builder, "cast_impl"): cast_impl, (builder, "create_fp_to_fp"): create_fp_to_fp}


def _reductions(interpreter: Any) -> Replacements:
    reduce, scan, float32 = interpreter.ReduceOps, interpreter.ScanOps, interpreter.tl.float32
    total, best, sums, products = reduce.sum, reduce.min_max, scan.cumsum, scan.cumprod

    def sum(self: Any, x: Any) -> Any:
        if not _is_bfloat16(x):
            return total(self, x)
        bits, axis = (x.handle.data.ravel(), 0) if self.axis is None else (x.handle.data, self.axis)
        while bits.shape[axis] > 1:  # a power of two, as all lengths in Triton
            first, second = np.split(bits, 2, axis)
            bits = rounded(widened(first) + widened(second))
        shape = np.sum(x.handle.data, axis=self.axis, keepdims=self.keep_dims).shape
        return self.to_tensor(bits.reshape(shape)[()], x.dtype)

    def min_max(self: Any, x: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        x = x[0] if isinstance(x, tuple) else x
        if not _is_bfloat16(x):
            return best(self, x, val_reduce_op, idx_reduce_op)
        found = best(self, self.to_tensor(widened(x.handle.data), float32), val_reduce_op, idx_reduce_op)
        if val_reduce_op is None:
            return found
        first, *others = found if isinstance(found, tuple) else (found,)
        bits = rounded(first.handle.data)
        first = self.to_tensor(bits if first.type.is_block() else bits[0], x.dtype)
        return (first, *others) if others else first

    def scanned(before: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, x: Any) -> Any:
            if not _is_bfloat16(x):
                return before(self, x)
            bits = np.moveaxis(x.handle.data, self.axis, 0).copy()
            for i in range(1, len(bits)):
                bits[i] = rounded(op(widened(bits[i - 1]), widened(bits[i])))
            return [self.to_tensor(np.moveaxis(bits, 0, self.axis), x.dtype)]

        return method

    return {
        (reduce, "sum"): sum,
        (reduce, "min_max"): min_max,
        (scan, "cumsum"): scanned(sums, np.add),
        (scan, "cumprod"): scanned(products, np.multiply),
    }
