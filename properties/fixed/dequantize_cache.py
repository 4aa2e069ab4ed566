"""Fixed cases of ``dequantize_cache``."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_cache import PagesCase
from mla_spec.properties.fixed.counts import nearest, ordinary_page_size
from mla_spec.properties.fixed.quantize_cache import TOKENS
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[PagesCase]:
    """Pages of rows of every format."""
    size = ordinary_page_size(supports)
    return [
        PagesCase(dtype=profile.dtype, format=name, page_size=size, tokens=size + 3)
        for name in supports.cache_formats[:2]
    ]


def elementary(supports: Supports, profile: Profile) -> list[PagesCase]:
    """Every format once."""
    (base, *_) = ordinary(supports, profile)
    return [replace(base, format=name) for name in supports.cache_formats]


def crossed(supports: Supports, profile: Profile) -> list[PagesCase]:
    """Hundreds of tokens in every format, and more than a thousand pages of the first where pages may be so small."""
    names = supports.cache_formats
    made = [*zip(names, cycle(((1, 1100), *TOKENS))), *((name, (256, 300)) for name in names)]
    return [
        PagesCase(dtype=profile.dtype, format=name, page_size=nearest(supports.page_sizes, size), tokens=tokens)
        for name, (size, tokens) in made
    ]
