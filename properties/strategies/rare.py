"""Fixed cases of conditions that random ones meet too seldom. Laws begin with them, whatever number of examples is asked for."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.counts import latent_dims, nearest, prefill_dims
from mla_spec.properties.strategies.sizes import judgeable_stds, long_enough
from mla_spec.subjects.supports import Supports

SUNKEN_STDS = (1e4, 1e3, 256.0, 64.0)
"""Of logits that are all negative: the first puts whole rows below what some kernels take for -inf."""


def decode(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """All scores far below 0, and queries on both sides of a boundary of pages; and the first and the last page of a pool."""
    c, r = latent_dims(supports)
    s = min(4, supports.max_s or 4)
    # of rows so narrow one key has all the weight, and what rounds its score changes nothing
    sunken = judgeable_stds(SUNKEN_STDS, profile, c + r, "typical" if c + r <= 8 else "sunken")
    cases = []
    for size in sorted({nearest(supports.page_sizes, size) for size in (1, 16, 64)}):
        base = DecodeCase(
            dtype=profile.dtype,
            seqlens=(size + 1, 2 * size + 1, s, 3 * size + s - 1),
            s=s,
            num_heads=nearest(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=size,
            causal=max(supports.causal),
            regime="sunken",
        )
        if supports.empty_row == "unsupported":
            base = replace(base, seqlens=tuple(max(n, s) for n in base.seqlens))
        cases += [replace(base, logit_std=std) for std in (sunken[0], sunken[-1])]
        std = max(judgeable_stds((1.0, 0.1), profile, c + r, "typical"))
        cases.append(replace(base, seed=3, regime="typical", shared_pages=6, logit_std=std))
    if profile.coarse:
        cases = [replace(c, seqlens=tuple(long_enough(n, c.page_size, profile) for n in c.seqlens)) for c in cases]
    return cases


def ragged_decode(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Hundreds of queries among decoded tokens, before and behind them; full and empty prefixes that end with a page."""
    c, r = latent_dims(supports)
    empty = supports.empty_row != "unsupported"

    def case(queries: tuple[int, ...], pasts: tuple[int, ...], size: int, seed: int) -> RaggedDecodeCase:
        keys = tuple(n + long_enough(past, size, profile) for n, past in zip(queries, pasts, strict=True))
        return RaggedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=(*keys[:-1], 0) if empty and not profile.coarse else keys,
            num_heads=nearest(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=size,
            causal=supports.causal[seed % len(supports.causal)],
        )

    size = nearest(supports.page_sizes, 16)
    return [
        case((1, 300, 1, 0, 5, 1, 2), (0, 0, 2 * size - 1, 3, size, 40, 0), size, 0),
        case((200, 1, 1, 70, 1), (size, 3 * size, 70, 0, 0), nearest(supports.page_sizes, 64), 1),
    ]


def full_and_empty_prefixes(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """New tokens of sequences of which some have a cached prefix and others none."""
    d, v = prefill_dims(supports)
    return [
        PrefillCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=(3, 2, 4, 1),
            seqlens_k=keys,
            num_heads=nearest(supports.num_heads, 3),
            qk_head_dim=d,
            v_head_dim=v,
        )
        for seed, keys in enumerate(((3, 40, 4, 18), (19, 2, 70, 1)))
        if supports.empty_row != "unsupported"
    ]


def _tiles(supports: Supports) -> list[int]:
    """Numbers of indices of which the first tile, of 16 or 64, can be empty."""
    return [-(-k // supports.topk_multiple) * supports.topk_multiple for k in (33, 144)]


def sparse_prefill(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Rows of indices whose first tile selects nothing."""
    c, r = latent_dims(supports)
    return [
        SparsePrefillCase(
            dtype=profile.dtype,
            s_q=8,
            s_kv=2 * topk,
            num_heads=nearest(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            topk=topk,
            invalid=0.3,
        )
        for topk in _tiles(supports)
    ]


def sparse_decode(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """The same of slots."""
    c, r = latent_dims(supports)
    size = nearest(supports.page_sizes, 64)
    return [
        SparseDecodeCase(
            dtype=profile.dtype,
            batch=4,
            s=min(2, supports.max_s or 2),
            pages=-(-2 * topk // size),
            page_size=size,
            num_heads=nearest(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            topk=topk,
            invalid=0.3,
        )
        for topk in _tiles(supports)
    ]
