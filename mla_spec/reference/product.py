"""Matrix products whose rounding errors do not grow with the length of their sums."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.typing import Array

_PRECISION = 53
_GROWTH_BITS = 4
"""By how many bits numbers may grow along a sum before its heads are no longer added exactly."""


_LEAST_EXPONENT = -900
"""Smaller numbers have no head, lest the unit of their cut underflow."""


def accurate_product(a: Array, b: Array) -> Array:
    """The product a @ b of [..., m, n] and [..., n, k], to about an ulp of Σ_i |a_i| |b_i| whatever n is.

    Each operand is cut in two. The heads have so few bits that sums of their products are exact, in any order; the tails are
    some 2^-20 times as large, and so are the errors that they bring. Three products in place of one: Ozaki, Ogita, Oishi and
    Rump, *Error-free transformations of matrix multiplication by using fast routines of matrix multiplication* (Numerical
    Algorithms, 2012). Here b is cut relative to the largest number so far and not in its whole column, so that later rows of
    b whose weight in a is 0 change no bit.
    """
    bits = (_PRECISION - _GROWTH_BITS - max(a.shape[-1] - 1, 0).bit_length()) // 2  # n · 2^bits · 2^bits ≤ 2^49
    a_head = _head(a, np.abs(a).max(axis=-1, keepdims=True, initial=0.0), bits)
    b_head = _head(b, np.maximum.accumulate(np.abs(b), axis=-2), bits)
    product: Array = a_head @ b_head + (a_head @ (b - b_head) + (a - a_head) @ b)
    return product


def _head(x: Array, largest: Array, bits: int) -> Array:
    """Each number cut to a multiple of 2^-bits times the power of two above ``largest``."""
    _, exponent = np.frexp(largest)
    unit = np.ldexp(1.0, np.maximum(exponent, _LEAST_EXPONENT) - bits)
    head: Array = np.trunc(x / unit) * unit
    return head
