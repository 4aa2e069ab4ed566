"""How far a quantiser may be from its rows."""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.reference.cache_layout import CacheLayout, QuantisedRows
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.quantised_cache import dequantise, group_amax, nearest_codes, require_rows, rounded_up
from mla_spec.reference.typing import Array


def scale_limits(rows: Array, layout: CacheLayout, *, arithmetic: str = "float32") -> tuple[Array, Array]:
    """The smallest and the largest scale that a quantiser may choose for each group; two arrays [..., groups].

    Let a = amax / largest code. The published quantisers take m = max(a, floor). They round it to nearest in the format of
    scales (e4m3), or up to a power of two (float32, e8m0), which is below 2 m. They compute in ``arithmetic``:

        round(a (1 − γ)) ≤ scale ≤ 2 m (1 + γ)

    where round is to nearest, or up in e8m0. With less the largest elements of a group saturate, with more codes lose a
    bit. Any lower floor will do, but the scale of a group that is not zero is not zero. γ is γ_n for four operations and
    a logarithm with 8 units of roundoff, n = 4 + 8 |log2 m|.

    Raises:
        ValueError: a layout that stores no scales.
    """
    require_rows(rows, layout)
    if not layout.scale:
        raise ValueError(f"{layout.name} stores no scales")
    scale = format_of(layout.scale)
    wanted = group_amax(rows, layout) / format_of(layout.code).max_finite
    floored = np.maximum(wanted, layout.scale_floor)
    operations = (4 + 8 * np.abs(np.log2(floored))) * format_of(arithmetic).unit_roundoff
    slack = np.where(operations < 1, operations / np.where(operations < 1, 1 - operations, 1.0), np.inf)
    low = np.minimum(wanted * (1 - np.minimum(slack, 1.0)), scale.max_finite)
    low = rounded_up(low, scale.name) if scale.positive else round_to(low, scale.name)
    low = np.where(wanted > 0, np.maximum(low, scale.smallest_subnormal), 0.0)
    return low, 2 * floored * (1 + slack)


def error_bound(rows: Array, scales: Array, layout: CacheLayout, *, arithmetic: str = "float32") -> Array:
    """The largest |c − ĉ| of a quantiser that stores the nearest codes with the given scales; [..., width].

    It computes y = c / scale, or c · (1 / scale), as y (1 + δ) with |δ| ≤ γ_3 of its arithmetic, and takes the code q'
    nearest to that. With q the code nearest to y,

        |y − q'| ≤ |y (1 + δ) − q'| + |δ y| ≤ |y (1 + δ) − q| + |δ y| ≤ |y − q| + 2 |δ y|.

    Times the scale: |c − ĉ| ≤ |c − q · scale| + 2 γ_3 |c|. The first term is the quantisation itself, and what saturates. It
    is at most u |c|, or half the smallest code times the scale: for e4m3, max(2^-4 |c|, 2^-10 scale). A plain element must
    be the nearest number of its format: the bound is its distance from c.

    Args:
        rows: [..., width], what is quantised.
        scales: [..., groups], which the quantiser chose; judge them by ``scale_limits``.
        arithmetic: format in which the quantiser divides.
    """
    require_rows(rows, layout)
    plain = round_to(rows[..., layout.scaled_dim :], layout.plain, overflow="saturate")
    nearest = dequantise(QuantisedRows(nearest_codes(rows, scales, layout), scales, plain), layout)
    computed = np.arange(layout.width) < layout.scaled_dim
    quotient = 2 * gamma(3, format_of(arithmetic).unit_roundoff)
    own = 2 * format_of("float64").unit_roundoff  # of the subtraction and of this bound
    return np.abs(rows - nearest) * (1 + own) + np.where(computed, quotient * np.abs(rows), 0.0)


def quantised_error(rows: Array, scales: Array, layout: CacheLayout) -> ErrorBound:
    """How far stored rows may be from those that were quantised, with the scales that were stored."""
    # What was stored with a scale NaN is NaN, and so outside any bound.
    scales = np.where(np.isnan(scales), 1.0, scales)
    with np.errstate(over="ignore", invalid="ignore"):
        return ErrorBound({"rounding to the nearest code": error_bound(rows, scales, layout)})


def dequantised_error(rows: Array, profile: Profile) -> ErrorBound:
    """How far rows that are read may be from code times scale: rounded in the arithmetic, and then to the dtype."""
    fmt = format_of(profile.dtype)
    rate = fmt.unit_roundoff + 2 * format_of(profile.softmax).unit_roundoff
    exact = round_to(rows, fmt.name) == rows
    error = np.where(exact, 0.0, rate * np.abs(rows) + fmt.smallest_subnormal / 2)
    return ErrorBound({f"rounding to {fmt.name}": error})
