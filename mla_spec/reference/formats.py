"""Floating-point formats: correct rounding of float64 numbers to them, and their bit patterns.

``round_to`` rounds once. A cast that passes through float32 rounds twice and differs on some inputs; torch and ml_dtypes
cast float64 so. For float32 inputs torch 2.13 agrees with ``round_to``, apart from what a format cannot hold:

* float8_e4m3fn: torch saturates everything beyond 448, infinities too (older versions and ml_dtypes give NaN). Ask for
  ``overflow="saturate"``.
* float8_e8m0fnu: torch drops the sign of a negative number, which becomes NaN here, and takes every number between
  2^-127 and 2^-126 to the latter, not to the nearest.

Sources: IEEE 754-2019, sections 3.3 and 4.3; OCP 8-bit Floating Point Specification (OFP8) 1.0 for the two 8-bit formats
of elements; OCP Microscaling Formats (MX) 1.0 for float8_e8m0fnu and float4_e2m1fn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.typing import Array, IntArray

Rounding = Literal["nearest", "truncate"]
Overflow = Literal["infinity", "saturate", "nan"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        bits: of one number; fewer than 8 are stored several to a byte.
        precision: significand bits with the implicit one.
        min_exponent: exponent of the smallest normal number.
        max_finite: the largest finite number.
        infinities, nans: whether the format has them.
        positive: all numbers are positive: no sign, no zero, no subnormals.
    """

    name: str
    bits: int
    precision: int
    min_exponent: int
    max_finite: float
    infinities: bool = True
    nans: bool = True
    positive: bool = False

    @property
    def unit_roundoff(self) -> float:
        """U = 2^-p: the largest relative error of rounding to nearest in the normal range."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; the smallest normal one where there are no subnormals."""
        return 2.0 ** (self.min_exponent - self.precision + 1)

    @property
    def itemsize(self) -> int:
        """Bytes per number; ValueError where a number does not fill whole bytes."""
        if self.bits % 8:
            raise ValueError(f"a {self.name} number has {self.bits} bits, not whole bytes")
        return self.bits // 8

    @property
    def default_overflow(self) -> Overflow:
        """What becomes of numbers beyond ``max_finite``: infinity, else NaN, else ``max_finite``."""
        return "infinity" if self.infinities else "nan" if self.nans else "saturate"

    @property
    def sign_shift(self) -> int:
        """Bits below the sign bit."""
        return self.bits - (not self.positive)

    @property
    def largest_pattern(self) -> int:
        """The bit pattern of ``max_finite``; infinities and NaNs have larger ones."""
        reserved = 1 << (self.precision - 1) if self.infinities else int(self.nans)
        return (1 << self.sign_shift) - 1 - reserved

    @property
    def nan_pattern(self) -> int:
        """The bit pattern of the positive quiet NaN without payload."""
        return self.largest_pattern + 1 + (1 << (self.precision - 2) if self.infinities else 0)


FORMATS: Final[dict[str, Format]] = {
    f.name: f
    for f in (
        Format("float64", 64, 53, -1022, float(np.finfo(np.float64).max)),
        Format("float32", 32, 24, -126, float(np.finfo(np.float32).max)),
        Format("float16", 16, 11, -14, 65504.0),
        Format("bfloat16", 16, 8, -126, (2.0 - 2.0**-7) * 2.0**127),
        Format("float8_e4m3fn", 8, 4, -6, 448.0, infinities=False),
        Format("float8_e5m2", 8, 3, -14, 57344.0),
        Format("float8_e8m0fnu", 8, 1, -127, 2.0**127, infinities=False, positive=True),
        Format("float4_e2m1fn", 4, 2, 0, 6.0, infinities=False, nans=False),
    )
}

TFLOAT32: Final = Format("tfloat32", 32, 11, -126, (2.0 - 2.0**-10) * 2.0**127)
"""What NVIDIA's tensor cores read of a float32 number: 10 fraction bits. Products have such operands; tensors never do, so
it is none of ``FORMATS`` (NVIDIA, *PTX ISA*, section "Alternate floating-point data formats")."""


def format_of(name: str) -> Format:
    """The format called ``name``; ValueError lists the known ones."""
    if name == TFLOAT32.name:
        return TFLOAT32
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}; known formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to(x: Array, name: str, *, rounding: Rounding = "nearest", overflow: Overflow | None = None) -> Array:
    """Round float64 numbers to format ``name``, in one step.

    Args:
        x: float64, any shape.
        name: a key of ``FORMATS``, or "tfloat32".
        rounding: "nearest" with ties to even, or "truncate" towards zero.
        overflow: what becomes of infinities and of numbers that round beyond ``max_finite``: "infinity", "saturate" to
            ``max_finite``, or "nan". By default infinity, where the format has none NaN, and where it has neither
            ``max_finite``. Truncation takes finite numbers to ``max_finite`` at most.

    Returns:
        float64 of the same shape, each value exactly representable in the format: subnormals and the sign of zero are
        kept, NaN stays NaN. In float8_e8m0fnu zero and underflow give the smallest number, negative numbers NaN.

    Raises:
        ValueError: an unknown format or option, or infinities or NaNs in a format that has none.
    """
    fmt = format_of(name)
    x = np.asarray(x, dtype=np.float64)
    beyond: float | Array = _beyond(fmt, overflow or fmt.default_overflow)
    if not fmt.nans and np.isnan(x).any():
        raise ValueError(f"{name} has no NaN")
    truncate = _known("rounding", rounding, ("nearest", "truncate")) == "truncate"
    result = x.copy() if name == "float64" else _rounded(x, fmt, truncate)
    if truncate:
        beyond = np.where(np.isfinite(x), fmt.max_finite, beyond)
    np.abs(result, out=result)
    np.copyto(result, beyond, where=result > fmt.max_finite)
    np.copysign(result, x, out=result)
    if fmt.positive:
        result = np.where(x < 0, np.nan, np.maximum(result, fmt.smallest_normal))
    return result


def _rounded(x: Array, fmt: Format, truncate: bool) -> Array:
    """x in whole quanta of a format of at most 24 bits, as if it had no largest number; the sign of a zero is lost."""
    unit = binade(x, fmt)
    np.minimum(unit, fmt.max_finite, out=unit)  # beyond it any unit will do that is finite
    unit *= 1.5 * 2.0 ** (53 - fmt.precision)  # 1.5 · 2^52 quanta: float64 rounds sums with it to quanta, ties to even
    rounded = np.add(x, unit, out=np.empty(x.shape))
    rounded -= unit
    if truncate:
        rounded -= np.where(np.abs(rounded) > np.abs(x), np.copysign(unit / (1.5 * 2.0**52), x), 0.0)
    return rounded


def binade(x: Array, fmt: Format) -> Array:
    """2^floor(log2 |x|) of float64 numbers; the smallest normal number where x is smaller, inf where it is not finite."""
    power = np.bitwise_and(x.view(np.uint64), np.uint64(0x7FF << 52), out=np.empty(x.shape, np.uint64)).view(np.float64)
    return np.maximum(power, fmt.smallest_normal, out=power)


def holds(x: Array, name: str) -> bool:
    """Whether all float64 numbers of x are zeros and normal numbers of format ``name``; False where any is another.

    As ``round_to(x, name) == x`` says, at a fraction of its cost. Subnormal numbers, infinities and NaN are not looked into.
    """
    fmt = format_of(name)
    tail = np.uint64(
        2 ** (FORMATS["float64"].precision - fmt.precision) - 1
    )  # of the significand, which rounding cuts off
    if fmt.positive or (np.ascontiguousarray(x).view(np.uint64) & tail).any():
        return False
    size = np.abs(x)
    return bool((((size >= fmt.smallest_normal) & (size <= fmt.max_finite)) | (size == 0)).all())


def encode(x: Array, name: str) -> NDArray[np.unsignedinteger[Any]]:
    """The bit patterns of numbers of format ``name``; uint8, uint16, uint32 or uint64, of the same shape.

    Four-bit patterns stand in the low half of a uint8. Every NaN gives the positive quiet NaN without payload.

    Raises:
        ValueError: a value that the format does not hold; ``round_to`` first.
    """
    fmt = format_of(name)
    x = np.asarray(x, dtype=np.float64)
    held = (round_to(x, name) == x) | (np.isnan(x) & fmt.nans)
    if not held.all():
        raise ValueError(f"{x[~held][0]!r} is not a number of {name}")
    size = np.where(np.isfinite(x), np.abs(x), fmt.max_finite)
    power = binade(size, fmt)
    exponent = (power.view(np.int64) >> 52) - 1023 - fmt.min_exponent  # 0 for subnormals, too
    significand = (size / power * 2.0 ** (fmt.precision - 1)).astype(np.int64)
    # the implicit bit steps the exponent field
    pattern = significand + (exponent << (fmt.precision - 1)) - fmt.positive
    pattern = np.where(np.isinf(x), fmt.largest_pattern + 1, np.where(np.isnan(x), fmt.nan_pattern, pattern))
    sign = (np.signbit(x) & ~np.isnan(x)).astype(np.uint64) << np.uint64(fmt.sign_shift % 64)
    return (pattern.astype(np.uint64) | sign).astype(_word(fmt))


def decode_bits(bits: IntArray, name: str) -> Array:
    """The exact values of bit patterns of format ``name``; float64, of the same shape. Every NaN pattern gives NaN.

    Raises:
        ValueError: a pattern that is negative or longer than the format.
    """
    fmt = format_of(name)
    bits = np.asarray(bits)
    if bits.size and (int(bits.min()) < 0 or int(bits.max()) >= 2**fmt.bits):
        raise ValueError(f"bit patterns of {name} lie in 0 .. {2**fmt.bits - 1}")
    if fmt.bits <= 16:
        return np.asarray(_every_value(fmt)[bits.astype(np.intp)])
    return _decoded(bits, fmt)


@cache
def _every_value(fmt: Format) -> Array:
    """What each pattern of a format of at most 16 bits stands for."""
    return _decoded(np.arange(2**fmt.bits), fmt)


def _decoded(bits: IntArray, fmt: Format) -> Array:
    bits = bits.astype(np.uint64)
    pattern = (bits & np.uint64(2**fmt.sign_shift - 1)).astype(np.int64)
    counted = np.minimum(pattern, fmt.largest_pattern) + fmt.positive
    exponent = np.maximum((counted >> (fmt.precision - 1)) - 1, 0)
    significand = counted - (exponent << (fmt.precision - 1))
    size = np.ldexp(significand.astype(np.float64), exponent + fmt.min_exponent - fmt.precision + 1)
    infinite = fmt.infinities & (pattern == fmt.largest_pattern + 1)
    size = np.where(pattern > fmt.largest_pattern, np.where(infinite, np.inf, np.nan), size)
    return np.where(bits >= 2**fmt.sign_shift, -size, size)


def to_bytes(x: Array, name: str) -> NDArray[np.uint8]:
    """Numbers of format ``name`` as they lie in memory: [..., n] gives [..., n · bits / 8].

    Little-endian; of two four-bit numbers the first is in the low half of the byte.

    Raises:
        ValueError: a value that the format does not hold, or an odd count of four-bit numbers.
    """
    pattern = encode(x, name)
    if format_of(name).bits == 4:
        if pattern.shape[-1] % 2:
            raise ValueError(f"an odd count of {name} numbers does not fill whole bytes")
        return (pattern[..., 0::2] | pattern[..., 1::2] << 4).astype(np.uint8)
    return np.ascontiguousarray(pattern, pattern.dtype.newbyteorder("<")).view(np.uint8)


def from_bytes(raw: NDArray[np.uint8], name: str) -> Array:
    """The exact values that ``to_bytes`` stored: [..., n · bits / 8] gives [..., n].

    Raises:
        ValueError: the last axis does not hold whole numbers.
    """
    fmt = format_of(name)
    if fmt.bits == 4:
        halves = np.stack([raw & 15, raw >> 4], axis=-1)
        return decode_bits(halves.reshape(*raw.shape[:-1], 2 * raw.shape[-1]), name)
    if raw.shape[-1] % fmt.itemsize:
        raise ValueError(f"{raw.shape[-1]} bytes do not hold whole {name} numbers")
    return decode_bits(np.ascontiguousarray(raw).view(_word(fmt).newbyteorder("<")), name)


def _known(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _beyond(fmt: Format, overflow: str) -> float:
    """What stands for numbers beyond the largest one."""
    values = {"saturate": fmt.max_finite}
    values |= {"infinity": np.inf} if fmt.infinities else {}
    values |= {"nan": np.nan} if fmt.nans else {}
    return values[_known(f"overflow of {fmt.name}", overflow, tuple(values))]


def _word(fmt: Format) -> np.dtype[Any]:
    """The unsigned integers that hold bit patterns."""
    return np.dtype(f"u{max(fmt.bits // 8, 1)}")
