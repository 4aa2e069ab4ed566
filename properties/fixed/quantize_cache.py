"""Fixed cases of ``quantize_cache``."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_cache import QuantiseCase
from mla_spec.properties.fixed.counts import nearest, ordinary_page_size
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Rows of every format, in two pages."""
    size = ordinary_page_size(supports)
    return [
        QuantiseCase(dtype=profile.dtype, format=name, page_size=size, tokens=size + 3)
        for name in supports.cache_formats[:2]
    ]


def elementary(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Every format once, with zeros and outliers."""
    (base, *_) = ordinary(supports, profile)
    return [
        replace(base, format=name, regime=regime) for name in supports.cache_formats for regime in ("zeros", "outlier")
    ]


TOKENS = ((64, 1344), (32, 320), (64, 128), (16, 321))
"""Page sizes and tokens of quantised caches, in whole pages and not."""


def crossed(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Hundreds of tokens in every format, more than a thousand in the first."""
    return [
        QuantiseCase(dtype=profile.dtype, format=name, page_size=nearest(supports.page_sizes, size), tokens=tokens)
        for name, (size, tokens) in zip(supports.cache_formats, cycle(TOKENS))
    ]
