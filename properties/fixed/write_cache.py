"""Fixed cases of ``write_cache``."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.fixed.counts import ELEMENTS, first_of, latent_dims, nearest, ordinary_page_size
from mla_spec.reference.formats import format_of
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
    """More tokens than 2^16, where rows are narrow, in pages of several sizes; blocks of tokens without slots."""
    c, r = latent_dims(supports)
    tokens = min(65_600, 2 * ELEMENTS // (c + r))
    shapes = ((64, tokens, 0), (32, tokens // 8, 0), (256, tokens // 8, 0), (64, 4 * 1024 + 5, 1024), (1, 300, 32))
    return [
        WriteCase(
            dtype=profile.dtype,
            tokens=count,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, size),
            skipped=0.01,
            skipped_run=run,
        )
        for size, count, run in shapes
    ]


WIDE_BYTES = 2**24
"""Of the rows of ``wide`` in formats of more than 16 bits."""


def wide(supports: Supports, profile: Profile) -> list[WriteCase]:
    """A page of the widest rows, to be written over and over: see ``times_wide``."""
    c, r = (512, 64) if supports.latent_dims is None else max(supports.latent_dims, key=sum)
    size = nearest(supports.page_sizes, 64)
    return [WriteCase(dtype=profile.dtype, tokens=size, kv_lora_rank=c, qk_rope_head_dim=r, page_size=size)]


def times_wide(case: WriteCase) -> int:
    """How often the tokens of such a case are written: 65,600 at least, or fewer in formats of more than 16 bits."""
    bits = format_of(case.dtype).bits
    row = (case.kv_lora_rank + case.qk_rope_head_dim) * bits // 8
    return -(-65_600 // case.tokens) if bits <= 16 else max(1, WIDE_BYTES // row // case.tokens)
