"""Hypothesis strategies of cases: structure and seeds are drawn here, values come from the seeded generator.

Every strategy takes what the subject supports and its profile, so that it draws only what the subject can be given and
cases whose bound means something in that profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.rope import LONGROPE, YARN, RopeCase
from mla_spec.operations.write_cache import WriteCase
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

SEEDS = st.integers(0, 2**32 - 1)
THETAS = (10000.0, 50000.0, 1000000.0, 500.0)
PAGE_SIZES = (1, 2, 3, 16, 64, 7, 128)
HEADS = (1, 2, 3, 4, 5, 8, 16, 20)
MANY_HEADS = (72, 128)
"""More than a tile of 64, and in the first no whole number of tiles."""

MANY_SEQUENCES = (9, 17, 33, 65)
DECODE_SIZES = ("heads", "batch", "keys", "queries")
PREFILL_SIZES = ("heads", "batch", "keys", "queries")
DECODE_REGIMES = ("typical", "outlier", "ties", "offset", "sink", "cancelling")
LOGIT_STDS = (1.0, 4.0, 0.1, 16.0, 64.0, 0.01, 256.0, 1e3, 1e4, 1e5)
"""The last puts whole rows of scores beyond -5e4, which some kernels use for -inf."""

LSE_MEANS = (0.0, 5.0, -5.0, 200.0, -200.0, -51000.0, 51000.0)
"""exp(200) is beyond float32, and some kernels use -5e4 for -inf."""


def large_size(draw: DrawFn, sizes: tuple[str, ...]) -> str:
    """Which of a case's sizes is beyond the tiles, and the thresholds between kernels, that most have; "" in three of four."""
    return draw(st.sampled_from(("",) * max(1, 3 * len(sizes)) + sizes))


def cycled(items: list[int], count: int) -> list[int]:
    """``count`` items: the same over and over. Of five items none comes again after a power of two."""
    return [items[i % len(items)] for i in range(count)]


def layouts(supports: Supports) -> SearchStrategy[str]:
    """Layouts of the rotated pairs."""
    return st.sampled_from(supports.rope_layouts)


def scalings(supports: Supports) -> SearchStrategy[dict[str, str]]:
    """The field of a case that names its YaRN or LongRoPE scaling, or none."""
    yarns = list(YARN) if supports.yarn else ["none"]
    if supports.yarn_mscale_rule == "equal":
        yarns = [name for name in yarns if (y := YARN[name]) is None or y.mscale == y.mscale_all_dim]
    longropes = [name for name in LONGROPE if name != "none"] if supports.longrope else []
    return st.sampled_from([*({"yarn": name} for name in yarns), *({"longrope": name} for name in longropes)])


def judgeable_stds(logit_stds: tuple[float, ...], profile: Profile, head_dim: int) -> tuple[float, ...]:
    """Those that leave the scores an error below about 0.4, and so the bound a meaning."""
    rounding = profile.score_roundings * format_of(profile.score_format).unit_roundoff
    gamma = profile.score.relative_error(head_dim + profile.operand_roundings)
    return tuple(std for std in logit_stds if std <= 64 or std * (head_dim**0.5 * gamma + rounding) < 0.4)


@st.composite
def rope_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RopeCase:
    """Vectors with and without a head axis, all layouts and scalings, positions up to 163,840."""
    dim = 2 * draw(st.integers(1, 8) | st.just(32))
    size = large_size(draw, ("heads", "tokens", "positions"))
    starts = st.sampled_from((0, 1, 60, 63, 64, 1023, 4095, 4096)) | st.integers(0, 8192)
    if size == "positions" and profile.rope.angle in ("float32", "float64"):
        starts = st.sampled_from((16383, 32767, 65535, 131071, 163700))
        dim = draw(st.sampled_from((16, 24, 64)))  # most pairs turn slowly: the angle of the first is off by 0.1 rad
    return RopeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(st.integers(1, 3)),
        s=draw(st.sampled_from((33, 65, 129)) if size == "tokens" else st.integers(1, 5)),
        heads=draw(st.sampled_from(MANY_HEADS) if size == "heads" else st.integers(0, 3)),
        dim=dim,
        layout=draw(layouts(supports)),
        theta=draw(st.sampled_from(THETAS)),
        **draw(scalings(supports)),
        start=draw(starts),
        stride=draw(st.sampled_from((1, 2, 17))),
        shift=draw(st.integers(1, 4096)),
    )


@st.composite
def decode_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_s: int = 1,
    max_s: int = 8,
    min_length: int = 0,
    min_batch: int = 1,
    min_rope: int = 0,
    causal: bool | None = None,
    regimes: tuple[str, ...] = DECODE_REGIMES,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
    sizes: tuple[str, ...] = DECODE_SIZES,
) -> DecodeCase:
    """Ragged batches over shuffled pages; lengths around boundaries of pages and of tiles of 16 keys.

    A quarter of the cases has many heads, sequences or queries, or one sequence of some hundred keys; ``sizes`` says which may be.
    Keywords narrow what is drawn, for laws that need, say, two queries. Where the subject has no rule for rows without
    keys, none occur.
    """
    size = large_size(draw, sizes)
    page_size = draw(st.sampled_from(supports.page_sizes or PAGE_SIZES))
    most = min(max_s, supports.max_s or max_s)
    s = draw(st.integers(5, 8) if size == "queries" and most == 8 else st.integers(min_s, max(min_s, min(most, 4))))
    is_causal = draw(st.sampled_from([c for c in supports.causal if causal is None or c == causal]))
    shortest = min_length
    if supports.empty_row == "unsupported":
        shortest = max(shortest, s if is_causal else 1)
    around_pages = st.builds(
        lambda pages, off: max(shortest, pages * page_size + off),
        st.integers(0, 3 if page_size < 32 else 1),
        st.integers(-1, 1),
    )
    around_tiles = st.builds(
        lambda tiles, off: max(shortest, 16 * tiles + off), st.integers(1, 4), st.integers(-1, max(1, s - 1))
    )
    lengths = st.integers(shortest, max(shortest, 40)) | around_pages | around_tiles
    if supports.latent_dims is not None:
        c, r = draw(st.sampled_from([dims for dims in supports.latent_dims if dims[1] >= min_rope]))
    else:
        c = draw(st.integers(1, 24) | st.sampled_from((32, 48, 512)))
        r = 2 * draw(st.integers(min_rope // 2, 6) | st.sampled_from((8, 32)))
    regime = draw(st.sampled_from(regimes))
    stds = [std for std in judgeable_stds(logit_stds, profile, c + r) if std <= 4 or regime != "cancelling"]
    seqlens = draw(st.lists(lengths, min_size=min_batch, max_size=max(min_batch, 4)))
    if size == "batch":
        few = draw(st.lists(st.integers(shortest, shortest + 8), min_size=5, max_size=5))
        counts = [n for n in MANY_SEQUENCES if n * page_size <= 1200]  # a sequence has a page at least
        seqlens = cycled(few, draw(st.sampled_from(counts)))
    elif size == "keys":
        seqlens[draw(st.integers(0, len(seqlens) - 1))] = draw(st.sampled_from((129, 192, 200, 255, 256, 257)))
    return DecodeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(seqlens),
        s=s,
        num_heads=draw(st.sampled_from(supports.num_heads or (MANY_HEADS if size == "heads" else HEADS))),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=page_size,
        causal=is_causal,
        logit_std=draw(st.sampled_from(stds)),
        regime=regime,
        qk_nope_head_dim=draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(1, 8)),
    )


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
        regime=draw(st.sampled_from(("typical", "outlier", "ties"))),
    )


@st.composite
def merge_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_parts: int = 1,
    min_empty: float = 0.0,
    lse_means: tuple[float, ...] = LSE_MEANS,
) -> MergeCase:
    """One part to many, with and without a batch axis; LSEs near each other, far apart, and beyond what exp can take.

    ``min_empty`` is the least share of rows without keys; none occur where the subject has no rule for them.
    """
    u = format_of(profile.softmax).unit_roundoff
    mean = draw(st.sampled_from([m for m in lse_means if abs(m) * u <= LSE_MEANS[-1] * 2.0**-24]))
    many = st.integers(min_parts, 6) | st.sampled_from((8, 17, 33))
    size = large_size(draw, ("parts", "heads", "queries", "batch"))
    if size == "parts":
        many = st.sampled_from((65, 129, 160))
    widths = st.integers(1, 24) | st.sampled_from((128, 512))
    empties = [share for share in (0.0, 0.3, 0.7, 1.0) if share >= min_empty]
    return MergeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        parts=draw(st.integers(min_parts, supports.max_parts) if supports.max_parts else many),
        batch=draw(st.sampled_from(MANY_SEQUENCES) if size == "batch" else st.integers(0, 3)),
        s=draw(st.sampled_from((9, 33, 65)) if size == "queries" else st.integers(1, 5)),
        num_heads=draw(st.sampled_from(supports.num_heads or (MANY_HEADS if size == "heads" else HEADS))),
        head_dim_v=draw(widths if size == "" else st.integers(1, 8)),
        lse_mean=mean,
        lse_std=draw(st.sampled_from((1.0, 4.0, 30.0, 0.01, 0.0, *([1000.0] if abs(mean) <= 200 else [])))),
        empty=0.0 if supports.empty_row == "unsupported" else draw(st.sampled_from(empties)),
    )


@st.composite
def write_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_tokens: int = 1, min_skipped: float = 0.0
) -> WriteCase:
    """New tokens for a pool of any page size; ``min_skipped`` is the least share of tokens with slot -1."""
    c, r = draw(
        st.sampled_from(supports.latent_dims)
        if supports.latent_dims is not None
        else st.tuples(st.integers(1, 24), st.integers(0, 6).map(lambda half: 2 * half))
        | st.sampled_from([(32, 16), (48, 8), (512, 64)])
    )
    return WriteCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        tokens=draw(st.integers(min_tokens, 20) | st.sampled_from((63, 64, 129, 300))),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=draw(st.sampled_from(supports.page_sizes or PAGE_SIZES)),
        skipped=draw(st.sampled_from([share for share in (0.0, 0.3, 1.0) if share >= min_skipped])),
    )


def narrowed(strategy: Callable[..., SearchStrategy[Any]], **keywords: Any) -> Callable[..., SearchStrategy[Any]]:
    """``strategy`` with keywords given, as ``law(cases=...)`` takes it."""
    return lambda supports, profile: strategy(supports, profile, **keywords)
