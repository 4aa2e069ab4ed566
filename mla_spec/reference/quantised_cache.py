"""Quantised latent caches: what a quantiser must do, and what its bytes mean.

A row of the cache, [latent | k_pe] or an indexer key, is stored as *codes* in a narrow format, one *scale* for every
``group`` codes, and a *plain* rest without scale; ``cache_layout`` says where. The row that a reader gets is

    ĉ = code · scale        for the first ``scaled_dim`` elements
    ĉ = plain               for the ``plain_dim`` elements that follow

Two operations follow. *Quantising* stores given rows: the choice of scales is free within ``scale_limits``, and given the
scales every element must be the nearest one, within ``error_bound``. *Dequantising* reads given bytes: codes and scales
are exact numbers and float64 holds their products exactly, so that a reader which rounds ĉ to a format makes that one
error. Decoding from a quantised cache is ``paged_decode`` of the ``dequantised_cache``.
"""

from __future__ import annotations

import numpy as np

from mla_spec.reference.cache_layout import Bytes, CacheLayout, QuantisedRows, tensor_scales, unpack
from mla_spec.reference.formats import decode_bits, encode, format_of, round_to
from mla_spec.reference.profile import gamma
from mla_spec.reference.typing import Array


def quantise(
    rows: Array, layout: CacheLayout, *, power_of_two: bool = False, tensor_scale: float = 1.0
) -> QuantisedRows:
    """The reference quantiser: in each group the smallest scale with which nothing saturates, and the nearest codes.

    code = round(c / scale), to nearest with ties to even, saturating; scale = max(amax / largest code, floor) rounded up
    to the format of scales. A group of zeros has the floor as its scale and zeros as its codes. Rows and scales of at most
    24 bits have correctly rounded codes, although the quotient is rounded to float64 first: it lies on a midpoint of two
    codes, or a relative 2^-29 or more away.

    Args:
        rows: [..., width], finite.
        power_of_two: round scales up to powers of two, as the writers of fp8_ds_mla do and some indexers.
        tensor_scale: the scale of layouts that store none.

    Raises:
        ValueError: rows of another width or with NaN or infinities, or a tensor scale that is no positive float32.
    """
    _require_rows(rows, layout)
    if layout.scale:
        scales = np.maximum(_amax(rows, layout) / format_of(layout.code).max_finite, layout.scale_floor)
        scales = _rounded_up(scales, "float8_e8m0fnu") if power_of_two else scales
        scales = _rounded_up(scales, layout.scale)
    else:
        scales = tensor_scales(tensor_scale, rows.shape[:-1])
    plain = round_to(rows[..., layout.scaled_dim :], layout.plain, overflow="saturate")
    return QuantisedRows(_nearest_codes(rows, scales, layout), scales, plain)


def dequantise(stored: QuantisedRows, layout: CacheLayout) -> Array:
    """The exact values of stored rows, [..., width]; NaN where a code or scale is NaN."""
    with np.errstate(invalid="ignore"):  # unused rows may hold 0 · inf
        products = _per_group(stored.codes, layout) * stored.scales[..., None]
    return np.concatenate([products.reshape(stored.codes.shape), stored.plain], axis=-1)


def scale_limits(rows: Array, layout: CacheLayout, *, arithmetic: str = "float32") -> tuple[Array, Array]:
    """The smallest and the largest scale that a quantiser may choose for each group; two arrays [..., groups].

    With a = amax / largest code, the published quantisers take m = max(a, floor), round it to nearest in the format of
    scales (e4m3) or up to a power of two (float32, e8m0), which is below 2 m, and compute in ``arithmetic``:

        round(a (1 − γ)) ≤ scale ≤ 2 m (1 + γ)

    where round is to nearest, or up in e8m0. With less the largest elements of a group saturate, with more codes lose a
    bit. Any lower floor will do, but the scale of a group that is not zero is not zero. γ is γ_n for four operations and
    a logarithm with 8 units of roundoff, n = 4 + 8 |log2 m|.

    Raises:
        ValueError: a layout that stores no scales.
    """
    _require_rows(rows, layout)
    if not layout.scale:
        raise ValueError(f"{layout.name} stores no scales")
    scale = format_of(layout.scale)
    wanted = _amax(rows, layout) / format_of(layout.code).max_finite
    floored = np.maximum(wanted, layout.scale_floor)
    operations = (4 + 8 * np.abs(np.log2(floored))) * format_of(arithmetic).unit_roundoff
    slack = np.where(operations < 1, operations / np.where(operations < 1, 1 - operations, 1.0), np.inf)
    low = np.minimum(wanted * (1 - np.minimum(slack, 1.0)), scale.max_finite)
    low = _rounded_up(low, scale.name) if scale.positive else round_to(low, scale.name)
    low = np.where(wanted > 0, np.maximum(low, scale.smallest_subnormal), 0.0)
    return low, 2 * floored * (1 + slack)


def error_bound(rows: Array, scales: Array, layout: CacheLayout, *, arithmetic: str = "float32") -> Array:
    """The largest |c − ĉ| of a quantiser that stores the nearest codes with the given scales; [..., width].

    It computes y = c / scale, or c · (1 / scale), as y (1 + δ) with |δ| ≤ γ_3 of its arithmetic, and takes the code q'
    nearest to that. With q the code nearest to y,

        |y − q'| ≤ |y (1 + δ) − q'| + |δ y| ≤ |y (1 + δ) − q| + |δ y| ≤ |y − q| + 2 |δ y|.

    Times the scale: |c − ĉ| ≤ |c − q · scale| + 2 γ_3 |c|, in which the first term is the quantisation itself, at most
    u |c| or half the smallest code times the scale (for e4m3 max(2^-4 |c|, 2^-10 scale)), and what saturates. A plain
    element must be the nearest number of its format: the bound is its distance from c.

    Args:
        rows: [..., width], what is quantised.
        scales: [..., groups], which the quantiser chose; judge them by ``scale_limits``.
        arithmetic: format in which the quantiser divides.
    """
    _require_rows(rows, layout)
    plain = round_to(rows[..., layout.scaled_dim :], layout.plain, overflow="saturate")
    nearest = dequantise(QuantisedRows(_nearest_codes(rows, scales, layout), scales, plain), layout)
    computed = np.arange(layout.width) < layout.scaled_dim
    quotient = 2 * gamma(3, format_of(arithmetic).unit_roundoff)
    own = 2 * format_of("float64").unit_roundoff  # of the subtraction and of this bound
    return np.abs(rows - nearest) * (1 + own) + np.where(computed, quotient * np.abs(rows), 0.0)


def dequantised_cache(pages: Bytes, layout: CacheLayout, page_size: int, *, tensor_scale: float = 1.0) -> Array:
    """The cache that ``paged_decode`` reads, [pages, page_size, 1, width], with the exact values of the pages."""
    return dequantise(unpack(pages, layout, page_size, tensor_scale=tensor_scale), layout)[:, :, None]


def _per_group(x: Array, layout: CacheLayout) -> Array:
    """The scaled elements by group, [..., groups, group]."""
    return x[..., : layout.scaled_dim].reshape(*x.shape[:-1], layout.groups, layout.group)


def _amax(rows: Array, layout: CacheLayout) -> Array:
    """The largest magnitude of each group, [..., groups]."""
    return np.asarray(np.abs(_per_group(rows, layout)).max(axis=-1))


def _rounded_up(x: Array, name: str) -> Array:
    """The smallest number of a format that is not below x > 0, or its largest number."""
    x = np.minimum(x, format_of(name).max_finite)
    below = round_to(x, name, rounding="truncate")
    return np.where(below < x, decode_bits(encode(below, name) + 1, name), below)


def _nearest_codes(rows: Array, scales: Array, layout: CacheLayout) -> Array:
    """Codes of the rows with these scales, [..., scaled_dim]; 0 where the scale is 0."""
    grouped = _per_group(rows, layout)
    quotients = np.divide(grouped, scales[..., None], out=np.zeros_like(grouped), where=scales[..., None] != 0)
    return round_to(quotients, layout.code, overflow="saturate").reshape(*rows.shape[:-1], layout.scaled_dim)


def _require_rows(rows: Array, layout: CacheLayout) -> None:
    if rows.shape[-1:] != (layout.width,):
        raise ValueError(f"rows of {layout.name} have {layout.width} elements, got shape {[*rows.shape]}")
    if not np.isfinite(rows).all():
        raise ValueError("only finite rows can be quantised")
