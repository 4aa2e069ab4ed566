"""Fixed cases of ``rope``."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.bounds.profile import Profile
from mla_spec.operations.rope import RopeCase
from mla_spec.properties.fixed.counts import HEADS
from mla_spec.properties.strategies.rope import supported_scalings
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Three sequences of three tokens of three heads."""
    layout = supports.rope_layouts[0]
    return [RopeCase(dtype=profile.dtype, batch=3, s=3, heads=3, dim=16, layout=layout, start=131, stride=17)]


def elementary(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Both layouts, near and far positions, every third scaling."""
    (base,) = ordinary(supports, profile)
    cases = [replace(base, layout=layout, start=start) for layout in supports.rope_layouts for start in (0, 4095)]
    scaled = supported_scalings(supports)[:: max(1, len(supported_scalings(supports)) // 3)]
    return [*cases, *(replace(base, start=60, **scaling) for scaling in scaled)]


def counts(supports: Supports, profile: Profile) -> list[RopeCase]:
    """2^17 pairs of a token and a head; many sequences; every number of heads."""
    return [
        RopeCase(dtype=profile.dtype, batch=b, s=s, heads=heads, dim=2, layout=layout)
        for layout in supports.rope_layouts
        for b, s, heads in (
            (1, 1040, 128),
            (4, 128, 64),
            (256, 1, 16),
            (1, 66_000, 0),
            *((1, 2, heads) for heads in HEADS),
        )
    ]
