"""Fixed cases of ``rank_decode``."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.properties.fixed import decode
from mla_spec.properties.fixed.counts import BETWEEN, ELEMENTS, latent_dims, most_keys, nearest, thinned
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """The second of three ranks, with tokens in blocks of 4: whole blocks, a part of one, and none."""
    (case,) = decode.ordinary(supports, profile)
    return [
        RankDecodeCase(
            dtype=profile.dtype,
            seqlens=(*case.seqlens, 4),
            s=case.s,
            ranks=3,
            rank=1,
            interleave=nearest(supports.interleaves, 4),
            num_heads=case.num_heads,
            kv_lora_rank=case.kv_lora_rank,
            qk_rope_head_dim=case.qk_rope_head_dim,
            page_size=case.page_size,
            causal=case.causal,
        )
    ]


def _narrow(
    supports: Supports,
    profile: Profile,
    lengths: tuple[int, ...],
    s: int,
    heads: int,
    ranks: int,
    rank: int,
    interleave: int,
    seed: int,
) -> RankDecodeCase:
    """With the narrowest rows of a cache, and of each number the nearest that the subject takes."""
    c, r = latent_dims(supports)
    return RankDecodeCase(
        dtype=profile.dtype,
        seed=seed,
        seqlens=lengths,
        s=min(s, supports.max_s or s),
        ranks=ranks,
        rank=rank,
        interleave=nearest(supports.interleaves, interleave),
        num_heads=nearest(supports.num_heads, heads),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=nearest(supports.page_sizes, 64),
        causal=max(supports.causal),
    )


COUNTS = (
    # whole sequence, sequences, queries, heads, ranks, rank, interleave
    (70, 140, 1, 2, 8, 0, 1),
    (300, 3, 4, 24, 4, 1, 64),
    (300, 3, 4, 24, 4, 3, 1),
    (300, 2, 2, 128, 8, 2, 16),
    (301, 2, 6, 2, 2, 1, 1),
    (8193, 3, 2, 2, 2, 1, 1),
    (9002, 2, 4, 2, 3, 2, 1),
    (65606, 2, 4, 1, 8, 1, 64),
    (131142, 1, 1, 1, 16, 5, 1),
)
"""Some of the ranks hold the newest tokens, which the mask keeps from earlier queries."""


def counts(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """Many sequences, heads and ranks, and long sequences of which each rank holds its part."""
    width = sum(latent_dims(supports))
    cases = []
    for seed, (long, b, s, heads, ranks, rank, interleave) in enumerate(COUNTS):
        if long // ranks * b * width <= ELEMENTS and long // ranks <= most_keys(profile):
            lengths = tuple(max(long - 7 * i % long, 3) for i in range(b))
            cases.append(_narrow(supports, profile, lengths, s, heads, ranks, rank, interleave, seed))
    return cases


CROSSED = (
    # lengths of whole sequences, queries, heads, ranks, rank, interleave
    (tuple(2 * n for n in BETWEEN[1::4]), 4, 2, 2, 1, 1),
    ((8400, 2049, 130), 3, 32, 2, 0, 64),
    (tuple(cycled([130, 5, 40, 97, 112], 100)), 2, 2, 8, 6, 16),
    ((129, 131, 1), 8, 2, 2, 0, 1),
    ((1006, 302, 45, 3), 3, 2, 16, 13, 1),
    ((1, 9000, 3), 2, 2, 2, 1, 1),
)


def crossed(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """Several queries of long sequences, the last ranks of many, and a rank without keys of some sequences of a large batch."""
    width = sum(latent_dims(supports))
    return [
        _narrow(supports, profile, thinned(lengths, width // ranks + 1), s, heads, ranks, rank, interleave, seed)
        for seed, (lengths, s, heads, ranks, rank, interleave) in enumerate(CROSSED)
        if max(lengths) // ranks <= most_keys(profile)
    ]
