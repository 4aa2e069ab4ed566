"""Fixed cases of ``sparse_prefill``, and of selections of both sparse operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.sparse import SparsePrefillCase
from mla_spec.properties.fixed.counts import ELEMENTS, HEADS, first_of, latent_dims, nearest, takes_empty_rows
from mla_spec.subjects.supports import Supports


def many_indices(supports: Supports, wanted: int) -> int:
    """``wanted`` indices, or the next number of them that the subject takes."""
    return -(-wanted // supports.topk_multiple) * supports.topk_multiple


def ordinary_selection(supports: Supports, profile: Profile) -> dict[str, Any]:
    """Fields of an ordinary case: indices of which some select nothing, a sink and lengths."""
    c, r = first_of(supports.latent_dims, (24, 8))
    return {
        "dtype": profile.dtype,
        "num_heads": first_of(supports.num_heads, 3),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": many_indices(supports, 20),
        "invalid": 0.3,
        "with_length": supports.topk_length,
        "sink": "finite" if supports.attention_sink else "none",
    }


def ordinary(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """More keys than are selected, entries that select nothing, a sink and lengths."""
    return [SparsePrefillCase(s_q=5, s_kv=70, **ordinary_selection(supports, profile))]


def elementary_selections(base: Any, supports: Supports) -> list[Any]:
    """One index; rows that select nothing; rows whose first tile does; more indices than keys."""
    one = many_indices(supports, 1)
    plain = replace(base, sink="none", with_length=False)
    cases = [replace(plain, topk=one, num_heads=nearest(supports.num_heads, 1))]
    if takes_empty_rows(supports):
        cases.append(replace(plain, topk=one, invalid=1.0, empty_rows=True))
    return [*cases, replace(plain, seed=1, topk=many_indices(supports, 33), invalid=0.9), base]


def elementary(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """See ``elementary_selections``."""
    (base,) = ordinary(supports, profile)
    return elementary_selections(base, supports)


def narrow_selection(supports: Supports, profile: Profile, topk: int, heads: int, **options: Any) -> dict[str, Any]:
    """Fields of a case with the narrowest rows, and the nearest numbers of heads and indices that the subject takes."""
    c, r = latent_dims(supports)
    if not supports.topk_length:
        options.pop("with_length", None)
    return {
        "dtype": profile.dtype,
        "num_heads": nearest(supports.num_heads, heads),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": many_indices(supports, topk),
        **options,
    }


TILES = (33, 144)
"""Numbers of indices of which the first tile, of 16 or 64, can be empty."""


def rare(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Rows of indices whose first tile selects nothing."""
    return [
        SparsePrefillCase(
            s_q=8,
            s_kv=2 * many_indices(supports, topk),
            **narrow_selection(supports, profile, topk, 3, invalid=0.3),
        )
        for topk in TILES
    ]


def counts(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Many heads; many queries, each with a length of its own; 2048 indices of more keys."""

    def case(s_q: int, s_kv: int, topk: int, heads: int, seed: int, **options: Any) -> SparsePrefillCase:
        fields = narrow_selection(supports, profile, topk, heads, seed=seed, invalid=0.3 * (seed % 2), **options)
        return SparsePrefillCase(s_q=s_q, s_kv=s_kv, **fields)

    elements = many_indices(supports, 8) * sum(latent_dims(supports))
    return [
        *(case(2, 70, 20, heads, seed) for seed, heads in enumerate(HEADS)),
        case(min(2100, ELEMENTS // elements), 70, 8, 32, 0, with_length=True),
        *(case(2, 4161, topk, 2, seed) for seed, topk in enumerate((320, 576, 2048))),
    ]


CROSSED: tuple[tuple[int, int, dict[str, Any]], ...] = (
    # indices, heads, what else
    (2048, 2, {"invalid": 0.97}),  # holes as long as a tile
    (576, 2, {"with_length": True, "seed": 1}),
    (320, 128, {"seed": 2}),
    (1300, 2, {"duplicates": True, "seed": 3}),
)


def crossed_selections(supports: Supports) -> list[tuple[int, int, dict[str, Any]]]:
    """Numbers of indices and heads, and what else: many heads, holes, lengths and repetitions; a sink, where one is taken."""
    return [*CROSSED, *([(1100, 80, {"sink": "finite", "seed": 4})] if supports.attention_sink else [])]


def crossed(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Many heads, holes, lengths and repetitions among hundreds of indices; a sink beside them; a few of more than 2^17 rows."""
    cases = [
        SparsePrefillCase(s_q=4, s_kv=2 * topk + 65, **narrow_selection(supports, profile, topk, heads, **options))
        for topk, heads, options in crossed_selections(supports)
    ]
    return [*cases, SparsePrefillCase(s_q=3, s_kv=131_200, **narrow_selection(supports, profile, 64, 2))]
