"""Hypothesis strategies of cases of ``write_cache``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.strategies.sizes import PAGE_SIZES, SEEDS
from mla_spec.subjects.supports import Supports


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
