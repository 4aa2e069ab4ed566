"""Faults of packed queries over pages: prompts, cached prefixes and decoded tokens in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.production import MergedByMaxima
from mla_spec.planted_bugs.registry import planted

AGREES = "test_ragged_decode_agrees_with_reference"
LSE_AGREES = "test_ragged_decode_lse_agrees_with_reference"
EQUALS_DECODE = "test_ragged_decode_equals_decode"
ALONE = "test_ragged_decode_sequences_are_independent"
ORDER = "test_ragged_decode_follows_the_order_of_sequences"
IDLE = "test_ragged_decode_sequences_without_queries_change_nothing"
IN_CHUNKS = "test_ragged_decode_in_chunks_of_queries"
OTHER_QUERIES = "test_ragged_decode_ignores_other_queries"
FUTURE = "test_ragged_decode_ignores_future_keys"
RELABELLED = "test_ragged_decode_page_relabelling_changes_nothing"
SLOTS = "test_ragged_decode_ignores_unused_cache_slots"
ENTRIES = "test_ragged_decode_ignores_unused_table_entries"
COUNTS = "test_ragged_decode_at_production_counts"
EXACT = "test_ragged_decode_is_exact_at_length"


@planted(
    "D6-ragged",
    source=("https://github.com/deepseek-ai/DeepSeek-V3/pull/1536",),
    symptom="a prompt after a cached prefix forgets the newest tokens of the prefix",
    shows_when="several queries, and more keys than queries",
    killed_by=(AGREES, IN_CHUNKS),
)
class PagedTopLeftMask(TorchExplicit):
    """The mask is that of a square: query i sees keys 0 .. i."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens.clamp(max=s) if causal and s > 1 else seqlens, causal)


@planted(
    "D13-ragged",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/348",),
    symptom="every query of a prompt but the last sees one future key",
    shows_when="several causal queries",
    killed_by=(FUTURE, IN_CHUNKS),
)
class PackedMaskOffByOne(TorchAbsorbed):
    """Keys are masked where j > t - s + i + 1."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        own = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal=False)
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal)
        return visible | (visible.roll(1, dims=1) & own) if causal else visible


@planted(
    "X-short-prompts-as-decodes",
    symptom="speculative decoding accepts too much, and only where a batch has prompts as well",
    shows_when="sequences of 2 to 8 causal queries",
    killed_by=(FUTURE, IN_CHUNKS, AGREES),
)
class ShortPromptsAsDecodes(TorchExplicit):
    """Sequences of up to 8 queries go the way of decoded tokens, which needs no mask for one query and has none for more."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens, causal and s > 8)


@planted(
    "D12-ragged",
    source=("https://github.com/vllm-project/vllm/pull/14253",),
    symptom="inaccurate, or an illegal access",
    shows_when="a batch mixes sequences of one and of several new tokens",
    killed_by=(AGREES, ALONE, ORDER),
)
class DecodesFirstOverPages(TorchExplicit):
    """Sequences with one query are computed first, and their rows are not put back in place."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seqlens: Tensor, cu_seqlens_q: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        order = torch.argsort((cu_seqlens_q.diff() != 1).int(), stable=True)
        spans = self.spans(cu_seqlens_q)
        sorted_q = torch.cat([q[spans[i]] for i in order.tolist()])
        cu = torch.nn.functional.pad(cu_seqlens_q.diff()[order].cumsum(0), (1, 0))
        return super().ragged_decode(sorted_q, kv_cache, table[order], seqlens[order], cu, **options)


@planted(
    "X-mask-of-the-longest-prompt",
    symptom="decoded tokens miss their newest keys while another request's prompt is processed",
    shows_when="a batch mixes sequences with different numbers of queries",
    killed_by=(AGREES, ALONE),
)
class MaskOfTheLongestPrompt(TorchAbsorbed):
    """The mask is aligned by the largest number of queries in the batch, not by that of the sequence."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal=False)
        if causal:
            sequence, query = self.places(cu_seqlens_q)
            _, key = self.places(cu_seqlens_k)
            past = cu_seqlens_k.diff() - cu_seqlens_q.diff().max()
            visible &= key <= (query + past[sequence])[:, None]
        return visible


@planted(
    "F50",
    source=("https://github.com/xLLM-AI/xllm/pull/2161",),
    symptom="answers differ from those of a full recomputation on a hit of the prefix cache",
    shows_when="several queries after a cached prefix",
    killed_by=(AGREES, IN_CHUNKS),
)
class CachedPrefixIgnored(TorchExplicit):
    """Queries of a prompt attend to the tokens of the call alone; decoded tokens read the cache."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        return visible & (torch.arange(t, device=seqlens.device) >= t - s) if s > 1 else visible


@planted(
    "X-lengths-without-new-tokens",
    symptom="a token does not attend to itself",
    shows_when="a cached prefix",
    killed_by=(AGREES, IN_CHUNKS),
)
class LengthsWithoutNewTokens(TorchExplicit):
    """cache_seqlens is taken for the length of the prefix, from which the new tokens are subtracted once more."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, torch.where(seqlens > s, seqlens - s, seqlens), causal)


@planted(
    "X-sequence-of-a-token-off-by-one",
    symptom="the first token of a request is answered from its neighbor's prompt",
    shows_when="a second sequence",
    killed_by=(AGREES, ALONE, ORDER, EQUALS_DECODE),
)
class SequenceOfATokenOffByOne(TorchAbsorbed):
    """A token belongs to the sequence whose offset is the last below its number, where it should be the last not above it."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        moved = cu_seqlens_q.clone()
        moved[1:-1] = (moved[1:-1] + 1).clamp(max=int(cu_seqlens_q[-1]))
        return super().packed_visible(moved, cu_seqlens_k, causal)


@planted(
    "D50",
    source=("https://github.com/Dao-AILab/flash-attention/issues/1537",),
    symptom="a shape error, or other requests' answers",
    shows_when="no sequence has more than one query, and some have none",
    killed_by=(IDLE,),
)
class OneQueryEachAssumed(TorchAbsorbed):
    """Where the most queries of a sequence are one, all sequences are taken to have one."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seqlens: Tensor, cu_seqlens_q: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if int(cu_seqlens_q.diff().max()) > 1:
            return super().ragged_decode(q, kv_cache, table, seqlens, cu_seqlens_q, **options)
        out, lse = super().decode(q.view(len(table), 1, *q.shape[1:]), kv_cache, table, seqlens, **options)
        return out.flatten(0, 1), None if lse is None else lse.transpose(0, 1).flatten(1)


@planted(
    "X-token-before-empty-sequences",
    symptom="a request that waits for its turn shows up in the answer of the next one",
    shows_when="a sequence without queries, and one with queries behind it",
    killed_by=(IDLE, AGREES),
)
class FirstOfEqualOffsets(TorchExplicit):
    """Of sequences that begin at one token the first is looked up, and that one has no queries."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seqlens: Tensor, cu_seqlens_q: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        found = torch.searchsorted(cu_seqlens_q.contiguous(), cu_seqlens_q[:-1].contiguous())  # the first that is equal
        return super().ragged_decode(q, kv_cache, table[found], seqlens[found], cu_seqlens_q, **options)


@planted(
    "D3-ragged",
    source=(
        "https://github.com/vllm-project/vllm/pull/51065",
        "https://github.com/vllm-project/vllm/issues/51848",
    ),
    symptom="illegal access or wrong rows",
    shows_when="several queries of a sequence, and another one",
    killed_by=(AGREES, ALONE, EQUALS_DECODE),
)
class TableByQueryToken(TorchExplicit):
    """There is one program per query token, and it takes the table of the sequence with the token's number."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seqlens: Tensor, cu_seqlens_q: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        token = cu_seqlens_q[:-1].clamp(max=len(table) - 1).long()
        needed = -(-seqlens // kv_cache.shape[1])
        named = torch.arange(table.shape[1], device=table.device) < torch.minimum(needed, needed[token])[:, None]
        return super().ragged_decode(
            q, kv_cache, torch.where(named, table[token], table), seqlens, cu_seqlens_q, **options
        )


@planted(
    "F51",
    source=("https://github.com/sgl-project/sglang-jax/issues/1297",),
    symptom="garbage as soon as two requests run at once",
    shows_when="a sequence that ends within a page, and another one behind it",
    killed_by=(AGREES, ALONE, ORDER),
)
class KeysPackedByPages(TorchAbsorbed):
    """Whole pages of each sequence are gathered, and keys are found as if no page were partly filled."""

    def gather_packed(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        page_size, total = kv_cache.shape[1], int(cache_seqlens.sum())
        counts = -(-cache_seqlens // page_size)
        used = torch.arange(block_table.shape[1], device=block_table.device) < counts[:, None]
        return kv_cache[block_table[used].long()].flatten(0, 2)[:total]


@planted(
    "X-last-page-of-no-tokens",
    symptom="now and then a request forgets its newest tokens",
    shows_when="a sequence that ends with a page",
    killed_by=(AGREES, EXACT),
)
class LastPageOfNoTokens(TorchExplicit):
    """The tokens of the last page are the length modulo its size, which is 0 where the page is full."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        size = self.page_size
        full = (seqlens % size == 0) & (seqlens > size)
        own = super().visible(s, t, seqlens, causal)
        return own & super().visible(s, t, torch.where(full, seqlens - size, seqlens), causal=False)

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        self.page_size = kv_cache.shape[1]
        return super().gather(kv_cache, table, length)


@planted(
    "F52",
    source=("https://github.com/flashinfer-ai/flashinfer/issues/3219",),
    symptom="one request is answered well, several are gibberish from the first token on",
    shows_when="a sequence's pages do not follow each other in the pool",
    killed_by=(RELABELLED, AGREES),
)
class PackedPagesTakenAsRun(TorchAbsorbed):
    """A sequence's pages are taken to follow its first one."""

    def gather_packed(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        run = block_table[:, :1] + torch.arange(block_table.shape[1], device=block_table.device)
        return super().gather_packed(kv_cache, run % len(kv_cache), cache_seqlens)


@planted(
    "F2-ragged",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/942",
        "https://github.com/flashinfer-ai/flashinfer/issues/941",
    ),
    symptom="NaN everywhere",
    shows_when="a page is partly filled and its tail holds NaN",
    killed_by=(SLOTS,),
)
class ReadsWholePagesOfPrompts(TorchExplicit):
    """Keys are bounded by pages: the tail of the last page gets weight 0, and 0 · NaN is NaN."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seqlens: Tensor, cu_seqlens_q: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        tails = [self.tail(kv_cache, *each) for each in zip(table, seqlens.tolist(), strict=True)]
        out, lse = super().ragged_decode(q, kv_cache, table, seqlens, cu_seqlens_q, **options)
        spoiled = torch.stack(tails).repeat_interleave(cu_seqlens_q.diff())
        return out + spoiled[:, None, None].to(out.dtype), lse

    def tail(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        """The tail of the last page, with weight 0."""
        last, used = divmod(length, kv_cache.shape[1])
        return 0.0 * kv_cache[int(table[last]), used:].sum() if used else kv_cache.new_zeros(())


@planted(
    "F16-ragged",
    source=("https://github.com/vllm-project/vllm/pull/49427",),
    symptom="illegal access",
    shows_when="a table entry past a sequence's pages names no page",
    killed_by=(ENTRIES,),
)
class PackedTableReadPastEnd(TorchAbsorbed):
    """All sequences are gathered to the longest, through whatever their rows of the table hold."""

    def gather_packed(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        page_size = kv_cache.shape[1]
        token = torch.arange(int(cache_seqlens.max()), device=kv_cache.device)
        rows = kv_cache[block_table[:, token // page_size].long(), token % page_size, 0]
        return rows[token < cache_seqlens[:, None]]


@planted(
    "E7-ragged",
    source=(
        "https://github.com/vllm-project/vllm/pull/57012",
        "https://github.com/sgl-project/sglang/issues/9363",
    ),
    symptom="crash, or silently wrong merges",
    shows_when="several heads and tokens",
    killed_by=(LSE_AGREES, EQUALS_DECODE),
)
class PagedLseByToken(TorchAbsorbed):
    """The LSE is stored [tokens, h] and returned as [h, tokens]."""

    def ragged_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().ragged_decode(*args, **options)
        assert lse is not None
        return out, lse.T.reshape(lse.shape)


@planted(
    "E22-ragged",
    source=(
        "https://github.com/ROCm/aiter/pull/3391",
        "https://github.com/ROCm/aiter/commit/ff61bb399",
    ),
    symptom="rows of the neighboring sequence are overwritten",
    shows_when="a decoded token before a prompt",
    killed_by=(AGREES, ALONE),
)
class WholeTilesOfPrompts(TorchExplicit):
    """A tile of 16 rows is stored for each sequence, also where it has fewer; the first sequence finishes last."""

    def ragged_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().ragged_decode(*args, **options)
        first = int(args[4][1])
        if 0 < first < 16:
            out[first:16] = 0.0
        return out, lse


@planted(
    "X-maximum-of-a-tile",
    symptom="a request's tokens depend on which requests it is batched with",
    shows_when="two queries",
    killed_by=(OTHER_QUERIES,),
)
class MaximumOfATile(TorchAbsorbed):
    """Weights are exp(score - m) with the largest score m of a tile of 16 query tokens, unless a row's own is far below."""

    def ragged_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _BY_TILE.ragged_decode(*args, **options)


class _ByTile(TorchAbsorbed):
    """Attention whose rows of a tile share a maximum."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        right, lse = super().softmax(scores)
        if not scores.numel():
            return right, lse
        tiles = [part.amax(dim=(-2, -1), keepdim=True).expand_as(part[..., :1]) for part in scores.split(16, dim=-2)]
        m = torch.cat(tiles, dim=-2)
        weights = torch.exp(scores - m.masked_fill(m == -torch.inf, 0.0))
        total = weights.sum(dim=-1, keepdim=True)
        near = total > 2.0**-10  # elsewhere a row has its own maximum
        return torch.where(near, weights / total.masked_fill(~near, 1.0), right), lse


_BY_TILE = _ByTile()


@planted(
    "X-rows-of-a-prompt-scheduled",
    symptom="long prompts in a mixed batch end as they began",
    shows_when="a sequence of more than 1024 queries",
    killed_by=(COUNTS,),
)
class RowsOfAPromptScheduled(TorchAbsorbed):
    """The scheduler's table has room for 1024 query tokens; those beyond have the query of the token 1024 before."""

    def ragged_decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().ragged_decode(q[torch.arange(len(q), device=q.device) % 1024], *args, **options)


@planted(
    "X-packed-splits-merged-by-maxima",
    symptom="right in every test, and attention to the wrong tokens in long conversations",
    shows_when="more than 4096 keys",
    killed_by=(EXACT, COUNTS),
)
class PackedSplitsMergedByMaxima(TorchExplicit):
    """Splits of 4096 keys are merged by their maxima, not by their LSEs."""

    def ragged_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _PARTS_OF_4096.ragged_decode(*args, **options)


_PARTS_OF_4096 = MergedByMaxima()


@planted(
    "X-256-queries-of-a-prompt",
    symptom="long prompts lose their last keys",
    shows_when="a sequence of more than 256 queries",
    killed_by=(AGREES, COUNTS),
)
class QueriesBeyond256(TorchExplicit):
    """The number of a query in its prompt has eight bits where the mask is made."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        return visible[..., torch.arange(s, device=seqlens.device) % 256, :]


@planted(
    "X-invariance-claimed",
    symptom="answers at temperature 0 change with the other requests of a batch, though the kernel says that they do not",
    shows_when="several sequences of some keys",
    killed_by=(ORDER, ALONE),
)
class InvarianceClaimed(TorchAbsorbed):
    """All keys of a batch are summed in one order, in which those of a sequence stand where others leave room for them."""

    profile = {dtype: replace(profile, batch_invariant=True) for dtype, profile in TorchAbsorbed.profile.items()}
