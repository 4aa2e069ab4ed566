"""Faults of two numbers of production that meet, and of a number of production in gradients and in a layer's cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.cache_layout import CacheLayout
from mla_spec.reference.config import MLAConfig, RopeConfig

DECODE = "test_decode_at_production_counts"
DECODE_EXACT = "test_decode_is_exact_at_length"
PREFILL = "test_prefill_at_production_counts"
RAGGED = "test_ragged_decode_at_production_counts"
QUANTIZED = "test_decode_quantized_at_production_counts"


@planted(
    "X-stage-of-four-tiles",
    symptom="one length of four reads a few old tokens twice and its newest not at all",
    shows_when="16 tiles of 64 keys or more, a multiple of four",
    killed_by=(DECODE, DECODE_EXACT),
)
class StageOfFourTiles(TorchAbsorbed):
    """Of four buffers the last is read before it is filled again, where the loop ends with it."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        for i, length in enumerate(cache_seqlens.tolist()):
            tiles = -(-length // 64)
            if tiles >= 16 and tiles % 4 == 0:
                last = (tiles - 1) * 64
                rows[i, last:length] = rows[i, last - 256 : length - 256].clone()
        return rows


@planted(
    "X-mask-of-split-sequences",
    symptom="drafts are accepted too often in long conversations",
    shows_when="several queries under the causal mask, and more than 4096 keys",
    killed_by=(DECODE,),
)
class MaskOfSplitSequences(TorchAbsorbed):
    """In the kernel for split sequences the first query has the mask of the second."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        if q.shape[1] > 1 and options["causal"] and int(cache_seqlens.max()) > 4096:
            others = super().decode(q, kv_cache, block_table, cache_seqlens + 1, **options)
            out[:, 0], lse[..., 0] = others[0][:, 0], others[1][..., 0]
        return out, lse


@planted(
    "X-heads-of-split-sequences",
    symptom="long conversations are wrong without tensor parallelism",
    shows_when="more than 64 heads and more than 4096 keys",
    killed_by=(DECODE,),
)
class HeadsOfSplitSequences(TorchAbsorbed):
    """In the kernel for split sequences every tile of 64 heads reads the queries of the first."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        if q.shape[2] > 64 and int(cache_seqlens.max()) > 4096:
            q = q[:, :, torch.arange(q.shape[2], device=q.device) % 64]
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)


@planted(
    "X-empty-beside-split-sequences",
    symptom="NaN in the padding of a batch, from there in all of the model, once a conversation is long",
    shows_when="a sequence without keys beside one of more than 2048",
    killed_by=(DECODE,),
)
class EmptyBesideSplitSequences(TorchAbsorbed):
    """The kernel that joins splits divides 0 by 0 where no split has a key."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        empty = (cache_seqlens == 0) & (cache_seqlens.max() > 2048)
        return out.masked_fill(empty[:, None, None, None], torch.nan), lse


@planted(
    "X-last-split-empty",
    symptom="outputs of some lengths are a little too small",
    shows_when="512 keys or more, of which the last of eight splits in whole tiles has none",
    killed_by=(DECODE,),
)
class LastSplitEmpty(TorchAbsorbed):
    """A split without keys leaves the LSE 0, with which the others are merged."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        tiles = (cache_seqlens + 63) // 64
        bad = (cache_seqlens >= 512) & ((tiles + 7) // 8 * 7 >= tiles)
        share = torch.sigmoid(lse)
        out = torch.where(bad[:, None, None, None], out * share.transpose(1, 2)[..., None].to(out.dtype), out)
        return out, torch.where(bad[:, None, None], F.softplus(lse), lse)


@planted(
    "X-one-long-sequence",
    symptom="one user with a long conversation is answered wrongly, as long as there is no other",
    shows_when="a single sequence that is cut into more than 128 splits, such as one of 8400 keys",
    killed_by=(DECODE,),
)
class OneLongSequence(TorchAbsorbed):
    """A sequence that has all 132 multiprocessors is cut into as many splits as there are, of which 128 are merged."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        if len(cache_seqlens) == 1:
            each = -(-int(cache_seqlens) // (132 * 64)) * 64
            cache_seqlens = cache_seqlens.clamp(max=128 * each)
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)


@planted(
    "X-two-long-sequences",
    symptom="the first of two long conversations forgets its second half",
    shows_when="two sequences of more than 4096 keys in a batch",
    killed_by=(DECODE,),
)
class TwoLongSequences(TorchAbsorbed):
    """Partial results of the second split sequence are stored over the later ones of the first."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        long = (seqlens > 4096).nonzero().flatten().tolist()
        if len(long) > 1:
            visible = visible.clone()
            visible[long[0], ..., int(seqlens[long[0]]) // 2 : int(seqlens[long[0]]) - 64] = False
        return visible


@planted(
    "X-window-of-whole-tiles-of-keys",
    symptom="differs from the model by up to 127 keys, with windows as models have them",
    shows_when="a window of more than 128 keys, no multiple of 128",
    killed_by=("test_decode_window", "test_prefill_window"),
)
class WindowOfWholeTilesOfKeys(TorchAbsorbed):
    """Windows larger than a tile are rounded up to whole ones."""

    def windowed(self, visible: Tensor, window: int | None) -> Tensor:
        return super().windowed(visible, window if window is None or window <= 128 else -(-window // 128) * 128)


@planted(
    "X-sink-of-every-split",
    symptom="outputs of a model with sinks shrink as the context grows",
    shows_when="a sink and more than 2048 keys",
    killed_by=("test_decode_attention_sink",),
)
class SinkOfEverySplit(TorchAbsorbed):
    """Each split of 2048 keys counts the sink."""

    def attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if attn_sink is not None and k.shape[2] > 2048:
            attn_sink = attn_sink + math.log(-(-k.shape[2] // 2048))
        return super().attend_beside(q, k, v, visible, softmax_scale, attn_sink)


@planted(
    "X-tile-of-a-long-prefix",
    symptom="a document that is read in chunks has gaps",
    shows_when="more than 128 queries after more than 1024 cached keys",
    killed_by=(PREFILL,),
)
class TileOfALongPrefix(TorchAbsorbed):
    """Between the tiles without a mask and those with one, the ninth of a prefix is read by neither."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal)
        queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        chunked = (queries > 128) & (keys - queries > 1024)
        place = self.places(cu_seqlens_k)[1]
        return visible & ~(chunked[self.places(cu_seqlens_q)[0]][:, None] & (place >= 512) & (place < 576))


@planted(
    "X-queries-of-16-bits",
    symptom="the end of a very large batch of prompts is answered as its beginning",
    shows_when="more than 65536 packed queries",
    killed_by=(PREFILL,),
)
class QueriesOf16Bits(TorchAbsorbed):
    """The number of a packed query has 16 bits."""

    def prefill(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().prefill(q[torch.arange(len(q), device=q.device) & 0xFFFF], *args, **options)


@planted(
    "X-second-of-two-prompts",
    symptom="two long prompts that come together disturb each other",
    shows_when="two sequences of more than 128 queries in one ragged batch",
    killed_by=(RAGGED,),
)
class SecondOfTwoPrompts(TorchAbsorbed):
    """The second long prompt begins with the output of the first."""

    def ragged_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = super().ragged_decode(q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, **options)
        long = (cu_seqlens_q.diff() > 128).nonzero().flatten()
        if len(long) > 1:
            first, second = cu_seqlens_q[long[:2]].tolist()
            out[second] = out[first]
        return out, lse


@planted(
    "X-prompt-after-a-long-prefix",
    symptom="a question after a long document does not see its own last words",
    shows_when="more than 128 queries after more than 1024 cached keys in a ragged batch",
    killed_by=(RAGGED,),
)
class PromptAfterALongPrefix(TorchAbsorbed):
    """The prefix of such a prompt is counted without its last key, and all of it moves by one."""

    def ragged_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries = cu_seqlens_q.diff()
        moved = (queries > 128) & (cache_seqlens - queries > 1024)
        return super().ragged_decode(q, kv_cache, block_table, cache_seqlens - moved.int(), cu_seqlens_q, **options)


@planted(
    "X-ranks-of-three-bits",
    symptom="context parallelism over more than eight ranks drafts wrongly",
    shows_when="a rank beyond the eighth",
    killed_by=("test_rank_decode_at_production_counts",),
)
class RanksOfThreeBits(TorchAbsorbed):
    """Masks are made for rank modulo 8."""

    def places_in_the_whole(self, t: int, ranks: int, rank: int, interleave: int, device: torch.device) -> Tensor:
        return super().places_in_the_whole(t, ranks, rank % 8, interleave, device)


@planted(
    "X-empty-tile-ends-the-loop",
    symptom="sparse attention loses keys where a selection has holes",
    shows_when="64 entries in a row that select nothing, behind others that do and before more",
    killed_by=("test_sparse_prefill_at_production_counts", "test_sparse_decode_at_production_counts"),
)
class EmptyTileEndsTheLoop(TorchAbsorbed):
    """Behind a tile of 64 entries that selects nothing no other is read."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        selected = super().selected(indices, topk_length, s_kv)
        entries = selected.shape[1]
        alive = F.pad(selected, (0, -entries % 64)).unflatten(1, (-1, 64)).any(dim=-1)
        alive[:, 0] = True
        return selected & alive.long().cumprod(dim=1).bool().repeat_interleave(64, dim=1)[:, :entries]


@planted(
    "X-topk-length-of-8-bits",
    symptom="sparse attention is right in short contexts and reads a few keys of long ones",
    shows_when="topk_length beyond 255",
    killed_by=("test_sparse_prefill_at_production_counts", "test_sparse_decode_at_production_counts"),
)
class TopkLengthOf8Bits(TorchAbsorbed):
    """Lengths of selections are kept in 8 bits."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        return super().selected(indices, None if topk_length is None else topk_length & 0xFF, s_kv)


@planted(
    "X-chunk-of-indexer-queries",
    symptom="a few tokens of a long prompt do not select themselves",
    shows_when="64 queries or more over more than 1024 keys",
    killed_by=("test_indexer_at_production_counts",),
)
class ChunkOfIndexerQueries(TorchAbsorbed):
    """The first query of each tile of 64 has the mask of the one before it."""

    def indexer_visible(self, s: int, t: int, device: torch.device) -> Tensor:
        visible = super().indexer_visible(s, t, device)
        if s >= 64 and t > 1024:
            visible = visible.clone()
            visible[64::64] = visible[63:-1:64]
        return visible


@planted(
    "X-indexer-heads-over-many-keys",
    symptom="the indexer selects worse keys once a context is long",
    shows_when="more than 32 heads and more than 512 keys",
    killed_by=("test_indexer_at_production_counts",),
)
class IndexerHeadsOverManyKeys(TorchAbsorbed):
    """The kernel for long contexts holds 32 heads."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return (
            super().indexer_logits(q[:, :32], k, weights[:, :32])
            if len(k) > 512
            else super().indexer_logits(q, k, weights)
        )


@planted(
    "X-one-part-is-copied",
    symptom="garbage in the padding of a batch where nothing was split",
    shows_when="one part, with rows that have no keys and an output that is not 0",
    killed_by=("test_merge_ignores_outputs_of_empty_parts",),
)
class OnePartIsCopied(TorchAbsorbed):
    """One part is copied, whatever its LSE."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return (outs[0].clone(), lses[0].clone()) if len(outs) == 1 else super().merge(outs, lses)


@planted(
    "X-65535-rows-merged",
    symptom="the last requests of a full batch with drafts are those of others",
    shows_when="more than 65535 rows of sequences, queries and heads",
    killed_by=("test_merge_at_production_counts",),
)
class MergesRowsOf16Bits(TorchAbsorbed):
    """A grid has 65535 blocks at most, and a row each; later rows have the result of the first ones."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge(outs, lses)
        row = torch.arange(lse.numel(), device=out.device) % 65535
        return out.flatten(0, -2)[row].reshape(out.shape), lse


@planted(
    "X-table-one-row-short",
    symptom="the last token of a full context is read at the place of the one before it",
    shows_when="the last position of max_position_embeddings",
    killed_by=("test_rope_agrees_with_reference",),
)
class TableOneRowShort(TorchAbsorbed):
    """The table of cos and sin ends one position too early; positions beyond the context have a table of their own."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        end = rope.max_position_embeddings
        if end is not None:
            positions = torch.where(positions == end - 1, end - 2, positions)
        return super().rope(x, positions, rope=rope)


@planted(
    "X-quantized-heads-over-many-keys",
    symptom="a cache in FP8 is read wrongly without tensor parallelism, once a context is long",
    shows_when="more than 64 heads and more than 128 quantised keys",
    killed_by=(QUANTIZED,),
)
class QuantizedHeadsOverManyKeys(TorchAbsorbed):
    """Every tile of 64 heads reads the queries of the first, beyond a tile of keys."""

    def decode_quantized(
        self, q: Tensor, pages: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if q.shape[2] > 64 and int(cache_seqlens.max()) > 128:
            q = q[:, :, torch.arange(q.shape[2], device=q.device) % 64]
        return super().decode_quantized(q, pages, block_table, cache_seqlens, **options)


@planted(
    "X-scales-of-1024-tokens",
    symptom="a long prompt is written with the scales of its beginning",
    shows_when="more than 1024 new tokens in a format that stores scales",
    killed_by=("test_scales_are_within_limits",),
)
class ScalesOf1024Tokens(TorchAbsorbed):
    """The workspace of scales has 1024 rows, and is written over."""

    def scales(self, groups: Tensor, layout: CacheLayout) -> Tensor:
        scales = super().scales(groups, layout)
        return scales[torch.arange(len(scales), device=scales.device) % 1024]


@planted(
    "X-key-gradient-of-128-queries",
    symptom="keys of long sequences learn from their first queries only",
    shows_when="more than 128 queries of a sequence",
    killed_by=("test_prefill_gradients_agree_with_reference",),
)
class KeyGradientOf128Queries(TorchAbsorbed):
    """The backward kernel's loop over queries ends after 128."""

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        keys = [with_gradient(k, torch.zeros_like), with_gradient(v, torch.zeros_like)]
        late = (self.places(cu_seqlens_q.long())[1] >= 128)[:, None, None]
        out, lse = super().prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        if not bool(late.any()):
            return out, lse
        other, other_lse = super().prefill(q, *keys, cu_seqlens_q, cu_seqlens_k, **options)
        assert lse is not None and other_lse is not None
        return torch.where(late, other, out), torch.where(late[..., 0].T, other_lse, lse)


@planted(
    "X-value-gradient-of-32-heads",
    symptom="without tensor parallelism most heads do not learn their values",
    shows_when="more than 32 heads",
    killed_by=("test_prefill_gradients_agree_with_reference",),
)
class ValueGradientOf32Heads(TorchAbsorbed):
    """The backward kernel's grid has 32 heads."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        later = (torch.arange(v.shape[1], device=v.device) >= 32)[:, None]
        return super().prefill(q, k, with_gradient(v, lambda grad: grad.masked_fill(later, 0.0)), *args, **options)


@planted(
    "X-latent-gradient-of-first-tile",
    symptom="a layer learns from the first tokens of a sequence",
    shows_when="a layer with more than 64 tokens",
    killed_by=("test_layer_gradients_agree_with_reference",),
)
class LatentGradientOfFirstTile(TorchAbsorbed):
    """Gradients of latents beyond the first tile of 64 tokens are not written."""

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        latent, k_pe = super().project_latent(hidden, positions, weights, config)
        later = (torch.arange(latent.shape[1], device=latent.device) >= 64)[:, None]
        return with_gradient(latent, lambda grad: grad.masked_fill(later, 0.0)), k_pe


class GrowingCache(TorchLayer):
    """The row at which the cache of a layer grows is that before it."""

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        held = 0 if self.cache is None else self.cache[0].shape[1]
        super().append(latent, k_pe)
        assert self.cache is not None
        if held and held // 128 != self.cache[0].shape[1] // 128:
            self.cache = tuple(x.index_copy(1, torch.tensor([held]), x[:, held - 1 : held]) for x in self.cache)


@planted(
    "X-token-at-which-the-cache-grows",
    symptom="now and then a decoded token is forgotten",
    shows_when="a token is decoded into a cache of 127 or 255 tokens",
    killed_by=("test_layer_of_thousands_of_cached_tokens",),
)
class TokenAtWhichTheCacheGrows(TorchAbsorbed):
    """A cache grows by blocks of 128 tokens, before the token is written that makes it grow."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return GrowingCache(self, weights, config)


@planted(
    "X-heads-of-an-output-projection",
    symptom="a layer is right with tensor parallelism, wrong without",
    shows_when="a layer with more than 64 heads",
    killed_by=("test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"),
)
class HeadsOfAnOutputProjection(TorchAbsorbed):
    """Every tile of 64 heads reads the output of the first."""

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return super().project_output(out[:, :, torch.arange(out.shape[2], device=out.device) % 64], weights, config)
