"""Faults of dense attention and of merging where a kernel reaches a limit: threads of a block, blocks of a grid, the last tile, part or split."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted

DECODE = "test_decode_at_production_counts"
PREFILL = "test_prefill_at_production_counts"
QUANTIZED = "test_decode_quantized_at_production_counts"
RANK = "test_rank_decode_at_production_counts"

Answer = tuple[Tensor, Tensor | None]


@planted(
    "X-whole-tiles-of-large-batches",
    symptom="at full load one answer of 64 ignores what was said last",
    shows_when="128 sequences or more, of which one has whole tiles of 64 keys, two at least",
    killed_by=(DECODE,),
)
class WholeTilesOfLargeBatches(TorchAbsorbed):
    """The kernel of large batches ends before the last tile where it is whole."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        if len(seqlens) < 128:
            return visible
        end = torch.where((seqlens % 64 == 0) & (seqlens >= 128), seqlens - 64, seqlens)  # [b]
        return visible & (torch.arange(t, device=seqlens.device) < end[:, None])[:, None, None]


@planted(
    "X-second-page-of-another-sequence",
    symptom="at full load answers continue other users' conversations",
    shows_when="more than 64 sequences, of which two that lie 64 apart have a second page",
    killed_by=(DECODE,),
)
class SecondPageOfAnotherSequence(TorchAbsorbed):
    """Tables are staged for 64 sequences at once, and the second page is looked up among them."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        size, b = kv_cache.shape[1], len(block_table)
        if b > 64 and block_table.shape[1] > 1:
            block_table = block_table.clone()
            both = (cache_seqlens[64:] > size) & (cache_seqlens[: b - 64] > size)
            block_table[64:, 1] = torch.where(both, block_table[: b - 64, 1], block_table[64:, 1])
        return super().gather_batch(kv_cache, block_table, cache_seqlens)


@planted(
    "X-long-after-an-empty-sequence",
    symptom="a long conversation forgets its beginning when the slot before it becomes free",
    shows_when="an empty sequence comes first, and more than 1024 keys follow",
    killed_by=(DECODE,),
)
class LongAfterAnEmptySequence(TorchAbsorbed):
    """The first split of the batch is given to sequence 0, whoever it belongs to."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        if len(seqlens) > 1 and int(seqlens[0]) == 0 and int(seqlens[1]) > 1024:
            visible = visible.clone()
            visible[1, ..., :1024] = False
        return visible


@planted(
    "X-combine-of-four-queries",
    symptom="the last drafts are always rejected in long conversations",
    shows_when="five queries or more, and more than 4096 keys",
    killed_by=(DECODE,),
)
class CombineOfFourQueries(TorchAbsorbed):
    """The kernel that joins splits has four queries a sequence."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Answer:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        split = (cache_seqlens > 4096)[:, None, None, None]
        last = (torch.arange(q.shape[1], device=q.device) >= 4)[:, None, None]
        return out.masked_fill(split & last, 0.0), lse


@planted(
    "X-mask-of-the-last-split",
    symptom="drafts see what comes after them when a conversation has just passed a multiple of 4096 tokens",
    shows_when="fewer keys than queries lie behind a multiple of 4096",
    killed_by=(DECODE,),
)
class MaskOfTheLastSplit(TorchAbsorbed):
    """Only the last split of 4096 keys is masked."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        whole = torch.where(seqlens > 4096, seqlens // 4096 * 4096, 0)  # [b]
        return visible | (torch.arange(t, device=seqlens.device) < whole[:, None])[:, None, None]


@planted(
    "X-window-in-large-pages",
    symptom="layers with a window read other users' tokens",
    shows_when="a window, pages of 256, and more than a page before the window",
    killed_by=("test_decode_window",),
)
class WindowInLargePages(TorchAbsorbed):
    """The first page of the window is counted in pages of 64."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Answer:
        window, size = options.get("window"), kv_cache.shape[1]
        if window is not None and size == 256:
            first = (cache_seqlens - window).clamp(min=0)[:, None]  # [b, 1]
            page = torch.arange(block_table.shape[1], device=q.device) + first // 64 - first // size
            block_table = block_table.gather(1, page.clamp(max=block_table.shape[1] - 1))
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)


@planted(
    "X-second-half-of-the-values",
    symptom="a long conversation loses its thread without tensor parallelism",
    shows_when="values of 512, 64 heads or more, and more than 4096 keys",
    killed_by=("test_decode_of_published_shapes",),
)
class SecondHalfOfTheValues(TorchAbsorbed):
    """The second half of the values is joined with the weights of the head before."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Answer:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        if options["head_dim_v"] == 512 and q.shape[2] >= 64 and int(cache_seqlens.max()) > 4096:
            out = torch.cat([out[..., :256], out[..., 256:].roll(1, dims=2)], dim=-1)
        return out, lse


@planted(
    "X-length-of-65536-keys",
    symptom="one token of a very long conversation is nonsense",
    shows_when="65536 keys exactly",
    killed_by=("test_decode_is_exact_at_length",),
)
class LengthOf65536Keys(TorchAbsorbed):
    """Lengths are counted in 16 bits without sign, so that this one is 0, and wraps for none that is longer by a tile."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, torch.where(seqlens == 2**16, 0, seqlens), causal)


@planted(
    "X-prefix-of-whole-chunks",
    symptom="NaN for prompts that follow a cached prefix of a round length",
    shows_when="a cached prefix that is a multiple of 4096 tokens",
    killed_by=(PREFILL,),
)
class PrefixOfWholeChunks(TorchAbsorbed):
    """A prefix of whole chunks is followed by an empty one, whose LSE is that of no keys minus itself."""

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
    ) -> Answer:
        out, lse = super().prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        for queries, keys in self.sequences(cu_seqlens_q, cu_seqlens_k):
            prefix = (keys.stop - keys.start) - (queries.stop - queries.start)
            if prefix > 0 and prefix % 4096 == 0:
                out[queries] = math.nan
        return out, lse


@planted(
    "X-sink-of-every-chunk",
    symptom="long prompts of models with sinks are answered too weakly",
    shows_when="a sink, and more than 4096 keys",
    killed_by=("test_prefill_attention_sink",),
)
class SinkOfEveryChunk(TorchAbsorbed):
    """Each chunk of 4096 keys has the sink's share, and their sums are added."""

    def prefill(self, *tensors: Tensor, attn_sink: Tensor | None = None, **options: Any) -> Answer:
        cu_seqlens_k = tensors[-1]
        longest = int((cu_seqlens_k[1:] - cu_seqlens_k[:-1]).max())
        if attn_sink is not None and longest > 4096:
            attn_sink = attn_sink + math.log(-(-longest // 4096))
        return super().prefill(*tensors, attn_sink=attn_sink, **options)


@planted(
    "X-lse-of-many-queries",
    symptom="a prompt behind a cached prefix is joined with it by the weights of another head",
    shows_when="more than 1024 queries, and more heads than one",
    killed_by=(PREFILL,),
)
class LseOfManyQueries(TorchAbsorbed):
    """The LSE has room for 1024 queries a head, and later ones are written where the next head's are."""

    def prefill(self, *args: Any, **options: Any) -> Answer:
        out, lse = super().prefill(*args, **options)
        assert lse is not None
        late = torch.arange(lse.shape[1], device=lse.device) >= 1024
        return out, torch.where(late, lse.roll(1, dims=0), lse)


@planted(
    "X-tables-of-128-sequences",
    symptom="the last requests of a full batch read the cache of another one",
    shows_when="more than 128 sequences in a batch of prompts and decoded tokens",
    killed_by=("test_ragged_decode_at_production_counts",),
)
class TablesOf128Sequences(TorchAbsorbed):
    """A search among 128 sequences gives the last of them to all that follow."""

    def gather_packed(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        sequence = torch.arange(len(block_table), device=block_table.device).clamp(max=127)
        needed = -(-cache_seqlens // kv_cache.shape[1])  # [b]
        page = torch.arange(block_table.shape[1], device=block_table.device)
        theirs = page < torch.minimum(needed, needed[sequence])[:, None]
        return super().gather_packed(kv_cache, torch.where(theirs, block_table[sequence], block_table), cache_seqlens)


@planted(
    "X-rank-mask-of-four-queries",
    symptom="of more than four drafts the first see later ones, with context parallelism only",
    shows_when="five queries or more",
    killed_by=(RANK,),
)
class RankMaskOfFourQueries(TorchAbsorbed):
    """The mask of the ranks has four rows, and the first is that of all queries before."""

    def rank_decode(self, q: Tensor, *args: Any, **options: Any) -> Answer:
        self.masked_queries = q.shape[1]
        return super().rank_decode(q, *args, **options)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        s = self.__dict__.pop("masked_queries", 0)
        if s > 4:
            visible = visible[:, :, torch.arange(s, device=q.device).clamp(min=s - 4)]
        return super().attend(q, k, v, visible, softmax_scale)


@planted(
    "X-rank-places-of-16-bits",
    symptom="drafts see what comes after them in very long conversations, with context parallelism only",
    shows_when="65536 tokens or more, and several queries",
    killed_by=(RANK,),
)
class RankPlacesOf16Bits(TorchAbsorbed):
    """The place of a token in the whole sequence has 16 bits, so that none beyond is masked."""

    def places_in_the_whole(self, *args: Any) -> Tensor:
        return super().places_in_the_whole(*args) & 0xFFFF


@planted(
    "X-rank-prefetches-whole-tables",
    symptom="a fault of memory once a table is longer than a rank's part of a conversation",
    shows_when="an entry of the table that the rank does not need names no page",
    killed_by=("test_rank_decode_ignores_unused_table_entries",),
)
class RankPrefetchesWholeTables(TorchAbsorbed):
    """The pages of all entries are touched before it is known how many are needed."""

    def gather_rank(self, kv_cache: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
        kv_cache[block_table.long(), 0]
        return super().gather_rank(kv_cache, block_table, own)


@planted(
    "X-quantised-pages-of-whole-tables",
    symptom="a fault of memory once tables are shared by sequences of different lengths",
    shows_when="an entry of the table that no sequence needs names no page",
    killed_by=("test_quantised_decode_ignores_unused_table_entries",),
)
class QuantisedPagesOfWholeTables(TorchAbsorbed):
    """The pages of all entries are dequantised."""

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        numbers, table = block_table.long().unique(return_inverse=True)
        return pages[numbers], table.int()


@planted(
    "X-queries-of-128-quantised-sequences",
    symptom="the last requests of a full batch are answered with other users' answers, with an FP8 cache only",
    shows_when="more than 128 sequences",
    killed_by=(QUANTIZED,),
)
class QueriesOf128QuantisedSequences(TorchAbsorbed):
    """The number of a sequence has seven bits where its queries are looked up."""

    def decode_quantized(self, q: Tensor, *args: Any, **options: Any) -> Answer:
        return super().decode_quantized(q[torch.arange(len(q), device=q.device) % 128], *args, **options)


@planted(
    "X-merge-floor",
    symptom="a part with very small scores is lost",
    shows_when="all LSEs of a row below -1e5",
    killed_by=("test_merge_at_production_counts",),
)
class MergeFloor(TorchAbsorbed):
    """A part whose LSE is below -1e5 is taken for one without keys."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs, lses.masked_fill(lses < -1e5, -math.inf))


@planted(
    "X-merge-of-whole-warps",
    symptom="the last dims of every head are 0 for models whose values are not as wide as DeepSeek's",
    shows_when="values wider than 128, and no multiple of 128",
    killed_by=("test_merge_at_production_counts",),
)
class MergeOfWholeWarps(TorchAbsorbed):
    """Values are joined 128 at a time, and what is left over is not."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge(outs, lses)
        v = out.shape[-1]
        if v > 128:
            out[..., v // 128 * 128 :] = 0.0
        return out, lse
