"""Fixed cases of ``sparse_decode``: the selections of ``sparse_prefill``, from the slots of a pool."""

from __future__ import annotations

from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.sparse import SparseDecodeCase
from mla_spec.properties.fixed.counts import HEADS, nearest, ordinary_page_size
from mla_spec.properties.fixed.sparse_prefill import (
    TILES,
    crossed_selections,
    elementary_selections,
    many_indices,
    narrow_selection,
    ordinary_selection,
)
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """More slots than are selected, entries that select nothing, a sink and lengths."""
    size, s = ordinary_page_size(supports), min(2, supports.max_s or 2)
    return [
        SparseDecodeCase(batch=3, s=s, pages=3 + 50 // size, page_size=size, **ordinary_selection(supports, profile))
    ]


def elementary(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """See ``elementary_selections``."""
    (base,) = ordinary(supports, profile)
    cases: list[SparseDecodeCase] = elementary_selections(base, supports)
    return cases


def _narrow(
    supports: Supports,
    profile: Profile,
    b: int,
    s: int,
    slots: int,
    page_size: int,
    topk: int,
    heads: int,
    **options: Any,
) -> SparseDecodeCase:
    """With the narrowest rows, and of each number the nearest that the subject takes."""
    size = nearest(supports.page_sizes, page_size)
    fields = narrow_selection(supports, profile, topk, heads, **options)
    return SparseDecodeCase(batch=b, s=min(s, supports.max_s or s), pages=-(-slots // size), page_size=size, **fields)


def rare(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """Rows of indices whose first tile selects nothing."""
    return [
        _narrow(supports, profile, 4, 2, 2 * many_indices(supports, topk), 64, topk, 3, invalid=0.3) for topk in TILES
    ]


COUNTS = (
    # sequences, queries, slots, page size, indices, heads, seed
    *((2, 1 + i % 2, 70, 32, 20, heads, i) for i, heads in enumerate(HEADS)),
    (200, 3, 200, 64, 12, 2, 0),
    (2, 8, 600, 256, 12, 64, 1),
    (2, 1, 4161, 64, 576, 2, 0),
    (2, 1, 4161, 64, 2048, 2, 1),
)


def counts(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """Many sequences, each with a length of its own; many heads and queries; 2048 indices of more slots."""
    return [
        _narrow(supports, profile, *numbers, seed=seed, invalid=0.3 * (seed % 2), with_length=numbers[0] > 2)
        for *numbers, seed in COUNTS
    ]


def crossed(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """Selections that cross numbers, with several queries of several sequences; many sequences with many indices."""
    many = (130, 2, {"with_length": True, "seed": 5})
    return [
        _narrow(
            supports, profile, 70 if wanted is many else 4, 2, 2 * wanted[0] + 65, 64, wanted[0], wanted[1], **wanted[2]
        )
        for wanted in (*crossed_selections(supports), many)
    ]
