"""Rotary embedding as model code computes it, in float32."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.config import RopeConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array


def float32_frequencies(rope: RopeConfig) -> Array:
    """Frequencies as model code computes them, every step in float32."""
    f32 = np.float32
    plain = f32(1) / f32(rope.theta) ** (np.arange(0, rope.dim, 2).astype(f32) / f32(rope.dim))
    if rope.frequency_divisors is not None:
        power = f32(rope.theta) ** (np.arange(0, rope.dim, 2).astype(f32) / f32(rope.dim))
        divided: Array = f32(1) / (np.array(rope.frequency_divisors, dtype=f32) * power)
        return divided
    yarn = rope.active_yarn
    if yarn is None:
        return plain
    low, high = rope.yarn_correction_range()
    ramp = np.clip((np.arange(rope.dim // 2).astype(f32) - f32(low)) / f32(high - low), f32(0), f32(1))
    kept = f32(1) - ramp
    return plain / f32(yarn.factor) * (f32(1) - kept) + plain * kept


def float32_rope(
    x: Array, positions: Array, rope: RopeConfig, output: str, table: str = "float32", rotation: str = "float32"
) -> Array:
    """Rotation of [s, h, r] with angles in float32, the table and the rotation in other formats on request."""
    f32 = np.float32
    angle = positions.astype(f32)[:, None, None] * float32_frequencies(rope)
    factor = f32(rope.cos_sin_factor)
    cos, sin = (round_to((f(angle) * factor).astype(float), table) for f in (np.cos, np.sin))
    half = rope.dim // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if rope.interleaved else (x[..., :half], x[..., half:])

    def rounded(y: Array) -> Array:
        return round_to(y, rotation)

    pair = [
        rounded(rounded(a * cos) - rounded(b * sin)),
        rounded(rounded(a * sin) + rounded(b * cos)),
    ]
    out = np.stack(pair, -1).reshape(x.shape) if rope.interleaved else np.concatenate(pair, -1)
    return round_to(out, output)
