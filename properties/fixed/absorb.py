"""Fixed cases of ``absorb``: those of ``decode`` whose weights count."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.properties.fixed.counts import HEADS, latent_dims, nearest
from mla_spec.subjects.supports import Supports

DIMS = ((3, 5), (5, 5))
"""Of keys and values of a head, which differ and do not."""


def counts(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Every number of heads, and all rows of a published kv_b_proj."""
    c, r = latent_dims(supports)
    sizes = [(heads, *DIMS[i % 2]) for i, heads in enumerate(HEADS)]
    return [
        DecodeCase(
            dtype=profile.dtype,
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            qk_nope_head_dim=n,
            v_head_dim=v,
            page_size=nearest(supports.page_sizes, 1),
        )
        for heads, n, v in (*sizes, (128, 128, 128), (64, 192, 256))
    ]
