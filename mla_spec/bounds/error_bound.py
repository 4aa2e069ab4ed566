"""An error bound as a sum of named contributions, and the contribution of one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mla_spec.reference.formats import binade, format_of
from mla_spec.reference.typing import Array


def half_ulp(size: Array, name: str) -> Array:
    """The largest error of rounding a number of magnitude at most ``size`` to nearest in format ``name``.

    Half the distance between neighbours there, which is u · size at a power of two and down to u/2 · size below the next.
    """
    fmt = format_of(name)
    return fmt.unit_roundoff * binade(np.asarray(size, dtype=np.float64), fmt)


class InvalidBound(ValueError):
    """A contribution to an error is no magnitude: an error of the suite, never of a subject."""


def overflowed(term: Array) -> Array:
    """``term`` with inf where its arithmetic overflowed to NaN, as inf - inf and 0 · inf do."""
    return np.where(np.isnan(term), np.inf, term) if math.isnan(_least(term)) else term


def _least(term: Array) -> float:
    """The smallest number, at most 0; NaN where any is."""
    return float(np.minimum.reduce(term, axis=None, initial=0.0))


@dataclass(frozen=True)
class ErrorBound:
    """Largest deviation of each element of a computed result from the exact one.

    Attributes:
        terms: contributions by name, all of the result's shape; the bound is their sum, inf where one overflowed.

    Raises:
        InvalidBound: a contribution is negative or NaN somewhere.
    """

    terms: dict[str, Array]

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            least = _least(term)
            if not least >= 0:
                raise InvalidBound(f"{name!r} must be 0 or more, got {least!r}")

    @cached_property
    def total(self) -> Array:
        """The bound."""
        return np.asarray(sum(self.terms.values(), np.zeros(())))

    def main_term(self, index: tuple[int, ...]) -> str:
        """The name of the largest contribution at ``index``."""
        return max(self.terms, key=lambda name: float(self.terms[name][index]))

    def __getitem__(self, index: Any) -> ErrorBound:
        """The bound of some elements."""
        return self.map(lambda term: term[index])

    def map(self, function: Callable[[Array], Array]) -> ErrorBound:
        """The bound with ``function`` applied to every contribution."""
        return ErrorBound({name: function(term) for name, term in self.terms.items()})

    def plus(self, name: str, term: Array) -> ErrorBound:
        """The bound with one more contribution."""
        return ErrorBound({**self.terms, name: term})
