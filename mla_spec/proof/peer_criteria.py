"""Pass criteria that tests of kernels use: each says whether an output is accepted beside a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mla_spec.reference.typing import Array


class Criterion(Protocol):
    """Accepts an output, or does not; its text is a line of the report.

    ``coarse`` is the same result computed with every step rounded to the dtype.
    """

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool: ...


@dataclass(frozen=True)
class Close:
    """At least ``share`` of the elements have |got − want| ≤ absolute + relative · |want|, as ``allclose`` demands."""

    relative: float
    absolute: float
    share: float = 1.0

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        with np.errstate(invalid="ignore"):
            close = np.isclose(got, want, self.relative, self.absolute)
        return bool(close.mean() >= self.share)

    def __str__(self) -> str:
        text = f"|error| ≤ {self.absolute:g} + {self.relative:g} |want|"
        return text if self.share == 1 else f"{text} for {self.share:.0%}"


@dataclass(frozen=True)
class Within:
    """Every element has an absolute error below one limit or a relative error below another."""

    absolute: float
    relative: float

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        finite = np.isfinite(want)
        if not (np.isfinite(got) == finite).all() or not (got[~finite] == want[~finite]).all():
            return False
        error, size = np.abs(got - want)[finite], np.abs(want[finite])
        return bool(((error < self.absolute) | (error < self.relative * (size + 1e-6))).all())

    def __str__(self) -> str:
        return f"|error| < {self.absolute:g} or {self.relative:.3g} |want|"


@dataclass(frozen=True)
class Similar:
    """1 − 2⟨got, want⟩ / (‖got‖² + ‖want‖²) is at most ``limit``, over the finite elements."""

    limit: float

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        finite = np.isfinite(want)
        x, y = got[finite], want[finite]
        norms = float((x * x).sum() + (y * y).sum())
        difference = 1 - 2 * float((x * y).sum()) / norms if norms else 0.0
        return difference <= self.limit

    def __str__(self) -> str:
        return f"1 − similarity ≤ {self.limit:g}"


@dataclass(frozen=True)
class Cosine:
    """The cosine between the two is more than ``least``."""

    least: float

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        norms = float(np.linalg.norm(got) * np.linalg.norm(want))
        return norms == 0 or float((got * want).sum()) / norms > self.least

    def __str__(self) -> str:
        return f"cosine > {self.least:g}"


@dataclass(frozen=True)
class NoWorseThanLowPrecision:
    """The largest error is at most ``factor`` times that of a computation in the dtype, and the rounding of the reference."""

    factor: float

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        rounding = 2.0**-8 * np.abs(want).max()
        return bool(np.abs(got - want).max() <= self.factor * np.abs(coarse - want).max() + rounding)

    def __str__(self) -> str:
        return f"largest error ≤ {self.factor:g} × that of low precision"


@dataclass(frozen=True)
class NeverFails:
    """The share of close elements is printed, and nothing is demanded."""

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        return True

    def __str__(self) -> str:
        return "printed only"


class Every:
    """All of several criteria."""

    def __init__(self, *criteria: Criterion) -> None:
        self.criteria = criteria

    def accepts(self, got: Array, want: Array, coarse: Array) -> bool:
        return all(criterion.accepts(got, want, coarse) for criterion in self.criteria)

    def __str__(self) -> str:
        return "; ".join(map(str, self.criteria))
