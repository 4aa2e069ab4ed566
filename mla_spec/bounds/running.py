"""Running error analysis: an exact intermediate beside how far a computed one may be from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound, half_ulp
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.reference.formats import FORMATS, Rounding, round_to
from mla_spec.reference.typing import Array

_U64 = FORMATS["float64"].unit_roundoff


@dataclass(frozen=True)
class Bounded:
    """An exact intermediate and the largest deviation of a computed one, of the same shape."""

    value: Array
    error: Array

    def __getitem__(self, index: Any) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def map(self, arrange: Callable[[Array], Array]) -> Bounded:
        """The same elements in another arrangement."""
        return Bounded(arrange(self.value), arrange(self.error))

    def reshape(self, *shape: int) -> Bounded:
        return Bounded(self.value.reshape(*shape), self.error.reshape(*shape))


def concatenated(*parts: Bounded) -> Bounded:
    """Parts side by side on the last axis."""
    return Bounded(np.concatenate([p.value for p in parts], axis=-1), np.concatenate([p.error for p in parts], axis=-1))


def rounded(x: Bounded, dtype: str) -> Bounded:
    """x stored in format ``dtype``."""
    return Bounded(x.value, x.error + half_ulp(np.abs(x.value) + x.error, dtype))


def stored(x: Bounded, dtype: str, rounding: Rounding = "nearest") -> Bounded:
    """x after one rounding to format ``dtype``.

    A computed x lies in [value − error, value + error]. Rounding is monotone, so what it becomes lies between the rounded
    ends of that interval. Example: the bfloat16 number 1.0, known to 2^-10, is exact again, since both ends round to 1.0.
    """
    ends = (round_to(x.value + side * x.error, dtype, rounding=rounding) for side in (-1.0, 1.0))
    return Bounded(x.value, np.maximum(*(np.abs(end - x.value) for end in ends)))


def perhaps_stored(x: Bounded, dtype: str, rounding: Rounding = "nearest") -> Bounded:
    """x that may have been rounded to format ``dtype``, or kept as it was: the larger error of the two."""
    return Bounded(x.value, np.maximum(x.error, stored(x, dtype, rounding).error))


def matmul(a: Bounded, b: Bounded, rate: float) -> Bounded:
    """a [..., m, n] @ b [..., n, p], summed with the error ``rate`` of the sum of the magnitudes."""
    size, own = np.abs(b.value), gamma(a.value.shape[-1] + 8, _U64)
    error = (np.abs(a.value) + a.error) @ (b.error + (rate + own) * (size + b.error)) + a.error @ size
    return Bounded(a.value @ b.value, error)


def multiply(a: Bounded, b: Bounded, rate: float) -> Bounded:
    """a · b, elementwise, with the relative error ``rate``."""
    value, size = a.value * b.value, np.abs(b.value) + b.error
    error = np.abs(a.value) * b.error + a.error * size
    return Bounded(value, error + (rate + _U64) * (np.abs(value) + error))


def product(subscripts: str, weight: Array, x: Bounded, profile: Profile, terms: int | None = None) -> Bounded:
    """einsum(subscripts, weight, x) summed over one index, as a projection in the profile's arithmetic.

    The sum may be a part of one of ``terms`` products, in any order.
    """
    value, bound = product_terms(subscripts, weight, x, profile, terms)
    return Bounded(value, bound.total)


def product_terms(
    subscripts: str, weight: Array, x: Bounded, profile: Profile, terms: int | None = None
) -> tuple[Array, ErrorBound]:
    """``product`` with the contributions to its error by name."""
    value = np.einsum(subscripts, weight, x.value, optimize=True)
    carried = np.einsum(subscripts, np.abs(weight), x.error, optimize=True)
    gauge = np.einsum(subscripts, np.abs(weight), np.abs(x.value) + x.error, optimize=True)
    n = terms or x.value.shape[-1]
    accumulated = (profile.linear.relative_error(n) + gamma(n, _U64)) * gauge
    unrounded = Bounded(value, carried + accumulated)
    return value, ErrorBound(
        {
            "error of earlier stages": carried,
            "accumulation of the projection": accumulated,
            f"rounding to {profile.dtype}": rounded(unrounded, profile.dtype).error - unrounded.error,
        }
    )
