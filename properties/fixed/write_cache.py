"""Fixed cases of ``write_cache``."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.fixed.counts import ELEMENTS, first_of, latent_dims, nearest, ordinary_page_size
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[WriteCase]:
    """More tokens than two pages hold, some without a slot."""
    c, r = first_of(supports.latent_dims, (24, 8))
    size = ordinary_page_size(supports)
    return [
        WriteCase(
            dtype=profile.dtype, tokens=2 * size + 5, kv_lora_rank=c, qk_rope_head_dim=r, page_size=size, skipped=0.2
        )
    ]


def counts(supports: Supports, profile: Profile) -> list[WriteCase]:
    """More tokens than 2^16, where rows are narrow, in pages of several sizes."""
    c, r = latent_dims(supports)
    tokens = min(65_600, 2 * ELEMENTS // (c + r))
    return [
        WriteCase(
            dtype=profile.dtype,
            tokens=tokens // count,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, size),
            skipped=0.01,
        )
        for size, count in ((64, 1), (32, 8), (256, 8))
    ]
