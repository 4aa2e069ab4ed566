"""Hypothesis strategies of cases of ``merge``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.merge import MergeCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    MANY_HEADS,
    MANY_SEQUENCES,
    SEEDS,
    among,
    between,
    choice,
    large_size,
)
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

LSE_MEANS = (0.0, 5.0, -5.0, 200.0, -200.0, -51000.0, 51000.0)
"""exp(200) is beyond float32, and some kernels use -5e4 for -inf."""


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
    mean = draw(choice(*(m for m in lse_means if abs(m) * u <= LSE_MEANS[-1] * 2.0**-24)))
    many = among(min_parts, 6, 8, 17, 33)
    sizes: tuple[str, ...] = ("parts", "heads", "queries", "batch")
    ring = profile.merge_shares == "sigmoid"
    if ring:  # each part errs by what all before it do, so that many, or far ones, leave the bound no meaning
        mean, many, sizes = max(-200.0, min(200.0, mean)), among(min_parts, 6, 8, max(min_parts, 12)), sizes[1:]
    size = large_size(draw, sizes)
    if size == "parts":
        many = choice(65, 129, 160)
    empties = [share for share in (0.0, 0.3, 0.7, 1.0) if share >= min_empty]
    return MergeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        parts=draw(between(min_parts, supports.max_parts) if supports.max_parts else many),
        batch=draw(choice(*MANY_SEQUENCES) if size == "batch" else between(0, 3)),
        s=draw(choice(9, 33, 65) if size == "queries" else between(1, 5)),
        num_heads=draw(choice(*supports.num_heads or (MANY_HEADS if size == "heads" else HEADS))),
        head_dim_v=draw(among(1, 24, 128, 512) if size == "" else between(1, 8)),
        lse_mean=mean,
        lse_std=draw(choice(1.0, 4.0, 30.0, 0.01, 0.0, *([1000.0] if abs(mean) <= 200 and not ring else []))),
        empty=0.0 if supports.empty_row == "unsupported" else draw(choice(*empties)),
    )
