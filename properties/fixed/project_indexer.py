"""Fixed cases of ``project_indexer``."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.properties.fixed.counts import first_of
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[ProjectIndexerCase]:
    """Three packed sequences, of which some dims are rotated."""
    h, d = first_of(supports.indexer_dims, (3, 16))
    return [
        ProjectIndexerCase(
            dtype=profile.dtype,
            seqlens=(3, 7, 2),
            hidden_size=24,
            q_lora_rank=12,
            index_n_heads=h,
            index_head_dim=d,
            rope_dim=d // 4 * 2,
            layout=supports.indexer_rope_layouts[0],
            start=5,
            k_norm_eps=supports.indexer_norm_eps or 1e-6,
        )
    ]
