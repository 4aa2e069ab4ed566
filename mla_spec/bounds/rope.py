"""The worst-case error of rotary embedding computed as a profile says.

Models compute frequencies and angles in float32, which moves an angle a by up to |a| times a few roundoffs: 1e-2 rad at
position 163840. That is part of the model as published, so it is in the bound and not a fault.
"""

from __future__ import annotations

import math

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound, half_ulp
from mla_spec.bounds.profile import RopeProfile
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.formats import FORMATS, format_of, round_to
from mla_spec.reference.rope import apply_rope, join_pairs, rope_cos_sin, rope_frequencies, split_pairs
from mla_spec.reference.typing import Array, IntArray


def angle_error(positions: IntArray, rope: RopeConfig, profile: RopeProfile) -> Array:
    """Worst error of position · frequency, in radians; [..., r/2] for positions [...].

    theta^(-2i/r), be it a power or exp(-ln(theta) · 2i/r), inherits ln(theta) · 2i/r roundoffs from each rounding of its
    exponent: of ln(theta), of the product, and of 2i/r where it is no number of the format; YaRN's ramp, where it is neither 0 nor 1, is off by
    a few roundoffs of the frequency before interpolation; LongRoPE's factor is rounded, and so is the product with it. The
    frequency 1 is exact; a position that the angle's format cannot hold is rounded too.
    """
    pairs = np.arange(rope.dim // 2)
    frequency = rope_frequencies(rope)  # [r/2]
    exponent = pairs * 2 / rope.dim
    u_f, u_a = format_of(profile.frequency).unit_roundoff, format_of(profile.angle).unit_roundoff
    common = np.gcd(2 * pairs, rope.dim)
    numerator, denominator = 2 * pairs // common, rope.dim // common
    held = (denominator & (denominator - 1) == 0) & (numerator < 2 ** format_of(profile.frequency).precision)
    roundings = np.where(held, 2, 3)
    relative = u_f * (math.log(rope.theta) * exponent * roundings + (8 if rope.frequency_divisors is None else 10))
    blended = np.zeros(rope.dim // 2)
    if rope.active_yarn is not None:
        low, high = rope.yarn_correction_range()
        blended = np.where((pairs > low) & (pairs < high), 4 * u_f * rope.theta**-exponent, 0.0)
    frequency_error = np.where(frequency == 1.0, 0.0, relative * frequency + blended)
    pos = np.abs(np.asarray(positions, dtype=np.float64))[..., None]  # [..., 1]
    exact_position = round_to(pos, profile.angle) == pos
    product, position = np.where(frequency == 1.0, 0.0, u_a), np.where(exact_position, 0.0, u_a)
    error: Array = pos * (frequency_error + (product + position + product * position) * (frequency + frequency_error))
    return error


def rope_with_bound(
    x: Array,
    positions: IntArray,
    rope: RopeConfig,
    profile: RopeProfile,
    *,
    output: str,
    x_error: Array | None = None,
) -> tuple[Array, ErrorBound]:
    """``apply_rope`` and the worst-case error of computing it as ``profile`` says, rounded to format ``output``.

    Arguments and errors are those of ``apply_rope``; ``x_error`` is how far the operand may be from ``x``.
    """
    out = apply_rope(x, positions, rope)
    cos, sin = rope_cos_sin(positions, rope)
    delta = angle_error(positions, rope, profile)
    if x.ndim == np.ndim(positions) + 2:
        cos, sin, delta = (a[..., None, :] for a in (cos, sin, delta))
    factor = rope.cos_sin_factor
    u_a = format_of(profile.angle).unit_roundoff
    cos, sin = np.abs(cos) * factor, np.abs(sin) * factor
    angle_term = np.minimum(delta, 2.0) * factor
    # cos or sin, its factor, and their product in the angle's format; then stored
    table_cos, table_sin = (3 * u_a * c + half_ulp(c, profile.table) for c in (cos + angle_term, sin + angle_term))
    first, second = split_pairs(np.abs(x), rope.interleaved)
    e_first, e_second = split_pairs(np.zeros_like(x) if x_error is None else x_error, rope.interleaved)
    a, b = first + e_first, second + e_second
    u_r = format_of(profile.rotation).unit_roundoff

    def joined(of_first: Array, of_second: Array) -> Array:
        return join_pairs(of_first, of_second, rope.interleaved)

    angle = joined((a + b) * angle_term, (a + b) * angle_term)
    table = joined(a * table_cos + b * table_sin, b * table_cos + a * table_sin)
    cos, sin = cos + angle_term + table_cos, sin + angle_term + table_sin
    carried = joined(e_first * cos + e_second * sin, e_second * cos + e_first * sin)
    rounded = (2 * u_r + u_r**2) * joined(a * cos + b * sin, b * cos + a * sin)
    error = angle + table + carried + rounded
    underflow = max(format_of(name).smallest_subnormal for name in (profile.rotation, output))  # of two products
    stored = np.full_like(out, underflow)
    if profile.rotation != output:
        stored = stored + half_ulp(np.abs(out) + error, output)
    norm = joined(first + second, first + second) * factor
    return out, ErrorBound(
        {
            f"frequency and angle in {profile.frequency} and {profile.angle}": angle,
            f"cos and sin table in {profile.table}": table,
            "error of the operand": carried,
            f"rotation in {profile.rotation}": rounded,
            f"rounding to {output}": stored,
            "the reference's own float64": 4 * FORMATS["float64"].unit_roundoff * norm,
        }
    )


def rope_backward_with_bound(
    out_grad: Array, positions: IntArray, rope: RopeConfig, profile: RopeProfile, *, output: str
) -> tuple[Array, ErrorBound]:
    """``rope_backward`` and the worst-case error of computing it as ``profile`` says, rounded to format ``output``.

    It is a rotation by the same angles the other way round: cos and sin come from the same table, and each element is two
    products and their sum again, in whatever order autograd adds them.
    """
    return rope_with_bound(out_grad, -positions, rope, profile, output=output)
