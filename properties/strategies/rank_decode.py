"""Hypothesis strategies of cases of ``rank_decode``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    PAGE_SIZES,
    PREFILL_REGIMES,
    SEEDS,
    between,
    choice,
    judgeable_stds,
    long_enough,
    several,
    supported,
)
from mla_spec.subjects.supports import Supports

INTERLEAVES = (1, 4, 16, 3, 64)


@st.composite
def rank_decode_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_s: int = 1,
    causal: bool | None = None,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
) -> RankDecodeCase:
    """Sequences of up to a few rounds of blocks, so that a rank has some whole blocks, a part of one, or nothing."""
    ranks = draw(between(1, 4))
    interleave = draw(choice(*(supports.interleaves or INTERLEAVES)))
    most = max(40, min(3 * ranks * interleave, 300))
    c, r = draw(choice(*(supports.latent_dims or ((24, 8), (16, 0), (1, 2), (32, 4), (7, 6)))))
    lengths = several(draw, lambda: draw(between(0, most)), min_batch, max(min_batch, 4))
    return RankDecodeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(long_enough(n, ranks, profile) if n else n for n in lengths),
        s=draw(between(min_s, max(min_s, min(4, supports.max_s or 4)))),
        ranks=ranks,
        rank=draw(between(0, ranks - 1)),
        interleave=interleave,
        num_heads=draw(choice(*supports.num_heads or HEADS)),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=draw(choice(*supports.page_sizes or PAGE_SIZES)),
        causal=draw(choice(*(value for value in supports.causal if causal is None or value == causal))),
        logit_std=draw(choice(*judgeable_stds(logit_stds, profile, c + r))),
        regime=draw(choice(*supported(PREFILL_REGIMES, supports, profile, c))),
    )
