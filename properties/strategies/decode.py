"""Hypothesis strategies of cases of ``decode``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    MANY_SEQUENCES,
    PAGE_SIZES,
    SEEDS,
    cycled,
    judgeable_stds,
    large_size,
    supported,
)
from mla_spec.subjects.supports import Supports

DECODE_SIZES = ("heads", "batch", "keys", "queries")


DECODE_REGIMES = ("typical", "outlier", "ties", "offset", "sink", "cancelling", "negative")


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
    regime = draw(st.sampled_from(supported(regimes, supports)))
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
