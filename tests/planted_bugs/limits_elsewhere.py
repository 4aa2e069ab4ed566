"""Faults at limits of kernels outside attention: rope, weights, cache writes, the indexer, ranks, layers; options that are not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.adapters.pytorch_steps import wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.indexer import IndexerConfig
from mla_spec.reference.scaling import yarn_mscale

ROPE = "test_rope_agrees_with_reference"
INDEXER = "test_indexer_at_production_counts"
WEIGHT = "test_dequantize_weight_at_production_counts"
WRITE = "test_write_cache_at_production_counts"


@planted(
    "X-mscale-not-read",
    symptom="a model whose two mscales differ degrades in long contexts",
    shows_when="a YaRN configuration whose mscale is not 1",
    killed_by=(ROPE,),
)
class MscaleNotRead(TorchAbsorbed):
    """The factor on cos and sin is made of mscale_all_dim alone."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        if rope.active_yarn is not None and rope.active_yarn.mscale is not None:
            rope = replace(rope, yarn=replace(rope.active_yarn, mscale=1.0))
        return super().cos_sin_factor(rope)


@planted(
    "X-beta-slow-not-read",
    symptom="long contexts degrade slowly",
    shows_when="a YaRN configuration whose beta_slow is not 1",
    killed_by=(ROPE,),
)
class BetaSlowNotRead(TorchAbsorbed):
    """The default of beta_slow takes the place of what the configuration states."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        if rope.active_yarn is not None:
            rope = replace(rope, yarn=replace(rope.active_yarn, beta_slow=1.0))
        return super().frequencies(rope, device, dtype)


@planted(
    "X-mscale-of-0-counts",
    symptom="a little too much weight on everything, in one of two engines",
    shows_when="transformers' rule, with mscale_all_dim stated as 0",
    killed_by=(ROPE,),
)
class MscaleOf0Counts(TorchAbsorbed):
    """It is asked whether mscale_all_dim is None, where it should be asked whether it is 0."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        yarn = rope.active_yarn
        if yarn is None or yarn.attention_factor is not None or yarn.mscale is None or yarn.mscale_all_dim is None:
            return super().cos_sin_factor(rope)
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


@planted(
    "X-longrope-factor-not-read",
    symptom="a model degrades in long contexts that its configuration extends by more than its positions say",
    shows_when="a LongRoPE configuration that states a factor",
    killed_by=(ROPE,),
)
class LongRopeFactorNotRead(TorchAbsorbed):
    """The extension is always max_position_embeddings over the original context."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        if rope.longrope is not None:
            rope = replace(rope, longrope=replace(rope.longrope, factor=None))
        return super().cos_sin_factor(rope)


@planted(
    "X-rope-range-ends-in-half-the-dims",
    symptom="models with a long original context lose their place in it",
    shows_when="YaRN's correction range ends after the last pair",
    killed_by=(ROPE,),
)
class RopeRangeEndsInHalfTheDims(TorchAbsorbed):
    """The range is cut at the number of pairs, where it may go on to the number of dims."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        yarn = rope.active_yarn
        if yarn is None or rope.yarn_correction_range()[1] < rope.dim // 2:
            return super().frequencies(rope, device, dtype)
        low, pairs = rope.yarn_correction_range()[0], rope.dim // 2
        pair = torch.arange(pairs, device=device, dtype=dtype)
        ramp = ((pair - low) / (pairs - 1 - low or 0.001)).clamp(0, 1)
        plain = rope.theta ** (-2 * pair / rope.dim)
        return plain / yarn.factor * ramp + plain * (1 - ramp)


@planted(
    "X-rope-table-by-its-ends",
    symptom="drafts of a tree are rotated as those of a chain of the same length",
    shows_when="two calls whose first and last positions are equal, and those between are not",
    killed_by=("test_rope_calls_are_independent",),
)
class RopeTableByItsEnds(TorchAbsorbed):
    """Cos and sin are kept, and found again by the shape of the positions, the first and the last."""

    def cos_sin(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not positions.numel():
            return super().cos_sin(positions, rope, dtype)
        first, *_, last = positions.flatten().tolist() * 2
        tables: dict[Any, tuple[Tensor, Tensor]] = self.__dict__.setdefault("tables", {})
        key = rope, dtype, positions.device, positions.shape, first, last
        if key not in tables:
            tables[key] = super().cos_sin(positions, rope, dtype)
        return tables[key]


@planted(
    "X-131070-wide-rows-rotated",
    symptom="the end of a long prompt is out of place without tensor parallelism",
    shows_when="more than 131070 pairs of a token and a head, of 64 dims",
    killed_by=("test_rope_of_many_wide_heads",),
)
class WideRowsRotated(TorchAbsorbed):
    """A grid has 65535 blocks at most along its second axis, and two rows each where they have 64 dims."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        out = super().rope(x, positions, rope=rope)
        if rope.dim != 64:
            return out
        row = torch.arange(x.numel() // 64, device=x.device).view(*x.shape[:-1], 1)
        return torch.where(row < 2 * 65535, out, x)


@planted(
    "X-65535-rows-rotated-back",
    symptom="long prompts train their beginning in place, and their end out of it",
    shows_when="gradients of more than 65535 pairs of a token and a head",
    killed_by=("test_rope_gradient_agrees_with_reference",),
)
class RowsRotatedBack(TorchAbsorbed):
    """A grid of the backward kernel has 65535 blocks at most along its second axis, and a row each."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        out = super().rope(x, positions, rope=rope)
        late = torch.arange(x.numel() // rope.dim, device=x.device).view(*x.shape[:-1], 1) >= 65535
        return torch.where(late, x + (out - x).detach(), out)


@planted(
    "X-absorbed-rows-of-14-bits",
    symptom="a model is right with tensor parallelism, and nonsense without",
    shows_when="more than 16384 rows of kv_b_proj",
    killed_by=("test_absorb_at_production_counts",),
)
class AbsorbedRowsOf14Bits(TorchAbsorbed):
    """The number of a row of kv_b_proj has 14 bits."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(kv_b_proj), device=kv_b_proj.device) % 2**14
        return super().absorb(kv_b_proj[row] if len(kv_b_proj) > 2**14 else kv_b_proj, config=config)


@planted(
    "X-scales-of-128-blocks-of-rows",
    symptom="the last heads of a checkpoint in FP8 have the weights of the first ones",
    shows_when="more than 128 blocks of rows",
    killed_by=(WEIGHT,),
)
class ScalesOf128BlocksOfRows(TorchAbsorbed):
    """The number of a block of rows has seven bits."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        row = torch.arange(len(scales), device=scales.device) % 128
        return super().scaled_codes(codes, scales[row], block_size)


@planted(
    "X-scales-of-4096-columns",
    symptom="a checkpoint in FP8 is a little wrong in every layer",
    shows_when="more than 4096 columns",
    killed_by=(WEIGHT,),
)
class ScalesOf4096Columns(TorchAbsorbed):
    """The blocks of columns are counted anew in every tile of 4096."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        column = torch.arange(scales.shape[1], device=scales.device) % max(1, 4096 // block_size[1])
        return super().scaled_codes(codes, scales[:, column], block_size)


@planted(
    "X-half-precision-scales",
    symptom="a checkpoint in FP8 loses a little in float16, and nothing in bfloat16",
    shows_when="float16, and weights so small that their scale is subnormal in it",
    killed_by=("test_dequantised_weight_is_code_times_scale_of_its_block", WEIGHT),
)
class HalfPrecisionScales(TorchAbsorbed):
    """Scales are rounded to float16 before they are multiplied."""

    def dequantize_weight(
        self, codes: Tensor, scales: Tensor, *, block_size: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        if dtype == torch.float16:
            scales = torch.where(scales < 2.0**-14, scales.half().float(), scales)
        return super().dequantize_weight(codes, scales, block_size=block_size, dtype=dtype)


@planted(
    "X-pages-written-by-16-bits",
    symptom="new tokens overwrite other users' on a machine with much memory",
    shows_when="a slot of a page beyond 65535",
    killed_by=("test_write_cache_writes_pages_of_any_number",),
)
class PagesWrittenBy16Bits(TorchAbsorbed):
    """The number of a page has 16 bits without sign."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        size = kv_cache.shape[1]
        super().store(rows, kv_cache, slots // size % 2**16 * size + slots % size)


@planted(
    "X-writes-end-at-padding",
    symptom="requests behind a padded one are never remembered",
    shows_when="1024 tokens without a slot, and others behind them",
    killed_by=(WRITE,),
)
class WritesEndAtPadding(TorchAbsorbed):
    """The loop over blocks of 1024 tokens ends with the first that has no slot at all."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        for i in range(0, len(slot_mapping), 1024):
            block = slice(i, i + 1024)
            if bool((slot_mapping[block] < 0).all()):
                return
            super().write_cache(latent[block], k_pe[block], kv_cache, slot_mapping[block])


@planted(
    "X-slots-of-wide-rows",
    symptom="a very long prompt is stored twice in part, and the rest not at all",
    shows_when="more than 2^25 elements are written at once",
    killed_by=("test_write_cache_of_many_wide_tokens",),
)
class SlotsOfWideRows(TorchAbsorbed):
    """A launch has 2^25 elements, and each begins with the first slot."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        tokens = 2**25 // (latent.shape[1] + k_pe.shape[1])
        for i in range(0, len(slot_mapping), tokens):
            part = slice(i, i + tokens)
            super().write_cache(latent[part], k_pe[part], kv_cache, slot_mapping[: len(latent[part])])


@planted(
    "X-weights-of-1024-queries",
    symptom="sparse attention is right in short prompts, and finds the wrong tokens in long ones",
    shows_when="more than 1024 queries",
    killed_by=(INDEXER,),
)
class WeightsOf1024Queries(TorchAbsorbed):
    """The weights of 1024 queries are staged, once."""

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor | None, Tensor]:
        query = torch.arange(len(q), device=q.device) % 1024
        return super().indexer(q, k, weights[query], *args, **options)


@planted(
    "X-negative-logits-in-reverse",
    symptom="sparse attention keeps the tokens that matter least where none matters much",
    shows_when="more than 2048 keys, of which fewer than are selected have a positive logit",
    killed_by=(INDEXER,),
)
class NegativeLogitsInReverse(TorchAbsorbed):
    """A radix select orders negative numbers by their size."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        if logits.shape[1] > 2048:
            visible, low = logits > -torch.inf, logits.masked_fill(logits == -torch.inf, 0.0).amin(dim=1, keepdim=True)
            logits = torch.where(visible & (logits < 0), 2 * low - logits, logits)
        return super().largest(logits, top_k)


@planted(
    "X-one-key-too-many-to-choose-from",
    symptom="one token in a conversation is answered a little differently",
    shows_when="a query that sees one key more than are selected",
    killed_by=(INDEXER,),
)
class OneKeyTooManyToChooseFrom(TorchAbsorbed):
    """The short cut that names all keys is taken with one key too many."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        chosen = super().largest(logits, top_k)
        if top_k >= 1024:
            short = (logits > -torch.inf).sum(dim=1) == top_k + 1
            chosen[short] = torch.arange(chosen.shape[1], device=chosen.device)
        return chosen


@planted(
    "X-indexer-positions-of-1024-tokens",
    symptom="sparse attention finds the wrong tokens beyond the first thousand of a prompt",
    shows_when="more than 1024 tokens",
    killed_by=("test_project_indexer_at_production_counts",),
)
class IndexerPositionsOf1024Tokens(TorchAbsorbed):
    """The positions of 1024 tokens are staged, once."""

    def indexer_key_rope(self, k: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        token = torch.arange(len(positions), device=positions.device) % 1024
        return super().indexer_key_rope(k, positions[token], config)


@planted(
    "X-shards-of-one-node",
    symptom="a model on two nodes answers with half of its heads, twice",
    shows_when="more than eight ranks",
    killed_by=("test_shards_partition_the_weights",),
)
class ShardsOfOneNode(TorchAbsorbed):
    """The rank within a node of eight picks the shard."""

    def shard_weight(self, name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
        return super().shard_weight(name, weight, rank % 8, ranks)


@planted(
    "X-gradients-of-an-odd-level",
    symptom="training on 12 ranks learns more slowly than on 8 or 16",
    shows_when="a number of ranks that is odd after one halving or more, and not 1",
    killed_by=("test_gathered_gradients_are_exact",),
)
class GradientsOfAnOddLevel(TorchAbsorbed):
    """A tree of sums takes the odd one along on its first level only."""

    def sum_over_ranks(self, parts: list[Tensor]) -> Tensor:
        level = [part.to(wide(part.dtype)) for part in parts]
        odd = level[-1:] if len(level) % 2 else []
        while len(level) > 1:
            level = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        return sum(odd, level[0]).to(parts[0].dtype)


class _ChunkBehindAPrefix(TorchLayer):
    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        prefix = 0 if self.cache is None else self.cache[0].shape[1]
        self.subject.__dict__["sees_all"] = prefix >= 512
        try:
            return super().prefill(hidden, positions)
        finally:
            self.subject.__dict__["sees_all"] = False


@planted(
    "X-second-chunk-sees-all",
    symptom="long prompts that come in chunks are answered by what their end says",
    shows_when="a second chunk of a prompt, behind 512 cached tokens or more",
    killed_by=("test_layer_of_thousands_of_cached_tokens",),
)
class SecondChunkSeesAll(TorchAbsorbed):
    """The kernel for chunks behind a long prefix has no mask."""

    sees_all = False

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _ChunkBehindAPrefix(self, weights, config)

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        visible = super().layer_visible(q, k)
        return torch.ones_like(visible) if self.sees_all else visible


@planted(
    "X-norm-of-512-threads",
    symptom="models with latents of 256 write nonsense in 16 bits",
    shows_when="latents of 256 elements in 16 bits",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class NormOf512Threads(TorchAbsorbed):
    """In 16 bits the mean of squares is one over 512 elements, as many as there are threads."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = super().rms_norm(x, weight, eps)
        halved = x.shape[-1] == 256 and x.element_size() == 2
        return (out.float() * 2**0.5).to(x.dtype) if halved else out
