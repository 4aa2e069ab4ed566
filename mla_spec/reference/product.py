"""Matrix products whose rounding errors do not grow with the length of their sums."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.typing import Array

_PRECISION = 53
_GROWTH_BITS = 4
"""By how many bits numbers may grow along a sum before its heads are no longer added exactly."""

_LEAST, _GREATEST = -900, 960
"""Exponents. Smaller numbers have no head, lest the unit of their cut underflow; larger ones a longer head, lest its shift
overflow."""


def accurate_product(a: Array, b: Array, *, prefixes: bool = False) -> Array:
    """The product a @ b of [..., m, n] and [..., n, k], to about an ulp of Σ_i |a_i| |b_i| whatever n is.

    Each operand is cut in two. The heads have so few bits that sums of their products are exact, in any order; the tails are
    some 2^-20 times as large, and so are the errors that they bring. Three products in place of one,
    a_head·b_head + (a_tail·b_head + a·b_tail): Ozaki, Ogita, Oishi and Rump, *Error-free transformations of matrix
    multiplication by using fast routines of matrix multiplication* (Numerical Algorithms, 2012).

    Args:
        prefixes: cuts b relative to the largest number so far and not in its whole column, so that later rows of b whose
            weight in a is 0 change no bit. Slower.
    """
    bits = (_PRECISION - _GROWTH_BITS - max(a.shape[-1] - 1, 0).bit_length()) // 2  # n · 2^bits · 2^bits ≤ 2^49
    a_head, a_tail = _cut(a, _largest(a, -1), bits)
    b_head, b_tail = _cut(b, np.maximum.accumulate(np.abs(b), axis=-2) if prefixes else _largest(b, -2), bits)
    by_head = np.concatenate([a_head, a_tail], axis=-2) @ b_head  # one product of twice the rows is faster than two
    rows = a.shape[-2]
    product: Array = a @ b_tail
    product += by_head[..., rows:, :]
    product += by_head[..., :rows, :]
    return product


def _largest(x: Array, axis: int) -> Array:
    """The largest magnitude along an axis, which stays."""
    largest: Array = np.abs(x).max(axis=axis, keepdims=True, initial=0.0)
    return largest


def _cut(x: Array, largest: Array, bits: int) -> tuple[Array, Array]:
    """Each number as a multiple of 2^-bits times the power of two above ``largest``, and what is left."""
    _, exponent = np.frexp(largest)
    # The sum with 1.5 · 2^52 units is rounded to a whole unit.
    shift = np.ldexp(1.5, np.minimum(np.maximum(exponent, _LEAST), _GREATEST) - bits + _PRECISION - 1)
    head = x + shift
    head -= shift
    return head, x - head
