"""Fixed cases of ``quantize_cache``."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_cache import QuantiseCase
from mla_spec.properties.fixed.counts import nearest, ordinary_page_size
from mla_spec.reference.cache_layout import layout_of
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
    """Hundreds of tokens in every format, in pages of several sizes; thousands in the first one, and in the narrowest."""
    names = supports.cache_formats
    narrowest = [name for name in names if layout_of(name).width < 256][:1]
    made = [*zip(names, cycle(TOKENS)), *((name, (256, 300)) for name in names)]
    made += [(name, (64, tokens)) for name in narrowest for tokens in (1025, 4099)]
    return [
        QuantiseCase(dtype=profile.dtype, format=name, page_size=nearest(supports.page_sizes, size), tokens=tokens)
        for name, (size, tokens) in made
    ]
