"""The rules of running error analysis for one number at a time, in plain Python: what the bounds do with arrays, written out.

A number is the pair of its exact value and of how far a computed one may be from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_spec.bounds.profile import gamma
from mla_spec.reference.formats import FORMATS, Rounding, round_to

U64 = 2.0**-53
"""The roundoff of the reference's own arithmetic."""

Number = tuple[float, float]


def exact(value: float) -> Number:
    return value, 0.0


def size(x: Number) -> float:
    """The largest magnitude that a computed number may have."""
    return abs(x[0]) + x[1]


def half_ulp(largest: float, dtype: str) -> float:
    """Half the distance of neighbours at ``largest``."""
    fmt = FORMATS[dtype]
    binade = fmt.min_exponent if largest == 0 else max(math.floor(math.log2(largest)), fmt.min_exponent)
    return fmt.unit_roundoff * 2.0**binade


def rounded(x: Number, dtype: str) -> Number:
    return x[0], x[1] + half_ulp(size(x), dtype)


def stored(x: Number, dtype: str, rounding: Rounding = "nearest") -> Number:
    """Rounding is monotone, so the ends of the interval get farthest."""
    low, high = (float(round_to(np.array(end), dtype, rounding=rounding)) for end in (x[0] - x[1], x[0] + x[1]))
    return x[0], max(abs(low - x[0]), abs(high - x[0]))


def perhaps_stored(x: Number, dtype: str, rounding: Rounding = "nearest") -> Number:
    return x[0], max(x[1], stored(x, dtype, rounding)[1])


def moved(a: Number, b: Number) -> float:
    """How far a product of two computed numbers may be from that of the exact ones."""
    return abs(a[0]) * b[1] + a[1] * abs(b[0]) + a[1] * b[1]


def times(a: Number, b: Number, rate: float) -> Number:
    """A product with the relative error ``rate``, and that of the reference."""
    value, error = a[0] * b[0], moved(a, b)
    return value, error + (rate + U64) * (abs(value) + error)


def dot(a: Sequence[Number], b: Sequence[Number], rate: float) -> Number:
    """A sum of products whose error is ``rate`` times the sum of their magnitudes, and that of the reference."""
    pairs = list(zip(a, b, strict=True))
    gauge = math.fsum(size(x) * size(y) for x, y in pairs)
    error = math.fsum(moved(x, y) for x, y in pairs) + (rate + gamma(len(pairs) + 8, U64)) * gauge
    return math.fsum(x[0] * y[0] for x, y in pairs), error


def total(numbers: Sequence[Number], rate: float) -> Number:
    """A sum whose error is ``rate`` times the sum of the magnitudes."""
    error = math.fsum(x[1] for x in numbers) + rate * math.fsum(size(x) for x in numbers)
    return math.fsum(x[0] for x in numbers), error


def numbers(x: Any) -> Any:
    """The numbers of an array and its errors, as nested lists."""
    pairs = np.empty(x.value.shape, dtype=object)
    for index in np.ndindex(x.value.shape):
        pairs[index] = float(x.value[index]), float(x.error[index])
    return pairs.tolist()


def assert_same(got: Any, want: Any, rtol: float = 1e-12) -> None:
    """The array ``got`` holds the nested lists of numbers ``want``.

    Errors may differ by more where values do, as sums of float64 do in another order.
    """
    value, error = np.moveaxis(np.array(want, dtype=float), -1, 0)
    assert got.value.shape == value.shape
    assert got.error.shape == error.shape
    np.testing.assert_allclose(got.value, value, rtol=rtol, atol=1e-13)
    allowed = rtol * np.abs(error) + 2 * np.abs(got.value - value)
    off = np.abs(got.error - error)
    assert (off <= allowed).all(), (off / np.maximum(error, 1e-300)).max()
