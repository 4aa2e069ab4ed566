"""Floating-point formats, and correct rounding of float64 numbers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    ``precision`` counts the significand bits with the implicit one; ``min_exponent`` is the exponent of the smallest
    normal number, ``max_finite`` the largest finite one.
    """

    name: str
    bits: int
    precision: int
    min_exponent: int
    max_finite: float

    @property
    def unit_roundoff(self) -> float:
        """U = 2^-p: the largest relative error of rounding to nearest in the normal range."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.precision + 1)

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return self.bits // 8


FORMATS: Final[dict[str, Format]] = {
    f.name: f
    for f in (
        Format("float64", 64, 53, -1022, float(np.finfo(np.float64).max)),
        Format("float32", 32, 24, -126, float(np.finfo(np.float32).max)),
        Format("float16", 16, 11, -14, 65504.0),
        Format("bfloat16", 16, 8, -126, (2.0 - 2.0**-7) * 2.0**127),
    )
}


def format_of(name: str) -> Format:
    """The format called ``name``; ValueError lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}; known formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to(x: Array, name: str) -> Array:
    """Round float64 numbers to format ``name``, to nearest, ties to even, in one step.

    Args:
        x: float64, any shape. NaN and infinities pass unchanged.
        name: a key of ``FORMATS``.

    Returns:
        float64 of the same shape, each value exactly representable in the format. Magnitudes that round beyond
        ``max_finite`` become infinities, subnormals are kept (IEEE 754-2019, section 4.3.1).
    """
    fmt = format_of(name)
    x = np.asarray(x, dtype=np.float64)
    if fmt.name == "float64":
        return x.copy()
    _, exponent = np.frexp(x)  # |x| in [2^(exponent-1), 2^exponent)
    quantum_exponent = np.maximum(exponent - fmt.precision, fmt.min_exponent - fmt.precision + 1)
    rounded = np.ldexp(np.rint(np.ldexp(x, -quantum_exponent)), quantum_exponent)
    overflow = np.abs(rounded) > fmt.max_finite
    return np.where(overflow & np.isfinite(x), np.copysign(np.inf, x), rounded)
