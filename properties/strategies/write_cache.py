"""Hypothesis strategies of cases of ``write_cache``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.strategies.sizes import PAGE_SIZES, SEEDS, among, between, choice
from mla_spec.subjects.supports import Supports


def _dims(draw: DrawFn, supports: Supports) -> tuple[int, int]:
    dims = supports.latent_dims
    if dims is None and draw(between(0, 1)):
        dims = ((32, 16), (48, 8), (512, 64))
    if dims is not None:
        chosen: tuple[int, int] = draw(choice(*dims))
        return chosen
    return draw(between(1, 24)), 2 * draw(between(0, 6))


@st.composite
def write_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_tokens: int = 1, min_skipped: float = 0.0
) -> WriteCase:
    """New tokens for a pool of any page size; ``min_skipped`` is the least share of tokens with slot -1."""
    c, r = _dims(draw, supports)
    return WriteCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        tokens=draw(among(min_tokens, 20, 63, 64, 129, 300)),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=draw(choice(*supports.page_sizes or PAGE_SIZES)),
        skipped=draw(choice(*(share for share in (0.0, 0.3, 1.0) if share >= min_skipped))),
    )
