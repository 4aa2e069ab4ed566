"""Fixed cases of ``merge``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.merge import MergeCase
from mla_spec.properties.fixed.counts import first_of, nearest, takes_empty_rows
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Parts of three sequences, some of them empty where they may be."""
    return [
        MergeCase(
            dtype=profile.dtype,
            parts=min(3, supports.max_parts or 3),
            batch=3,
            s=2,
            num_heads=first_of(supports.num_heads, 3),
            head_dim_v=24,
            empty=0.2 if takes_empty_rows(supports) else 0.0,
        )
    ]


def elementary(supports: Supports, profile: Profile) -> list[MergeCase]:
    """One part; parts of which all rows are empty, or some; LSEs far apart."""
    (base,) = ordinary(supports, profile)
    empty = [replace(base, empty=share, num_heads=nearest(supports.num_heads, 1)) for share in (1.0, 0.5)]
    return [replace(base, parts=1), *(empty if takes_empty_rows(supports) else []), replace(base, lse_std=30.0), base]


def empty_parts(supports: Supports, profile: Profile) -> list[MergeCase]:
    """The elementary ones with empty rows."""
    return [case for case in elementary(supports, profile) if case.empty and case.parts > 1]


def counts(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Many rows, of sequences, heads and queries, packed and not; wide ones; LSEs far below 0 and above."""

    def case(b: int, s: int, heads: int, v: int, **options: Any) -> MergeCase:
        parts, h = min(3, supports.max_parts or 3), nearest(supports.num_heads, heads)
        return MergeCase(dtype=profile.dtype, parts=parts, batch=b, s=s, num_heads=h, head_dim_v=v, **options)

    rows = ((256, 1, 3), (2, 8, 128), (96, 2, 24), (1, 1100, 2), (0, 1100, 3), (2, 1, 112))
    many = [case(b, s, heads, 3, seed=seed) for seed, (b, s, heads) in enumerate(rows)]
    wide = [case(2, 1, 2, v, seed=v) for v in (128, 160, 192, 512)]
    return [*many, *wide, *(case(3, 2, 2, 8, lse_mean=mean) for mean in (-1.1e5, 1.1e5))]


def crossed(supports: Supports, profile: Profile) -> list[MergeCase]:
    """More than 65535 rows."""
    return [
        MergeCase(
            dtype=profile.dtype,
            parts=2,
            batch=256,
            s=3,
            num_heads=nearest(supports.num_heads, 128),
            head_dim_v=2,
            empty=0.1 if takes_empty_rows(supports) else 0.0,
        )
    ]
