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
    require_rows(rows, layout)
    if layout.scale:
        scales = np.maximum(group_amax(rows, layout) / format_of(layout.code).max_finite, layout.scale_floor)
        scales = rounded_up(scales, "float8_e8m0fnu") if power_of_two else scales
        scales = rounded_up(scales, layout.scale)
    else:
        scales = tensor_scales(tensor_scale, rows.shape[:-1])
    plain = round_to(rows[..., layout.scaled_dim :], layout.plain, overflow="saturate")
    return QuantisedRows(nearest_codes(rows, scales, layout), scales, plain)


def dequantise(stored: QuantisedRows, layout: CacheLayout) -> Array:
    """The exact values of stored rows, [..., width]; NaN where a code or scale is NaN."""
    with np.errstate(invalid="ignore"):  # unused rows may hold 0 · inf
        products = _per_group(stored.codes, layout) * stored.scales[..., None]
    return np.concatenate([products.reshape(stored.codes.shape), stored.plain], axis=-1)


def dequantised_cache(pages: Bytes, layout: CacheLayout, page_size: int, *, tensor_scale: float = 1.0) -> Array:
    """The cache that ``paged_decode`` reads, [pages, page_size, 1, width], with the exact values of the pages."""
    return dequantise(unpack(pages, layout, page_size, tensor_scale=tensor_scale), layout)[:, :, None]


def _per_group(x: Array, layout: CacheLayout) -> Array:
    """The scaled elements by group, [..., groups, group]."""
    return x[..., : layout.scaled_dim].reshape(*x.shape[:-1], layout.groups, layout.group)


def group_amax(rows: Array, layout: CacheLayout) -> Array:
    """The largest magnitude of each group, [..., groups]."""
    return np.asarray(np.abs(_per_group(rows, layout)).max(axis=-1))


def rounded_up(x: Array, name: str) -> Array:
    """The smallest number of a format that is not below x > 0, or its largest number."""
    x = np.minimum(x, format_of(name).max_finite)
    below = round_to(x, name, rounding="truncate")
    return np.where(below < x, decode_bits(encode(below, name) + 1, name), below)


def nearest_codes(rows: Array, scales: Array, layout: CacheLayout) -> Array:
    """Codes of the rows with these scales, [..., scaled_dim]; 0 where the scale is 0."""
    grouped = _per_group(rows, layout)
    quotients = np.divide(grouped, scales[..., None], out=np.zeros_like(grouped), where=scales[..., None] != 0)
    return round_to(quotients, layout.code, overflow="saturate").reshape(*rows.shape[:-1], layout.scaled_dim)


def require_rows(rows: Array, layout: CacheLayout) -> None:
    if rows.shape[-1:] != (layout.width,):
        raise ValueError(f"rows of {layout.name} have {layout.width} elements, got shape {[*rows.shape]}")
    if not np.isfinite(rows).all():
        raise ValueError("only finite rows can be quantised")
