"""Hypothesis strategies of cases of ``project_indexer``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.properties.strategies.rope import THETAS, scalings
from mla_spec.properties.strategies.sizes import SEEDS, large_size
from mla_spec.subjects.supports import Supports


@st.composite
def project_indexer_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, rotated: bool = False, max_start: int = 8192
) -> ProjectIndexerCase:
    """All dims different; from no rotated dims to all; ``rotated``: some dims are, and not all.

    A quarter of the cases has many heads or tokens, or positions that are far.
    """
    size = large_size(draw, ("heads", "tokens", "positions"))
    wide = st.tuples(
        st.sampled_from((16, 64) if size == "heads" else (1, 2, 3, 5, 8)),
        st.integers(4, 12).map(lambda half: 2 * half) | st.just(128),
    )
    h, d = draw(st.sampled_from(supports.indexer_dims) if supports.indexer_dims is not None else wide)
    least, most = (1, d // 2 - 1) if rotated else (0 if supports.indexer_rope_optional else 1, d // 2)
    rope_dim = 2 * draw(st.integers(least, most) | st.just(max(1, d // 4)))
    start = st.sampled_from((0, 1, 60, 4095)) | st.integers(0, 8192)
    if size == "positions" and max_start >= 8192 and profile.rope.angle in ("float32", "float64"):
        start, max_start = st.sampled_from((16382, 32766, 65534)), 2**18
    lengths = st.integers(1, 4) if size != "tokens" else st.sampled_from((17, 33))
    return ProjectIndexerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(draw(st.lists(lengths, min_size=1, max_size=3))),
        hidden_size=draw(st.integers(2, 16)),
        q_lora_rank=draw(st.integers(1, 16)),
        index_n_heads=h,
        index_head_dim=d,
        rope_dim=rope_dim,
        layout=draw(st.sampled_from(supports.indexer_rope_layouts)),
        theta=draw(st.sampled_from(THETAS)),
        **(draw(scalings(supports)) if rope_dim else {}),
        start=draw(start.filter(lambda position: position <= max_start)),
        k_norm_eps=supports.indexer_norm_eps or draw(st.sampled_from((1e-6, 1e-5))),
        hidden_scale=draw(st.sampled_from((1.0, 2.0**-10))),
    )
