"""Hypothesis strategies of cases of ``project_indexer``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.properties.strategies.rope import THETAS, scalings
from mla_spec.properties.strategies.sizes import SEEDS, among, between, choice, large_size, several
from mla_spec.subjects.supports import Supports


@st.composite
def project_indexer_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, rotated: bool = False, max_start: int = 8192
) -> ProjectIndexerCase:
    """All dims different; from no rotated dims to all; ``rotated``: some dims are, and not all.

    A quarter of the cases has many heads or tokens, or positions that are far.
    """
    size = large_size(draw, ("heads", "tokens", "positions"))
    if supports.indexer_dims is not None:
        h, d = draw(choice(*supports.indexer_dims))
    else:
        h, d = draw(choice(16, 64) if size == "heads" else choice(1, 2, 3, 5, 8)), 2 * draw(among(4, 12, 64))
    least, most = (1, d // 2 - 1) if rotated else (0 if supports.indexer_rope_optional else 1, d // 2)
    rope_dim = 2 * draw(among(least, most, max(1, d // 4)))
    start = draw(among(0, min(8192, max_start), *(p for p in (0, 1, 60, 4095) if p <= max_start)))
    if size == "positions" and max_start >= 8192 and profile.rope.angle in ("float32", "float64"):
        start = draw(choice(16382, 32766, 65534))
    lengths = between(1, 4) if size != "tokens" else choice(17, 33)
    return ProjectIndexerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(several(draw, lambda: draw(lengths), 1, 3)),
        hidden_size=draw(between(2, 16)),
        q_lora_rank=draw(between(1, 16)),
        index_n_heads=h,
        index_head_dim=d,
        rope_dim=rope_dim,
        layout=draw(choice(*supports.indexer_rope_layouts)),
        theta=draw(choice(*THETAS)),
        **(draw(scalings(supports)) if rope_dim else {}),
        start=start,
        k_norm_eps=supports.indexer_norm_eps or draw(choice(1e-6, 1e-5)),
        hidden_scale=draw(choice(1.0, 2.0**-10)),
    )
