"""Fixed cases of ``project_indexer``."""

from __future__ import annotations

from dataclasses import replace

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


def counts(supports: Supports, profile: Profile) -> list[ProjectIndexerCase]:
    """More than 1024 tokens, of so many heads that there are 65536 pairs; hidden states and query latents as wide as published."""
    (base,) = ordinary(supports, profile)
    h, d = (64, 8) if supports.indexer_dims is None else max(supports.indexer_dims)
    narrow = replace(base, hidden_size=4, q_lora_rank=4, index_n_heads=h, index_head_dim=d, rope_dim=d // 4 * 2)
    return [
        replace(narrow, seqlens=(3, 1100)),
        replace(base, seqlens=(2, 1), hidden_size=7168),
        replace(base, seqlens=(2, 1), q_lora_rank=1536),
    ]
