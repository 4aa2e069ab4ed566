"""Hypothesis strategies of cases of ``prefill``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    MANY_SEQUENCES,
    PREFILL_REGIMES,
    SEEDS,
    cycled,
    judgeable_stds,
    large_size,
    supported,
)
from mla_spec.subjects.supports import Supports

PREFILL_SIZES = ("heads", "batch", "keys", "queries")


@st.composite
def prefill_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_past: int | None = None,
    min_queries: int = 0,
    causal: bool | None = None,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
    sizes: tuple[str, ...] = PREFILL_SIZES,
) -> PrefillCase:
    """Packed sequences of unequal lengths, some of them empty; V narrower than, as wide as, and wider than QK.

    A quarter of the cases has many heads or sequences, or one sequence of many queries or keys; ``sizes`` says which may be.
    ``min_past`` is the least number of keys before a sequence's first query; None allows fewer keys than queries. Where the
    subject has no rule for rows without keys, none occur.
    """
    is_causal = draw(st.sampled_from([c for c in supports.causal if causal is None or c == causal]))
    around_tiles = st.builds(lambda tiles, off: 16 * tiles + off, st.integers(1, 2), st.integers(-1, 1))
    queries = draw(
        st.lists(st.integers(min_queries, 9) | around_tiles, min_size=min_batch, max_size=max(min_batch, 4)).filter(any)
    )
    past = st.integers(-3 if min_past is None else min_past, 12) | around_tiles
    size = large_size(draw, sizes)
    if size == "batch":
        few = draw(st.lists(st.integers(min_queries, 4), min_size=5, max_size=5).filter(any))
        queries = cycled(few, draw(st.sampled_from(MANY_SEQUENCES[:3])))
    elif size == "queries":
        queries[draw(st.integers(0, len(queries) - 1))] = draw(st.sampled_from((65, 129, 257)))
    pasts = cycled(draw(st.lists(past, min_size=7, max_size=7)), len(queries))
    if size == "keys":
        pasts[draw(st.integers(0, len(pasts) - 1))] = draw(st.sampled_from((65, 128, 150)))
    keys = [max(0, n + more) for n, more in zip(queries, pasts, strict=True)]
    if supports.empty_row == "unsupported":
        keys = [max(t, n if is_causal else min(n, 1)) for n, t in zip(queries, keys, strict=True)]
    d, v = draw(
        st.sampled_from(supports.prefill_dims)
        if supports.prefill_dims is not None
        else st.tuples(st.integers(1, 24), st.integers(1, 16))
        | st.sampled_from([(192, 128), (40, 40), (24, 48), (32, 256)])
    )
    return PrefillCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=draw(st.sampled_from(supports.num_heads or (MANY_HEADS[:1] if size == "heads" else HEADS))),
        qk_head_dim=d,
        v_head_dim=v,
        causal=is_causal,
        logit_std=draw(st.sampled_from(judgeable_stds(logit_stds, profile, d))),
        regime=draw(st.sampled_from(supported(PREFILL_REGIMES, supports))),
    )
