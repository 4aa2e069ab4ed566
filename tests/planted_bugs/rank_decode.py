"""Faults of decode over the keys of one rank: how tokens are dealt, and the mask of the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted

AGREES = "test_rank_decode_agrees_with_reference"
LSE_AGREES = "test_rank_decode_lse_agrees_with_reference"
ONE_RANK = "test_rank_decode_of_one_rank_is_decode"
MERGED = "test_merge_of_rank_decodes_is_the_whole"
FUTURE = "test_rank_decode_ignores_future_keys"
SLOTS = "test_rank_decode_ignores_unused_cache_slots"


@planted(
    "X-rank-masks-its-own-end",
    symptom="with speculative decoding and context parallelism, tokens miss keys",
    shows_when="several causal queries, keys on several ranks",
    killed_by=(AGREES, MERGED),
)
class MasksItsOwnEnd(TorchAbsorbed):
    """The mask is that of decode: the last s keys of the rank are taken for the new tokens."""

    def rank_decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        dealt = [options.pop(name) for name in ("ranks", "rank", "interleave")]
        own = self.own_tokens(cache_seqlens, *dealt)
        return super().decode(q, kv_cache, block_table, own, **options)


@planted(
    "X-rank-masks-whole-blocks",
    symptom="drafted tokens see what follows them, in some places of the context",
    shows_when="several causal queries, tokens in blocks",
    killed_by=(FUTURE, AGREES),
)
class MasksWholeBlocks(TorchAbsorbed):
    """A query sees every block of which it sees the first token."""

    def places_in_the_whole(self, t: int, ranks: int, rank: int, interleave: int, device: torch.device) -> Tensor:
        place = super().places_in_the_whole(t, ranks, rank, interleave, device)
        return place - place % interleave


@planted(
    "X-rank-lengths-rounded-down",
    symptom="the newest tokens are on no rank",
    shows_when="lengths that the number of ranks does not divide",
    killed_by=(AGREES, MERGED),
)
class LengthsRoundedDown(TorchExplicit):
    """Each rank is taken to hold as many tokens as the others."""

    def own_tokens(self, cache_seqlens: Tensor, ranks: int, rank: int, interleave: int) -> Tensor:
        return super().own_tokens(cache_seqlens, ranks, rank, interleave).minimum(cache_seqlens // ranks)


@planted(
    "X-rank-blocks-taken-as-singles",
    symptom="answers forget some of the newest tokens with another block size of the cache",
    shows_when="tokens in blocks, and a last round that is not full",
    killed_by=(AGREES, MERGED),
)
class BlocksTakenAsSingles(TorchAbsorbed):
    """Lengths and places are those of tokens that are dealt singly."""

    def rank_decode(self, *args: Any, interleave: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().rank_decode(*args, interleave=1, **options)


@planted(
    "X-rank-reads-whole-pages",
    symptom="NaN on some ranks, as soon as pages are used again",
    shows_when="slots past the rank's tokens hold NaN",
    killed_by=(SLOTS,),
)
class RankReadsWholePages(TorchExplicit):
    """The last page is read to its end, as that of a whole sequence would be; what is too much has weight 0."""

    def gather_rank(self, kv_cache: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
        rows = super().gather_rank(kv_cache, block_table, own)
        tails = [self.tail(kv_cache, *each) for each in zip(block_table, own.tolist(), strict=True)]
        return rows + torch.stack(tails)[:, None, None].to(rows.dtype)

    def tail(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        """The tail of the last page, with weight 0."""
        last, used = divmod(length, kv_cache.shape[1])
        return 0.0 * kv_cache[int(table[last]), used:].sum() if used else kv_cache.new_zeros(())


@planted(
    "X-rank-lse-by-query",
    symptom="ranks are weighted by the LSEs of other heads",
    shows_when="several heads and queries",
    killed_by=(LSE_AGREES, MERGED),
)
class RankLseByQuery(TorchAbsorbed):
    """The LSE is stored [b, s, h] and returned as [b, h, s]."""

    def rank_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().rank_decode(*args, **options)
        assert lse is not None
        return out, lse.transpose(1, 2).reshape(lse.shape)


@planted(
    "X-single-rank-without-mask",
    symptom="drafted tokens see what follows them, without context parallelism only",
    shows_when="one rank, several causal queries",
    killed_by=(ONE_RANK, AGREES),
)
class SingleRankWithoutMask(TorchAbsorbed):
    """Where there is one rank, the mask of the ranks is left out, and none takes its place."""

    def rank_decode(self, *args: Any, causal: bool, ranks: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().rank_decode(*args, causal=causal and ranks > 1, ranks=ranks, **options)


@planted(
    "X-rank-lengths-of-16-bits",
    symptom="conversations of more than 65535 tokens lose their context, which is what context parallelism is for",
    shows_when="a sequence of 65536 tokens or more",
    killed_by=("test_rank_decode_at_production_counts",),
)
class RankLengthsOf16Bits(TorchAbsorbed):
    """Lengths of whole sequences are kept in 16 bits without sign where tokens are dealt."""

    def own_tokens(self, cache_seqlens: Tensor, ranks: int, rank: int, interleave: int) -> Tensor:
        return super().own_tokens(cache_seqlens & 0xFFFF, ranks, rank, interleave)


@planted(
    "X-rank-keys-numbered-in-16-bits",
    symptom="of a million tokens on eight ranks each rank sees half, and that twice",
    shows_when="more than 65536 keys on one rank",
    killed_by=("test_rank_decode_is_exact_at_length",),
)
class RankKeysNumberedIn16Bits(TorchAbsorbed):
    """The number of a key among those of its rank has 16 bits."""

    def gather_rank(self, kv_cache: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
        rows = super().gather_rank(kv_cache, block_table, own)
        return rows[:, torch.arange(rows.shape[1], device=rows.device) % 2**16]
