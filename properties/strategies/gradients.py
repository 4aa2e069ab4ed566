"""Hypothesis strategies of cases of gradients, drawn so that the gradients stand out from their worst-case bound.

A row with one key has gradients of q and k that are exactly 0 but no bound that is, and in formats of 16 bits so has, nearly,
a sum whose terms cancel. So some sequence of each case has several keys for each of its queries, and no other is longer.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.gradients import PrefillBackwardCase, SparseBackwardCase
from mla_spec.operations.merge_gradients import MergeBackwardCase, RingCase
from mla_spec.operations.rope_gradients import RopeBackwardCase
from mla_spec.properties.fixed.counts import ELEMENTS, most_keys, nearest, prefill_dims
from mla_spec.properties.fixed.rope import counts as rope_counts
from mla_spec.properties.fixed.sparse_prefill import narrow_selection
from mla_spec.properties.strategies.merge import merge_cases
from mla_spec.properties.strategies.rope import options, rope_cases
from mla_spec.properties.strategies.sizes import SEEDS, between, choice, large_size, several, supported
from mla_spec.properties.strategies.sparse import draw_sparse_prefill
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

ALIGNED_STDS = (0.25, 0.1)
"""Of the logits where keys are two opposite rows, which a large one would leave to one of them."""


def judgeable_regimes(supports: Supports, profile: Profile, width: int) -> tuple[str, ...]:
    """Those in which the profile's roundings leave the bound a meaning, for rows of ``width`` elements."""
    if min(format_of(name).bits for name in (profile.probabilities, profile.score_format)) <= 16:
        return ("aligned",)
    if format_of(profile.dtype).bits <= 16:
        return ("aligned", "outlier") if width <= 24 else ("aligned",)
    regimes: tuple[str, ...] = supported(("aligned", "outlier", "typical", "negative"), supports, profile)
    return regimes


def draw_prefill_backward(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_queries: int = 0,
    causal: bool | None = None,
    few_keys: bool = False,
) -> PrefillBackwardCase:
    """Packed sequences, some of them empty; ``few_keys``: some have queries and no key, or keys and no query.

    In formats of more than 16 bits a quarter of the cases has one sequence of many queries or keys.
    """
    is_causal = draw(choice(*(c for c in supports.causal if causal is None or c == causal)))
    queries = several(draw, lambda: draw(between(min_queries, 6)), min_batch, 3)
    if not any(queries):
        queries[-1] = 1
    past = between(-3 if supports.empty_row != "unsupported" else 0, 12)
    keys = [max(0, n + draw(past)) for n in queries]
    longest = queries.index(max(queries))
    size = large_size(draw, ("queries", "keys") if format_of(profile.dtype).bits > 16 else ())
    if size == "queries":
        queries[longest] = draw(choice(17, 33, 66))
    keys[longest] = queries[longest] + draw(choice(64, 70) if size == "keys" else between(2, 12))
    if few_keys:
        empty = [(draw(between(1, 4)), 0)] if supports.empty_row != "unsupported" else []
        for pair in (*empty, (0, draw(between(1, 4)))):
            at = draw(between(0, len(queries)))
            queries[at:at], keys[at:at] = [pair[0]], [pair[1]]
    if supports.prefill_dims is not None:
        d, v = draw(choice(*supports.prefill_dims))
    elif draw(between(0, 1)):
        d, v = draw(choice((192, 128), (40, 40), (24, 48)))
    else:
        d, v = draw(between(1, 24)), draw(between(1, 16))
    heads = draw(choice(*supports.num_heads or (1, 2, 3, 4, 8, 20)))
    regime = draw(choice(*judgeable_regimes(supports, profile, max(d, v))))
    return PrefillBackwardCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=heads,
        qk_head_dim=d,
        v_head_dim=v,
        causal=is_causal,
        logit_std=draw(choice(*_stds(regime, profile, heads * max(queries)))),
        regime=regime,
    )


@st.composite
def prefill_backward_cases(
    draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any
) -> PrefillBackwardCase:
    """What ``draw_prefill_backward`` draws."""
    return draw_prefill_backward(draw, supports, profile, **keywords)


def _stds(regime: str, profile: Profile, rows: int) -> tuple[float, ...]:
    """Standard deviations of logits that leave weight to several keys in one of ``rows`` rows at least."""
    if regime == "aligned":
        return ALIGNED_STDS
    return (1.0, 0.1, 4.0) if rows >= 16 and format_of(profile.dtype).bits > 16 else (1.0, 0.1)


MANY = (
    # queries, keys, heads
    ((3,) * 20, (9, 20, 5, 12) * 5, 2),
    ((4, 2), (20, 9), 48),
    ((140, 3), (300, 5), 1),
    ((3, 2), (600, 70), 1),
    ((2, 3), (20, 9), 112),
    ((3,), (9,), 128),
    ((1, 2) * 50, (9, 20, 5, 12) * 25, 1),
)
LONG = 4161
"""Keys of one sequence, at most."""


def many_backward(supports: Supports, profile: Profile) -> list[PrefillBackwardCase]:
    """Many sequences, heads, queries and keys, one number at a time, in rows as narrow as the subject takes."""
    d, v = prefill_dims(supports)
    regimes = judgeable_regimes(supports, profile, max(d, v))
    # The gradient of a query cancels between keys. The errors of thousands of typical ones would hide it, and those of a rough exp
    # in each tile hide it sooner than an output.
    shapes = [(shape, "typical" if "typical" in regimes else "aligned") for shape in MANY]
    shapes.append((((2, 1), (min(LONG, most_keys(profile) // 5), 5), 1), "aligned"))
    return [
        PrefillBackwardCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=keys,
            num_heads=nearest(supports.num_heads, heads),
            qk_head_dim=d,
            v_head_dim=v,
            causal=max(supports.causal),
            logit_std=1.0 if regime == "typical" else min(ALIGNED_STDS),
            regime=regime,
        )
        for seed, ((queries, keys, heads), regime) in enumerate(shapes)
        if (sum(queries) + sum(keys)) * nearest(supports.num_heads, heads) * (d + v) <= ELEMENTS
    ]


def exact_many_backward(supports: Supports, profile: Profile) -> list[PrefillBackwardCase]:
    """Hundreds of queries, all of which see the same few keys: what is summed over them has more bits than 16."""
    if format_of(profile.probabilities).bits <= 16 or False not in supports.causal:
        return []
    d, v = supports.prefill_dims[0] if supports.prefill_dims else (8, 4)
    heads = nearest(supports.num_heads, 2)
    return [
        PrefillBackwardCase(
            dtype=profile.dtype,
            seqlens_q=(520,),
            seqlens_k=(8,),
            num_heads=heads,
            qk_head_dim=d,
            v_head_dim=v,
            causal=False,
            regime="exact",
        )
    ]


MANY_SPARSE = (
    # queries, keys, indices, heads
    (2, 40, 8, 112),
    (2, 40, 8, 128),
    (520, 600, 8, 1),
    (2, 4161, 1100, 1),
)


def many_sparse_backward(supports: Supports, profile: Profile) -> list[SparseBackwardCase]:
    """Many heads, queries and indices, one number at a time, in rows as narrow as the subject takes."""
    cases = []
    for seed, (s_q, s_kv, topk, heads) in enumerate(MANY_SPARSE):
        fields = narrow_selection(
            supports, profile, topk, heads, seed=seed, regime="aligned", logit_std=min(ALIGNED_STDS)
        )
        width = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
        if s_q * fields["topk"] * fields["num_heads"] * width <= ELEMENTS:
            cases.append(SparseBackwardCase(s_q=s_q, s_kv=max(s_kv, 2 * fields["topk"]), **fields))
    return cases


@st.composite
def exact_backward_cases(draw: DrawFn, supports: Supports, profile: Profile) -> PrefillBackwardCase:
    """Sequences with 2^n keys that all queries see: without the causal mask, or with one query.

    Where P may be rounded to 16 bits, and out with it by as much as dP differs from D, as ``draw_prefill_backward``.
    """
    if format_of(profile.probabilities).bits <= 16:
        return draw_prefill_backward(draw, supports, profile)
    is_causal = draw(choice(*supports.causal))
    queries = several(draw, lambda: draw(between(1, 1 if is_causal else 4)), 1, 3)
    dims = supports.prefill_dims or tuple((d, v) for d in (2, 8, 12) for v in (3, 4, 7))
    d, v = draw(choice(*dims))
    return PrefillBackwardCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(draw(choice(8, 16, 32)) for _ in queries),
        num_heads=draw(choice(*supports.num_heads or (1, 2, 3))),
        qk_head_dim=d,
        v_head_dim=v,
        causal=is_causal,
        regime="exact",
    )


@st.composite
def sparse_backward_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> SparseBackwardCase:
    """As ``draw_sparse_prefill`` but of moderate size, for the dense sums; few occurrences of each key in 16 bits."""
    case = draw_sparse_prefill(draw, supports, profile, **{"min_queries": 2, "min_topk": 4} | keywords)
    c = case.kv_lora_rank if supports.latent_dims is not None else min(case.kv_lora_rank, 128)
    narrow = format_of(profile.dtype).bits <= 16
    regimes = ("aligned",) if narrow or c > 24 else judgeable_regimes(supports, profile, c)
    regime = draw(choice(*regimes))
    changes = {
        "s_q": min(case.s_q, 3) if c > 24 else case.s_q,
        "num_heads": case.num_heads if supports.num_heads is not None else min(case.num_heads, 4),
        "kv_lora_rank": c,
        "regime": regime,
        # an outlier of the latent is one of the keys, too: larger logits leave all weight to one of them
        "logit_std": 0.1 if regime == "outlier" else draw(choice(*_stds(regime, profile, 1))),
        "s_kv": max(case.s_kv, 2 * case.topk if narrow else 4),
    }
    return SparseBackwardCase(**vars(case) | changes)


@st.composite
def rope_backward_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RopeBackwardCase:
    """As ``rope_cases``."""
    return RopeBackwardCase(**vars(draw(rope_cases(supports, profile))))


def rope_backward_fixed(supports: Supports, profile: Profile) -> list[RopeBackwardCase]:
    """As for ``rope``: every scaling in each layout, and the numbers of production."""
    forward = [*options(supports, profile), *rope_counts(supports, profile)]
    return [RopeBackwardCase(**vars(case)) for case in forward]


LSE_MEANS = (0.0, 5.0, -5.0, 200.0, -200.0)
"""Of parts to merge: near 1e5 the exponents' rounding alone exceeds what gradients of the LSEs differ by."""


@st.composite
def merge_backward_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> MergeBackwardCase:
    """As ``merge_cases``."""
    case = draw(merge_cases(supports, profile, **{"lse_means": LSE_MEANS} | keywords))
    return MergeBackwardCase(**vars(case))


@st.composite
def ring_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RingCase:
    """As ``prefill_backward_cases``, in parts, whose errors add up: no peaked scores; aligned in 16 bits, and in float32 where rows are wide."""
    case = draw_prefill_backward(draw, supports, profile)
    bits, wide = format_of(profile.dtype).bits, max(case.qk_head_dim, case.v_head_dim) > 24
    aligned = bits <= 16 or (bits <= 32 and wide)
    changes = {
        "parts": draw(between(2, min(3, supports.max_parts or 3))),
        "regime": "aligned" if aligned else case.regime,
        "logit_std": min(case.logit_std, ALIGNED_STDS[0] if aligned else 1.0),
    }
    return RingCase(**vars(case) | changes)
