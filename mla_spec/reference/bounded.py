"""Running error analysis: an exact intermediate beside how far a computed one may be from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.reference.error_bound import half_ulp
from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class Bounded:
    """An exact intermediate and the largest deviation of a computed one, of the same shape."""

    value: Array
    error: Array

    def __getitem__(self, index: Any) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def reshape(self, *shape: int) -> Bounded:
        return Bounded(self.value.reshape(*shape), self.error.reshape(*shape))


def concatenated(*parts: Bounded) -> Bounded:
    """Parts side by side on the last axis."""
    return Bounded(np.concatenate([p.value for p in parts], axis=-1), np.concatenate([p.error for p in parts], axis=-1))


def rounded(x: Bounded, dtype: str) -> Bounded:
    """X stored in format ``dtype``."""
    return Bounded(x.value, x.error + half_ulp(np.abs(x.value) + x.error, dtype))
