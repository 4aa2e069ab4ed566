"""Rotary position embedding, to float64 accuracy at any position.

Frequencies are computed in 60-digit decimal arithmetic and angles are reduced exactly, so cos and sin carry one rounding
however large the position. RoFormer (arXiv 2104.09864), equation 34; YaRN (arXiv 2309.00071), section 3.2; LongRoPE
(arXiv 2402.13753), equation 3.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np

from mla_spec.reference.config import DIGITS, PI, RopeConfig
from mla_spec.reference.typing import Array, IntArray

MAX_POSITION = 2**26
"""Positions must be smaller in magnitude: products with the 26-bit parts of a frequency then are exact."""

_PART_BITS = 26


@lru_cache(maxsize=256)
def _decimal_frequencies(rope: RopeConfig) -> tuple[Decimal, ...]:
    """Angle per position of each pair, in radians, to about 55 digits."""
    with localcontext(DIGITS):
        ln_theta = Decimal(rope.theta).ln()
        frequencies = [(-ln_theta * (2 * i) / rope.dim).exp() for i in range(rope.dim // 2)]
        if rope.frequency_divisors is not None:
            return tuple(f / Decimal(d) for f, d in zip(frequencies, rope.frequency_divisors, strict=True))
        yarn = rope.active_yarn
        if yarn is None:
            return tuple(frequencies)
        low, high = rope.exact_yarn_correction_range()
        if low == high:
            assert yarn.ramp_guard is not None
            high += Decimal(yarn.ramp_guard)
        blended = []
        for i, extrapolated in enumerate(frequencies):
            ramp = min(max((i - low) / (high - low), Decimal(0)), Decimal(1))
            interpolated = extrapolated / Decimal(yarn.factor)
            blended.append(interpolated * ramp + extrapolated * (1 - ramp))
        return tuple(blended)


@lru_cache(maxsize=256)
def _turns_per_position(rope: RopeConfig) -> Array:
    """Frequency / 2π as a sum of four doubles, the first three of 26 bits; [4, r/2]."""
    parts = np.zeros((4, rope.dim // 2))
    with localcontext(DIGITS):
        for i, frequency in enumerate(_decimal_frequencies(rope)):
            rest = frequency / (2 * PI)
            for part in range(3):
                quantum = 2.0 ** (math.frexp(float(rest))[1] - _PART_BITS)
                parts[part, i] = float((rest / Decimal(quantum)).to_integral_value()) * quantum
                rest -= Decimal(parts[part, i])
            parts[3, i] = float(rest)
    return parts


def rope_frequencies(rope: RopeConfig) -> Array:
    """Angle per position of each pair, correctly rounded to float64; [r/2], pair i in element i.

    theta^(-2i/r); with YaRN, that frequency and the same divided by ``factor`` are blended linearly in i over the
    correction range; with LongRoPE, it is divided by the pair's own factor.
    """
    return np.array([float(f) for f in _decimal_frequencies(rope)])


def rope_cos_sin(positions: IntArray, rope: RopeConfig) -> tuple[Array, Array]:
    """Cos and sin of position · frequency, without ``rope.cos_sin_factor``.

    Args:
        positions: integers of any shape [...], magnitude below ``MAX_POSITION``.

    Returns:
        (cos, sin), each [..., r/2], within 1.2e-16 of the exact values.

    Raises:
        ValueError: a position is not an integer or too large.
    """
    positions = np.asarray(positions)
    if not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"positions must be integers, got dtype {positions.dtype}")
    if positions.size and int(np.abs(positions).max()) >= MAX_POSITION:
        raise ValueError(f"positions must be below {MAX_POSITION}, got {int(np.abs(positions).max())}")
    pos = positions.astype(np.float64)[..., None]  # [..., 1]
    g = _turns_per_position(rope)  # [4, r/2]
    # pos · g[0..2] are exact products; removing whole turns from each is exact too.
    fractions = [pos * part - np.rint(pos * part) for part in g[:3]]  # 3 × [..., r/2]
    hi, lo = _two_sum(fractions[0], fractions[1])
    lo = lo + fractions[2] + pos * g[3]
    hi = hi - np.rint(hi)
    quarter = np.rint(4 * hi)  # nearest quarter turn, -2 .. 2
    hi, lo = _two_sum(hi - quarter / 4, lo)  # |hi| ≤ 1/8 turn
    angle, correction = _turns_to_radians(hi, lo)
    c, s = np.cos(angle), np.sin(angle)
    c, s = c - s * correction, s + c * correction
    q = quarter.astype(np.int64) % 4
    cos = np.choose(q, [c, -s, -c, s])
    sin = np.choose(q, [s, c, -s, -c])
    return cos, sin


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """A + b = sum + error exactly (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _turns_to_radians(hi: Array, lo: Array) -> tuple[Array, Array]:
    """2π (hi + lo) as an unevaluated sum of two doubles."""
    two_pi, two_pi_rest = 2 * math.pi, 2.4492935982947064e-16
    split = 134217729.0 * hi  # Dekker's split at 2^27 + 1
    hi_head = split - (split - hi)
    hi_tail = hi - hi_head
    pi_head = 6.2831853032112121582  # two_pi to 26 bits
    pi_tail = two_pi - pi_head
    product = hi * two_pi
    rest = ((hi_head * pi_head - product) + hi_head * pi_tail + hi_tail * pi_head) + hi_tail * pi_tail
    return product, rest + hi * two_pi_rest + lo * two_pi


def apply_rope(x: Array, positions: IntArray, rope: RopeConfig) -> Array:
    """Rotate each pair of ``x`` by position · frequency, times ``rope.cos_sin_factor``.

    Args:
        x: [*positions.shape, r], or [*positions.shape, h, r] where all heads share the position.
        positions: integers, any shape.

    Returns:
        Same shape and pair layout as ``x`` (``rope.interleaved``).

    Raises:
        ValueError: shapes do not match, or positions are out of range.
    """
    x = np.asarray(x, dtype=np.float64)
    positions = np.asarray(positions)
    lead = positions.shape
    if x.shape[-1:] != (rope.dim,) or (x.shape[:-1] != lead and x.shape[:-2] != lead):
        raise ValueError(
            f"x must have shape positions.shape + ({rope.dim},) or positions.shape + (heads, {rope.dim}) "
            f"with positions.shape {lead}, got {x.shape}"
        )
    cos, sin = rope_cos_sin(positions, rope)  # [..., r/2]
    if x.shape[:-1] != lead:
        cos, sin = cos[..., None, :], sin[..., None, :]  # [..., 1, r/2]
    factor = rope.cos_sin_factor
    first, second = split_pairs(x, rope.interleaved)
    return join_pairs((first * cos - second * sin) * factor, (first * sin + second * cos) * factor, rope.interleaved)


def rope_backward(out_grad: Array, positions: IntArray, rope: RopeConfig) -> Array:
    """The gradient of x where that of ``apply_rope(x, positions, rope)`` is ``out_grad``, whose arguments and errors these are.

    A pair is multiplied by factor · R, and its gradient by factor · Rᵀ, which is the rotation by the negative angle.
    """
    return apply_rope(out_grad, -np.asarray(positions), rope)


def split_pairs(x: Array, interleaved: bool) -> tuple[Array, Array]:
    """The first and second members of the rotated pairs, each [..., r/2]."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def join_pairs(first: Array, second: Array, interleaved: bool) -> Array:
    """Inverse of ``split_pairs``."""
    if not interleaved:
        return np.concatenate([first, second], axis=-1)
    return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], 2 * first.shape[-1])


def half_from_interleaved(dim: int) -> IntArray:
    """The permutation p with x[..., p] in half layout where x is interleaved: 0, 2, 4, ..., 1, 3, 5, ....

    Its inverse is ``numpy.argsort`` of it. Rotating commutes with it: half(x[..., p]) == interleaved(x)[..., p].
    """
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])
