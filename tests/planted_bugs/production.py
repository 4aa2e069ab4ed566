"""Faults of the counts, lengths and options of production, each with its real trigger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import RopeConfig

DECODE = "test_decode_at_production_counts"
DECODE_EXACT = "test_decode_is_exact_at_length"
PREFILL_EXACT = "test_prefill_is_exact_at_length"


@planted(
    "D40",
    source=("https://github.com/ROCm/aiter/pull/3310",),
    symptom="garbage with tensor parallelism over four ranks, right over eight and two",
    shows_when="32 heads and more than one query",
    killed_by=(DECODE,),
)
class HeadsFoldedInTwo(TorchAbsorbed):
    """32 heads are two blocks of 16, of which the second reads the query after its own."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if q.shape[2] == 32:
            q = torch.cat([q[:, :, :16], q.roll(-1, dims=1)[:, :, 16:]], dim=2)
        return super().decode(q, *args, **options)


@planted(
    "X-heads-of-power-of-two",
    symptom="wrong for a model with 96 heads over two or four ranks",
    shows_when="24, 48, 96 or 112 heads",
    killed_by=(DECODE,),
)
class HeadsOfPowerOfTwo(TorchAbsorbed):
    """From 16 heads on the grid has as many as the power of two below, and the rest get the last one's."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        h = q.shape[2]
        if h > 20:
            q = q[:, :, torch.arange(h, device=q.device).clamp(max=2 ** (h.bit_length() - 1) - 1)]
        return super().decode(q, *args, **options)


@planted(
    "X-rows-of-one-tile",
    symptom="speculative decoding accepts nothing at full width",
    shows_when="more than 512 rows of queries times heads",
    killed_by=(DECODE,),
)
class RowsOfOneTile(TorchAbsorbed):
    """Rows of a sequence beyond 512 have the query of the row 512 before."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        row = torch.arange(q.shape[1] * q.shape[2], device=q.device)
        q = q.flatten(1, 2)[:, torch.where(row < 512, row, row - 512)].reshape(q.shape)
        return super().decode(q, *args, **options)


@planted(
    "X-96-sequences-scheduled",
    symptom="the last requests of a full batch repeat earlier ones",
    shows_when="more than 96 sequences of different lengths",
    killed_by=(DECODE,),
)
class SequencesScheduled(TorchAbsorbed):
    """The scheduler's table has 96 lengths; later sequences have no more keys than the one at their place modulo 96."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        held = torch.arange(len(seqlens), device=seqlens.device) % 96
        return super().visible(s, t, seqlens[held].minimum(seqlens), causal)


@planted(
    "X-pages-of-256",
    symptom="wrong with the page size that another backend wants",
    shows_when="pages of 256 tokens",
    killed_by=(DECODE,),
)
class PagesOf256(TorchAbsorbed):
    """The row within a page has seven bits."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        if kv_cache.shape[1] == 256:
            kv_cache = kv_cache[:, torch.arange(256, device=kv_cache.device) % 128]
        return super().gather_batch(kv_cache, block_table, cache_seqlens)


@planted(
    "X-splits-merged-by-maxima",
    symptom="right in every test, and attention to the wrong tokens in long conversations",
    shows_when="decode over more than 4096 keys",
    killed_by=(DECODE, DECODE_EXACT),
)
class SplitsMergedByMaxima(TorchAbsorbed):
    """Splits of 4096 keys are merged by their maxima, not by their LSEs."""

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _PARTS_OF_4096.decode(*args, **options)


@planted(
    "X-chunks-merged-by-maxima",
    symptom="long prompts are read as if every chunk weighed the same",
    shows_when="prefill over more than 512 keys",
    killed_by=("test_prefill_at_production_counts", PREFILL_EXACT),
)
class ChunksMergedByMaxima(TorchExplicit):
    """Chunks of 512 keys are merged by their maxima."""

    def prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _PARTS_OF_512.prefill(*args, **options)


@planted(
    "X-selections-merged-by-maxima",
    symptom="sparse attention is right for the tests' few indices",
    shows_when="more than 256 indices",
    killed_by=("test_sparse_prefill_at_production_counts", "test_sparse_prefill_is_exact_at_length"),
)
class SelectionsMergedByMaxima(TorchAbsorbed):
    """Blocks of 256 selected keys are merged by their maxima."""

    def sparse_prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _PARTS_OF_256.sparse_prefill(*args, **options)


@planted(
    "X-slots-merged-by-maxima",
    symptom="sparse decoding is right for the tests' few indices",
    shows_when="more than 256 indices",
    killed_by=("test_sparse_decode_at_production_counts", "test_sparse_decode_is_exact_at_length"),
)
class SlotsMergedByMaxima(TorchAbsorbed):
    """Blocks of 256 selected slots are merged by their maxima."""

    def sparse_decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _PARTS_OF_256.sparse_decode(*args, **options)


class MergedByMaxima(TorchAbsorbed):
    """Attention in parts that are merged by their maxima: what each part's weights sum to is forgotten.

    ``part`` is how many keys a part has.
    """

    part = 4096

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        right, lse = super().softmax(scores)
        parts = scores.split(self.part, dim=-1)
        if len(parts) <= 1:
            return right, lse
        own = [super(MergedByMaxima, self).softmax(part)[0] for part in parts]
        maxima = torch.stack([part.amax(dim=-1) for part in parts])
        shares, joined = super().softmax(maxima.movedim(0, -1))
        weights = torch.cat([p * shares[..., i, None] for i, p in enumerate(own)], dim=-1)
        return weights, joined


@planted(
    "X-quantized-splits-merged-by-maxima",
    symptom="a cache in FP8 loses quality beyond 2048 tokens, and the format is blamed",
    shows_when="decode over more than 2048 quantised keys",
    killed_by=("test_decode_quantized_at_production_counts", "test_decode_quantized_is_exact_at_length"),
)
class QuantizedSplitsMergedByMaxima(TorchAbsorbed):
    """Splits of 2048 keys are merged by their maxima."""

    def decode_quantized(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return _PARTS_OF_2048.decode_quantized(*args, **options)


class PartsOf2048(MergedByMaxima):
    """Splits of a quantised cache."""

    part = 2048


class PartsOf512(MergedByMaxima):
    """Chunks of a prompt."""

    part = 512


class PartsOf256(MergedByMaxima):
    """Blocks of selected keys."""

    part = 256


_PARTS_OF_4096, _PARTS_OF_2048 = MergedByMaxima(), PartsOf2048()
_PARTS_OF_512, _PARTS_OF_256 = PartsOf512(), PartsOf256()


@planted(
    "X-short-sequence-beside-a-long-one",
    symptom="answers get worse while another user has a long conversation",
    shows_when="a sequence of 8192 keys or more in the batch, and another one",
    killed_by=(DECODE, DECODE_EXACT),
)
class ShortBesideLong(TorchAbsorbed):
    """Where the longest sequence has 8192 keys, those of fewer splits are divided by the number of its."""

    def decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        if int(cache_seqlens.max()) >= 8192:
            out = torch.where((cache_seqlens < 4096)[:, None, None, None], out / 2, out)
        return out, lse


@planted(
    "X-last-sequence-truncated",
    symptom="the longest conversation forgets its beginning, if it came last",
    shows_when="the last sequence of a batch has more than 4096 keys, and another one comes before it",
    killed_by=(DECODE, DECODE_EXACT),
)
class LastSequenceTruncated(TorchAbsorbed):
    """The splits of the last sequence are those that are left, and begin too late."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal).clone()
        if len(seqlens) > 1 and int(seqlens[-1]) > 4096:
            visible[-1, ..., : int(seqlens[-1]) - 4096] = False
        return visible


@planted(
    "X-accumulator-of-16-bits",
    symptom="the quality of very long contexts falls slowly",
    shows_when="more than 32768 keys",
    killed_by=(DECODE, DECODE_EXACT),
)
class AccumulatorOf16Bits(TorchAbsorbed):
    """From 32768 keys on, the running sum over tiles of 1024 keys is kept in bfloat16."""

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        if p.shape[-1] <= 32768:
            return super().weighted_values(p, v)
        total = p.new_zeros(1)
        for weights, values in zip(p.split(1024, dim=-1), v.split(1024, dim=-2), strict=True):
            total = (total + super().weighted_values(weights, values)).bfloat16().to(p.dtype)
        return total


@planted(
    "X-lse-of-16-bits",
    symptom="long contexts are merged with the wrong weight",
    shows_when="more than 16384 keys",
    killed_by=(DECODE, DECODE_EXACT),
)
class LseOf16Bits(TorchAbsorbed):
    """From 16384 keys on, LSEs are kept in bfloat16."""

    def decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        assert lse is not None
        long = (cache_seqlens > 16384)[:, None, None]
        return out, torch.where(long, lse.bfloat16().to(lse.dtype), lse)


@planted(
    "X-maximum-of-a-segment-floored",
    symptom="NaN now and then with speculative decoding",
    shows_when="a query sees no key of the last page, and all its logits are below -104",
    killed_by=("test_decode_agrees_with_reference", "test_decode_lse_agrees_with_reference"),
)
class MaximumOfASegmentFloored(TorchAbsorbed):
    """A page without a visible key gives the maximum 0, with which the weights of all other pages underflow."""

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        masked = super().masked(scores, visible)
        self.blind = (visible.any(dim=-1) & ~visible[..., -1]).expand(scores.shape[:-1])
        return masked

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = super().softmax(scores)
        lost = self.blind & (scores.amax(dim=-1) < -104) if scores.shape[-1] else self.blind
        return weights.masked_fill(lost[..., None], 0.0), lse.masked_fill(lost, -torch.inf)


@planted(
    "D41",
    source=("https://github.com/local-inference-lab/vllm/pull/17",),
    symptom="long prompts with a cached prefix are answered as if part of them were missing",
    shows_when="prefill over more than 65536 keys, with values narrower than keys",
    killed_by=(PREFILL_EXACT,),
)
class ValuesOfSecondChunk(TorchExplicit):
    """Values of the second chunk of 65536 keys are read with the stride of the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        chunk = 2**16
        if v.shape[-2] > chunk and v.shape[-1] < k.shape[-1]:
            rest = torch.arange(v.shape[-2] - chunk, device=v.device) * k.shape[-1] // v.shape[-1]
            v = torch.cat([v[..., :chunk, :], v[..., chunk + rest % len(rest), :]], dim=-2)
        return super().attend(q, k, v, visible, softmax_scale)


@planted(
    "X-1024-queries",
    symptom="the end of a long prompt is garbage when it comes in one piece",
    shows_when="more than 1024 queries of a sequence",
    killed_by=("test_prefill_at_production_counts", PREFILL_EXACT),
)
class QueriesOfOneGrid(TorchExplicit):
    """Query i has the mask of query i modulo 1024."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens, causal)[:, :, torch.arange(s, device=seqlens.device) % 1024]


@planted(
    "H40",
    source=("https://github.com/sgl-project/sglang/pull/30512",),
    symptom="sparse attention loses keys where an indexer in FP8 scores many alike",
    shows_when="more than 1024 keys tie for the last places, which top_k 2048 has",
    killed_by=("test_indexer_at_production_counts", "test_indexer_ties_go_to_the_smaller_index"),
)
class TiesOfOneBuffer(TorchAbsorbed):
    """The buffer of keys that equal the threshold holds 1024; the places left over name what comes first otherwise."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        order = super().largest(logits, logits.shape[-1])
        if order.shape[-1] <= top_k:
            return order
        ordered = logits.gather(-1, order)
        tied = ordered == ordered[:, top_k - 1, None]
        rank = torch.arange(order.shape[-1], device=logits.device)
        dropped = tied & (tied.cumsum(dim=-1) > 1024) & (rank < top_k)
        last = order.flip(-1)
        return torch.where(dropped, last, order)[:, :top_k]


@planted(
    "X-first-2048-keys",
    symptom="sparse attention is a window at the beginning of the context",
    shows_when="more than 2048 keys and top_k 2048",
    killed_by=("test_indexer_selects_the_largest_logits", "test_indexer_at_production_counts"),
)
class FirstKeysSelected(TorchAbsorbed):
    """Where more than 2048 keys could be selected, the first ones are, whatever their logits."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        if top_k < 2048 or logits.shape[-1] <= top_k:
            return super().largest(logits, top_k)
        return torch.arange(top_k, device=logits.device).expand(len(logits), -1)


@planted(
    "C40",
    source=("https://github.com/lablup/mlxcel/pull/829",),
    symptom="a model in half precision babbles, in bfloat16 it is only dull",
    shows_when="latents of 512 elements in 16 bits",
    killed_by=("test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"),
)
class NormOf16Bits(TorchAbsorbed):
    """Squares of 512 elements are added one after the other in the format of the tensors."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.shape[-1] < 512 or x.element_size() > 2:
            return super().rms_norm(x, weight, eps)
        total = torch.zeros_like(x[..., 0])
        for element in x.square().unbind(dim=-1):
            total = total + element
        scale = torch.rsqrt(total.float()[..., None] / x.shape[-1] + eps)
        return (x.float() * scale * weight.float()).to(x.dtype)


@planted(
    "X-4096-tokens-cached",
    symptom="long conversations lose their newest turns",
    shows_when="a layer with more than 4096 cached tokens",
    killed_by=("test_layer_of_thousands_of_cached_tokens",),
)
class CachedTokensOfOneBlock(TorchAbsorbed):
    """The mask of a layer has 4096 columns."""

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        return super().layer_visible(q, k) & (torch.arange(k.shape[-2], device=q.device) < 4096)


@planted(
    "B40",
    source=("https://github.com/vllm-project/vllm-ascend/pull/16699",),
    symptom="long prompts are read in a wrong order, at full width only",
    shows_when="more than 17408 pairs of a token and a head",
    killed_by=("test_rope_at_production_counts",),
)
class PositionsOfOneLaunch(TorchAbsorbed):
    """Tokens beyond the first launch have the positions that it left behind."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        heads = x.shape[-2] if x.ndim > positions.ndim + 1 else 1
        token = torch.arange(positions.numel(), device=positions.device) % max(1, 17408 // heads)
        return super().rope(x, positions.flatten()[token].reshape(positions.shape), rope=rope)


@planted(
    "B41",
    source=("https://github.com/pytorch/torchtitan/pull/4117",),
    symptom="a model whose checkpoint states its original context twice loses quality",
    shows_when="max_position_embeddings is not beyond the original context, and YaRN always applies",
    killed_by=("test_rope_agrees_with_reference",),
)
class YarnOffWithinTheOriginal(TorchAbsorbed):
    """YaRN is left out unless max_position_embeddings exceeds the original context, whatever the configuration says."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (
            rope.yarn is not None
            and (rope.max_position_embeddings or 2**30) <= rope.yarn.original_max_position_embeddings
        ):
            rope = RopeConfig(dim=rope.dim, theta=rope.theta, interleaved=rope.interleaved)
        return super().frequencies(rope, device, dtype)


@planted(
    "X-yarn-always-on",
    symptom="a model is worse with the configuration of its short context",
    shows_when="YaRN applies beyond the original context, and max_position_embeddings is not",
    killed_by=("test_rope_agrees_with_reference",),
)
class YarnAlwaysOn(TorchAbsorbed):
    """Frequencies are interpolated whatever the context."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        if rope.yarn is not None:
            rope = RopeConfig(
                dim=rope.dim,
                theta=rope.theta,
                interleaved=rope.interleaved,
                yarn=rope.yarn,
                max_position_embeddings=2**30,
            )
        return super().frequencies(rope, device, dtype)


@planted(
    "A40",
    source=("https://github.com/vllm-project/vllm/pull/46280",),
    symptom="a model whose configuration states its attention factor answers too flatly",
    shows_when="a YaRN configuration that states attention_factor",
    killed_by=("test_rope_agrees_with_reference",),
)
class AttentionFactorDropped(TorchAbsorbed):
    """The factor on cos and sin is always derived."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        yarn = rope.active_yarn
        return 1.0 if yarn is not None and yarn.attention_factor is not None else super().cos_sin_factor(rope)


@planted(
    "X-range-always-truncated",
    symptom="a model with a fractional correction range is slightly off at every length",
    shows_when="a YaRN configuration with truncate=False",
    killed_by=("test_rope_agrees_with_reference",),
)
class RangeAlwaysTruncated(TorchAbsorbed):
    """The correction range is rounded to whole pairs, whatever the configuration says."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        yarn = rope.active_yarn
        if yarn is not None and not yarn.truncate:
            stated = vars(yarn) | {"truncate": True}
            rope = RopeConfig(dim=rope.dim, theta=rope.theta, interleaved=rope.interleaved, yarn=type(yarn)(**stated))
        return super().frequencies(rope, device, dtype)


@planted(
    "X-softmax-mscale-dropped",
    symptom="a model that wants no temperature gets one",
    shows_when="a YaRN configuration that states softmax_mscale",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class SoftmaxMscaleDropped(TorchAbsorbed):
    """The temperature is always derived from mscale_all_dim."""

    def softmax_scale(self, config: Any) -> float:
        yarn = None if config.rope is None else config.rope.active_yarn
        if yarn is None or yarn.softmax_mscale is None:
            return super().softmax_scale(config)
        derived = type(yarn)(**vars(yarn) | {"softmax_mscale": None})
        return super().softmax_scale(config) / yarn.softmax_factor * derived.softmax_factor


@planted(
    "X-65536-tokens-written",
    symptom="the largest batches of prompts overwrite their own beginning",
    shows_when="more than 65536 new tokens",
    killed_by=("test_write_cache_at_production_counts",),
)
class TokensWrittenIn16Bits(TorchAbsorbed):
    """A grid has 65536 blocks at most, and a token each; later ones are not written."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().write_cache(latent[: 2**16], k_pe[: 2**16], kv_cache, slot_mapping[: 2**16])


@planted(
    "X-rows-merged-in-one-grid",
    symptom="chunked prefill is right until a chunk is long",
    shows_when="more than 2048 rows of tokens and heads",
    killed_by=("test_merge_at_production_counts",),
)
class RowsMergedInOneGrid(TorchAbsorbed):
    """Rows beyond 2048 have the shares of the row 2048 before."""

    def weighted_parts(self, shares: Tensor, outs: Tensor) -> Tensor:
        rows = shares.flatten(1)
        row = torch.arange(rows.shape[1], device=shares.device) % 2048
        return super().weighted_parts(rows[:, row].reshape(shares.shape), outs)


@planted(
    "X-positions-from-zero",
    symptom="chunked prefill and speculative decoding lose track of where they are",
    shows_when="queries and keys at other positions than they are counted from",
    killed_by=("test_decode_depends_on_relative_positions_only",),
)
class PositionsOfQueriesFromZero(TorchAbsorbed):
    """Positions from 4096 on are counted from 0 again."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        return super().rope(x, positions % 4096, rope=rope)


@planted(
    "X-positions-of-a-layer-wrap",
    symptom="a layer is right up to the table's length",
    shows_when="prompt and decoded tokens lie on both sides of position 4096",
    killed_by=("test_layer_depends_on_relative_positions_only",),
)
class PositionsOfALayerWrap(TorchAbsorbed):
    """The layer's table of cos and sin has 4096 rows, and begins again."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: Any) -> Tensor:
        return super().layer_rope(x, positions % 4096, config)
