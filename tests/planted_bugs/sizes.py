"""Faults of sizes beyond a tile, a buffer or a threshold between kernels; smaller ones are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import RopeConfig


@planted(
    "X-heads-of-first-tile",
    symptom="wrong without tensor parallelism, right with it",
    shows_when="more than 64 heads",
    killed_by=("test_decode_agrees_with_reference",),
)
class HeadsOfFirstTile(TorchAbsorbed):
    """Every tile of 64 heads reads the queries of the first."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        head = torch.arange(q.shape[2], device=q.device) % 64
        return super().decode(q[:, :, head], *args, **options)


@planted(
    "X-mask-of-fourth-query",
    symptom="drafts longer than the usual are rejected from the fifth token on",
    shows_when="more than four queries",
    killed_by=("test_decode_agrees_with_reference",),
)
class MaskOfFourthQuery(TorchAbsorbed):
    """The causal mask is made for four queries, and those after them have the last one's."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        query = torch.arange(s, device=seqlens.device).clamp(max=3)
        return super().visible(s, t, seqlens, causal)[:, :, query]


@planted(
    "X-lengths-of-eight-sequences",
    symptom="only large batches are wrong",
    shows_when="more than eight sequences of different lengths",
    killed_by=("test_decode_agrees_with_reference", "test_decode_sequences_are_independent"),
)
class LengthsOfEightSequences(TorchAbsorbed):
    """The scheduler holds eight lengths, and sequence i has the one at i modulo 8."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        held = torch.arange(len(seqlens), device=seqlens.device) % 8
        return super().visible(s, t, seqlens[held].minimum(seqlens), causal)


@planted(
    "X-equal-lengths-in-whole-pages",
    symptom="right in every test of ragged batches, and the newest tokens are missing where all sequences are equally long",
    shows_when="eight or more sequences of one length, no whole number of pages",
    killed_by=("test_decode_at_production_counts",),
)
class EqualLengthsInWholePages(TorchAbsorbed):
    """Batches of one length take a path without a mask, which reads whole pages only."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        page_size = kv_cache.shape[1]
        if len(cache_seqlens) >= 8 and bool((cache_seqlens == cache_seqlens[0]).all()) and cache_seqlens[0] > page_size:
            cache_seqlens = cache_seqlens // page_size * page_size
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)


@planted(
    "X-long-among-many",
    symptom="one long conversation in a busy batch gets the answer of another",
    shows_when="more than 32 sequences, a later one of which is long enough to be split",
    killed_by=("test_decode_at_production_counts",),
)
class LongAmongMany(TorchAbsorbed):
    """The parts of a split sequence are counted from the first sequence of its block of 32."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        longest = int(cache_seqlens.argmax())
        if longest >= 32 and cache_seqlens[longest] > 2048:
            out[longest] = out[longest // 32 * 32]
        return out, lse


@planted(
    "X-equal-prompts-without-offset",
    symptom="prompts of one length, in a batch, do not see their cached prefix to its end",
    shows_when="several packed sequences, alike in queries and in keys, with more keys than queries",
    killed_by=("test_prefill_agrees_with_reference", "test_prefill_at_production_counts"),
)
class EqualPromptsWithoutOffset(TorchAbsorbed):
    """Equal lengths take the path of batches that are not packed, whose mask begins at the first key."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal)
        queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        alike = bool((queries == queries[0]).all() and (keys == keys[0]).all())
        if causal and len(queries) >= 4 and alike and keys[0] > queries[0] > 0:
            visible &= self.places(cu_seqlens_k)[1] <= self.places(cu_seqlens_q)[1][:, None]
        return visible


@planted(
    "X-keys-of-eight-sequences",
    symptom="only prompts that come with many others are misread",
    shows_when="more than eight packed sequences",
    killed_by=("test_prefill_agrees_with_reference", "test_prefill_sequences_are_independent"),
)
class KeysOfEightSequences(TorchExplicit):
    """The offsets of eight sequences are held, and sequence i reads the keys of the one at i modulo 8."""

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        spans = super().sequences(cu_seqlens_q, cu_seqlens_k)
        return [(queries, spans[i % 8][1]) for i, (queries, _) in enumerate(spans)]


@planted(
    "X-second-tile-of-queries",
    symptom="short prompts are right; in long ones most tokens do not see themselves",
    shows_when="a causal sequence of more than 64 queries",
    killed_by=("test_prefill_agrees_with_reference",),
)
class SecondTileOfQueries(TorchAbsorbed):
    """From the second tile of 64 queries on, the diagonal is one key too early."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal)
        if not causal:
            return visible
        later = (self.places(cu_seqlens_q)[1] >= 64)[:, None]
        following = torch.cat([visible[:, 1:], torch.zeros_like(visible[:, :1])], dim=1)
        return visible & (following | ~later)


@planted(
    "X-tail-tile-of-keys",
    symptom="the newest part of a cached prefix is not seen",
    shows_when="more than 64 keys without the causal mask, not a multiple of 64",
    killed_by=("test_prefill_agrees_with_reference",),
)
class TailTileOfKeys(TorchAbsorbed):
    """Without a causal mask only whole tiles of 64 keys are read, where there is one."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        sequence, key = self.places(cu_seqlens_k)
        length = cu_seqlens_k.diff()[sequence]
        in_tail = (length > 64) & (key >= length // 64 * 64)
        visible = super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal)
        return visible if causal else visible & ~in_tail


@planted(
    "X-parts-of-one-warp-pair",
    symptom="wrong only where the scheduler cuts long sequences finely",
    shows_when="more than 64 parts",
    killed_by=("test_merge_agrees_with_reference", "test_merge_lse_agrees_with_reference"),
)
class SixtyFourParts(TorchAbsorbed):
    """Two parts for each lane of a warp are merged, and no more."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs[:64], lses[:64])


@planted(
    "X-four-heads-rotated",
    symptom="keys are rotated, queries only in part",
    shows_when="more than four heads",
    killed_by=("test_rope_agrees_with_reference",),
)
class FourHeadsRotated(TorchAbsorbed):
    """A block rotates four heads, and the grid has one block for a token."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        rotated = super().rope(x, positions, rope=rope)
        return torch.cat([rotated[..., :4, :], x[..., 4:, :]], dim=-2) if x.ndim > positions.ndim + 1 else rotated


@planted(
    "X-positions-of-16-bits",
    symptom="answers turn to garbage 32768 tokens into a context",
    shows_when="a position beyond 32767",
    killed_by=("test_rope_agrees_with_reference",),
)
class PositionsOf16Bits(TorchAbsorbed):
    """Positions are kept in 16 bits."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        return super().angles(positions.to(torch.int16).long(), rope, dtype)


@planted(
    "X-256-tokens-written",
    symptom="the end of a long prompt is missing",
    shows_when="more than 256 new tokens",
    killed_by=("test_write_cache_stores_latent_then_rope",),
)
class WritesOneBlockOfTokens(TorchAbsorbed):
    """One block of 256 threads writes a token each."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().write_cache(latent[:256], k_pe[:256], kv_cache, slot_mapping[:256])


@planted(
    "X-64-indices",
    symptom="right for the tests' few indices, wrong for a model's 2048",
    shows_when="more than 64 indices",
    killed_by=("test_sparse_prefill_agrees_with_reference", "test_sparse_decode_agrees_with_reference"),
)
class FirstTileOfIndices(TorchAbsorbed):
    """The loop over tiles of 64 indices ends after the first."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        selected = super().selected(indices, topk_length, s_kv)
        return selected & (torch.arange(indices.shape[1], device=indices.device) < 64)


@planted(
    "X-first-tile-of-indices-empty",
    symptom="NaN where a row of indices begins with holes",
    shows_when="the first 64 entries of a row select nothing, and a later one does",
    killed_by=("test_sparse_prefill_agrees_with_reference", "test_sparse_decode_agrees_with_reference"),
)
class FirstTileOfIndicesEmpty(TorchAbsorbed):
    """After a first tile without a key, the running maximum is -inf, and rescaling by exp(-inf + inf) gives NaN."""

    def attend_rows(self, q: Tensor, rows: Tensor, selected: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(q, rows, selected, *args)
        rescaled = ~selected[:, :64].any(dim=1) & selected.any(dim=1)  # [s]
        return out.masked_fill(rescaled[:, None, None], torch.nan), lse


@planted(
    "X-indices-of-16-bits",
    symptom="sparse attention finds nothing in the second half of a long context",
    shows_when="an index beyond 32767",
    killed_by=("test_sparse_prefill_of_many_rows", "test_sparse_decode_of_many_slots"),
)
class IndicesOf16Bits(TorchAbsorbed):
    """Indices are kept in 16 bits, where large ones are negative and select nothing."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        return super().selected(indices, topk_length, s_kv) & (indices <= 32767)


@planted(
    "X-tail-tile-of-indexer-keys",
    symptom="the newest tokens of a long context are never selected",
    shows_when="a sequence of more than 64 keys",
    killed_by=("test_indexer_selects_the_largest_logits",),
)
class IndexerReadsWholeTiles(TorchAbsorbed):
    """Beyond a first tile of 64 keys only whole ones are searched."""

    def indexer_visible(self, s: int, t: int, device: torch.device) -> Tensor:
        visible = super().indexer_visible(s, t, device)
        return visible & (torch.arange(t, device=device) < t // 64 * 64) if t > 64 else visible


@planted(
    "X-eight-indexer-heads",
    symptom="the indexer of a real model selects worse keys than that of the tests",
    shows_when="more than eight heads",
    killed_by=("test_indexer_logits_agree_with_reference", "test_indexer_selects_the_largest_logits"),
)
class EightIndexerHeads(TorchAbsorbed):
    """The sum over heads is unrolled eight times, and not repeated."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return super().indexer_logits(q[:, :8], k, weights[:, :8])


@planted(
    "X-gradients-of-first-tile-of-keys",
    symptom="long sequences train their first tokens only",
    shows_when="a sequence of more than 64 keys",
    killed_by=("test_prefill_gradients_agree_with_reference", "test_prefill_gradients_through_the_lse"),
)
class GradientsOfFirstTileOfKeys(TorchAbsorbed):
    """The backward kernel's grid has one block of 64 keys for each sequence."""

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        later = (self.places(cu_seqlens_k.long())[1] >= 64)[:, None, None]

        def first_tile(grad: Tensor) -> Tensor:
            return grad.masked_fill(later, 0.0)

        k, v = with_gradient(k, first_tile), with_gradient(v, first_tile)
        return super().prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


@planted(
    "X-keys-numbered-in-16-bits",
    symptom="contexts beyond 65536 tokens begin anew",
    shows_when="more than 65536 keys",
    killed_by=("test_decode_is_exact_at_length",),
)
class KeysNumberedIn16Bits(TorchAbsorbed):
    """The number of a key has 16 bits."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        return rows[:, torch.arange(rows.shape[1], device=rows.device) % 2**16]


@planted(
    "X-window-of-4096-keys",
    symptom="the beginning of a long conversation is forgotten",
    shows_when="more than 4096 keys",
    killed_by=("test_decode_is_exact_at_length",),
)
class WindowOf4096Keys(TorchAbsorbed):
    """The sliding window of other layers of the model is applied to all."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        inside = torch.arange(t, device=seqlens.device) >= seqlens[:, None] - 4096  # [b, t]
        return super().visible(s, t, seqlens, causal) & inside[:, None, None]


class WithoutLse(TorchAbsorbed):
    """Returns no LSE, by which a wrong score would show."""

    supports = replace(TorchAbsorbed.supports, lse=False)

    def attend_long(self, q: Tensor, *args: Any, **options: Any) -> Tensor:
        """Out of a batch of at least 4096 keys."""
        return super().decode(q, *args, **options)[0]

    def decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if len(cache_seqlens) and int(cache_seqlens.max()) >= 4096:
            return self.attend_long(q, kv_cache, block_table, cache_seqlens, **options), None
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)[0], None


@planted(
    "X-rope-part-of-short-contexts",
    symptom="long contexts are read as if they had no order",
    shows_when="4096 keys or more, and no LSE is returned",
    killed_by=("test_decode_weighs_many_light_keys",),
)
class RopePartOfShortContexts(WithoutLse):
    """The kernel for long contexts multiplies the latents only."""

    def attend_long(self, q: Tensor, *args: Any, head_dim_v: int, **options: Any) -> Tensor:
        latent = torch.cat([q[..., :head_dim_v], torch.zeros_like(q[..., head_dim_v:])], dim=-1)
        return super().attend_long(latent, *args, head_dim_v=head_dim_v, **options)


@planted(
    "X-temperature-of-long-contexts",
    symptom="answers from long contexts are a little too sure",
    shows_when="4096 keys or more, and no LSE is returned",
    killed_by=("test_decode_weighs_many_light_keys",),
)
class TemperatureOfLongContexts(WithoutLse):
    """The scale of long contexts is 3 % too large."""

    def attend_long(self, q: Tensor, *args: Any, softmax_scale: float, **options: Any) -> Tensor:
        return super().attend_long(q, *args, softmax_scale=1.03 * softmax_scale, **options)
