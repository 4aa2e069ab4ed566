"""An error bound as a sum of named contributions, and the contribution of one rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array


def half_ulp(size: Array, name: str) -> Array:
    """The largest error of rounding a number of magnitude at most ``size`` to nearest in format ``name``.

    Half the distance between neighbours there, which is u · size at a power of two and down to u/2 · size below the next.
    """
    fmt = format_of(name)
    _, exponent = np.frexp(size)  # size in [2^(exponent-1), 2^exponent)
    binade = np.where(size > 0, np.maximum(exponent - 1, fmt.min_exponent), fmt.min_exponent)
    return np.where(np.isfinite(size), np.ldexp(fmt.unit_roundoff, binade), np.inf)


@dataclass(frozen=True)
class ErrorBound:
    """Largest deviation of each element of a computed result from the exact one.

    Attributes:
        terms: contributions by name, all of the result's shape and none negative; the bound is their sum.
    """

    terms: dict[str, Array]

    @cached_property
    def total(self) -> Array:
        """The bound; inf where a contribution overflowed."""
        total = sum(self.terms.values(), np.zeros(()))
        return np.where(np.isnan(total), np.inf, total)

    def main_term(self, index: tuple[int, ...]) -> str:
        """The name of the largest contribution at ``index``."""
        return max(self.terms, key=lambda name: np.nan_to_num(self.terms[name][index], nan=np.inf))

    def __getitem__(self, index: Any) -> ErrorBound:
        """The bound of some elements."""
        return self.map(lambda term: term[index])

    def map(self, function: Callable[[Array], Array]) -> ErrorBound:
        """The bound with ``function`` applied to every contribution."""
        return ErrorBound({name: function(term) for name, term in self.terms.items()})

    def plus(self, name: str, term: Array) -> ErrorBound:
        """The bound with one more contribution."""
        return ErrorBound({**self.terms, name: term})
