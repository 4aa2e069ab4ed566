"""Hypothesis strategies of cases of ``prefill``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.strategies.decode import with_options
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    MANY_SEQUENCES,
    PREFILL_REGIMES,
    SEEDS,
    between,
    choice,
    cycled,
    judgeable_stds,
    large_size,
    long_enough,
    near,
    several,
    supported,
)
from mla_spec.subjects.supports import Supports

PREFILL_SIZES = ("heads", "batch", "keys", "queries", "published")


def _few(draw: DrawFn, least: int, most: int) -> int:
    """A small number, or one near a multiple of 16."""
    number: int = near(draw, 16, 1, 2) if draw(between(0, 1)) else draw(between(least, most))
    return number


def _dims(draw: DrawFn, supports: Supports, *, published: bool) -> tuple[int, int]:
    """Widths of QK and of V."""
    dims = supports.prefill_dims
    if dims is None and published:
        return 192, 128
    if dims is None and draw(between(0, 1)):
        dims = ((192, 128), (40, 40), (24, 48), (32, 256))
    if dims is not None:
        chosen: tuple[int, int] = draw(choice(*dims))
        return chosen
    return draw(between(1, 24)), draw(between(1, 16))


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
    self_attention: bool = False,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
    sizes: tuple[str, ...] = PREFILL_SIZES,
    sinks: tuple[str, ...] = ("none",),
    windows: tuple[int, ...] = (0,),
) -> PrefillCase:
    """Packed sequences of unequal lengths, some of them empty; V narrower than, as wide as, and wider than QK.

    A quarter of the cases has many heads or sequences, or one sequence of many queries or keys, and an eighth the heads and
    widths of DeepSeek-V3; ``sizes`` says which may be. ``min_past`` is the least number of keys before a sequence's first
    query; None allows fewer keys than queries. ``sinks`` and ``windows`` are those of ``draw_decode``. ``self_attention``: as
    many keys as queries. Where the subject has no rule for rows without keys, none occur.
    """
    is_causal = draw(choice(*(c for c in supports.causal if causal is None or c == causal)))
    queries = several(draw, lambda: _few(draw, min_queries, 9), min_batch, max(min_batch, 4))
    size = large_size(draw, sizes)
    published = size == "published"
    if size == "batch":
        few = several(draw, lambda: draw(between(min_queries, 4)), 5, 5)
        queries = cycled(few, draw(choice(*MANY_SEQUENCES)))
    elif size == "queries":
        queries[draw(between(0, len(queries) - 1))] = draw(choice(65, 129, 257))
    elif published:
        queries = [draw(between(min_queries, 5)) for _ in queries[: max(min_batch, 2)]]
    if not any(queries):
        queries[-1] = 1
    pasts = several(draw, lambda: _few(draw, -3 if min_past is None else min_past, 12), 7, 7)
    pasts = cycled(pasts, len(queries))
    if size == "keys":
        pasts[draw(between(0, len(pasts) - 1))] = draw(choice(65, 128, 150))
    if profile.coarse:
        pasts = [long_enough(n, 1, profile) for n in pasts]
    keys = [max(0, n + more) for n, more in zip(queries, pasts, strict=True)]
    if self_attention:
        keys = list(queries)
    if supports.empty_row == "unsupported":
        keys = [max(t, n if is_causal else min(n, 1)) for n, t in zip(queries, keys, strict=True)]
    d, v = _dims(draw, supports, published=published)
    many = (16, 128) if published else MANY_HEADS[:1] + MANY_HEADS[2:5]
    case = PrefillCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=draw(choice(*supports.num_heads or (many if size in ("heads", "published") else HEADS))),
        qk_head_dim=d,
        v_head_dim=v,
        causal=is_causal,
        logit_std=draw(choice(*judgeable_stds(logit_stds, profile, d))),
        regime=draw(choice(*supported(PREFILL_REGIMES, supports, profile, v))),
    )
    chosen: PrefillCase = with_options(draw, case, sinks, windows)
    return chosen
