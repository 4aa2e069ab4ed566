"""Faults of the lightning indexer: logits, masks, selection."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.config import RopeConfig

LOGITS = "test_indexer_logits_agree_with_reference"
SELECTS = "test_indexer_selects_the_largest_logits"
TIES = "test_indexer_ties_go_to_the_smaller_index"
FUTURE = "test_indexer_ignores_future_keys"
SEQUENCES = "test_indexer_sequences_do_not_see_each_other"
EVERY_KEY = "test_selecting_every_key_is_causal_attention"
SELECTED = "test_sparse_prefill_attends_to_what_the_indexer_selected"


@planted(
    "B2-indexer",
    source=(
        "https://github.com/sgl-project/sglang/pull/13495",
        "https://github.com/sgl-project/sglang/issues/13530",
    ),
    symptom="finds less and less in contexts longer than top_k",
    shows_when="the indexer's rotary layout is not that of the attention",
    killed_by=("test_indexer_of_rotated_operands",),
)
class IndexerRotatesAsAttention(TorchAbsorbed):
    """Pairs are always interleaved, as in the attention."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        return super().rope(x, positions, rope=replace(rope, interleaved=True))


@planted(
    "D15-indexer",
    source=("https://github.com/huggingface/transformers/pull/48363",),
    symptom="queries select keys that come after them",
    shows_when="prefill",
    killed_by=(FUTURE, SELECTS, EVERY_KEY),
)
class IndexerWithoutMask(TorchExplicit):
    """The path without a mask tensor leaves causality to the attention."""

    def indexer_visible(self, s: int, t: int, device: torch.device) -> Tensor:
        return torch.ones(s, t, dtype=torch.bool, device=device)


@planted(
    "F7-indexer",
    source=("https://github.com/ROCm/aiter/pull/4774",),
    symptom="keys far back are found only by chance",
    shows_when="a sequence is longer than what the offset can hold, here 16 keys",
    killed_by=(LOGITS, SELECTS),
)
class LogitsBeyondOffsetAreZero(TorchAbsorbed):
    """Loads beyond a 32-bit offset return 0."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        logits = super().indexer_logits(q, k, weights)
        logits[:, 16:] = 0.0
        return logits


@planted(
    "J3",
    source=(
        "https://github.com/tile-ai/tilelang/pull/2513",
        "https://github.com/tile-ai/tilelang/commit/1f2d69cc9",
    ),
    symptom="the selection of some rows is what memory held",
    shows_when="a query sees exactly top_k keys",
    killed_by=(SELECTS, TIES),
)
class NoThresholdAtExactlyK(TorchExplicit):
    """The search for a bin with more than k keys at or above it finds none where there are exactly k."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        none = (~torch.isneginf(logits)).sum(dim=-1, keepdim=True) == top_k
        return super().largest(logits, top_k).masked_fill(none, 0)


@planted(
    "J8",
    source=("https://github.com/tenstorrent/tt-metal/pull/47832",),
    symptom="the loss that trains the indexer is wrong; the selection is not",
    shows_when="logits are used",
    killed_by=(LOGITS,),
)
class ScaleOfAnotherHeadDim(TorchAbsorbed):
    """Logits carry the scale of another head dim."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return super().indexer_logits(q, k, weights) * math.sqrt(128 / 192)


@planted(
    "J9",
    source=("https://github.com/sgl-project/sglang/pull/13459",),
    symptom="a little less accurate",
    shows_when="logits lie close together",
    killed_by=(LOGITS,),
)
class WeightsInBfloat16(TorchAbsorbed):
    """The weights of the heads are rounded to bfloat16."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return super().indexer_logits(q, k, weights.bfloat16().to(weights.dtype))


@planted(
    "K4-indexer",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/5412",),
    symptom="wrong weight gradients",
    shows_when="the caller uses the weights again",
    killed_by=("test_indexer_does_not_modify_its_inputs",),
)
class WeightsScaledInPlace(TorchExplicit):
    """A fused step writes the weights in place, which another step has kept."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        logits = super().indexer_logits(q, k, weights)
        weights.mul_(0.5)
        return logits


@planted(
    "X110",
    symptom="selects keys that some head turns away from",
    shows_when="several heads, some of whose products are negative",
    killed_by=(LOGITS, SELECTS),
)
class ReluAfterTheSum(TorchAbsorbed):
    """Relu is applied to the sum over heads."""

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        scores = q.to(weights.dtype) @ k.to(weights.dtype).T  # [s, h, t]
        return torch.relu((scores * weights[..., None]).sum(dim=1))


@planted(
    "X111",
    symptom="two runs of one model select differently",
    shows_when="equal logits at the border of the selection",
    killed_by=(TIES,),
)
class TiesGoToTheLargerIndex(TorchExplicit):
    """Of equal logits the last is selected."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        return logits.shape[-1] - 1 - super().largest(logits.flip(-1), top_k)


@planted(
    "X112",
    symptom="only the first request of a batch is right",
    shows_when="several packed sequences",
    killed_by=(SEQUENCES, SELECTS, EVERY_KEY),
)
class OneSequenceOfAll(TorchAbsorbed):
    """All packed tokens are one sequence."""

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, top_k: int
    ) -> tuple[Tensor | None, Tensor]:
        return super().indexer(q, k, weights, cu_seqlens_q[[0, -1]], cu_seqlens_k[[0, -1]], top_k=top_k)


@planted(
    "X113",
    symptom="only the first request of a batch is right",
    shows_when="several packed sequences",
    killed_by=(SELECTS, EVERY_KEY),
)
class IndicesWithinTheirSequence(TorchExplicit):
    """Indices count from the start of each sequence."""

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, top_k: int
    ) -> tuple[Tensor | None, Tensor]:
        logits, indices = super().indexer(q, k, weights, cu_seqlens_q, cu_seqlens_k, top_k=top_k)
        first = cu_seqlens_k[:-1].repeat_interleave(cu_seqlens_q.diff())[:, None]  # [tokens, 1]
        return logits, torch.where(indices < 0, indices, indices - first)


@planted(
    "X114",
    symptom="wrong only when keys are a slice of a fused projection",
    shows_when="rows of k lie further apart than they are long",
    killed_by=("test_indexer_reads_strides",),
)
class KeysIgnoreStrides(TorchAbsorbed):
    """The keys are taken to be contiguous."""

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, top_k: int
    ) -> tuple[Tensor | None, Tensor]:
        return super().indexer(q, as_if_contiguous(k), weights, cu_seqlens_q, cu_seqlens_k, top_k=top_k)


@planted(
    "X-workspace-of-indexer-and-attention",
    symptom="garbage with both kernels, while the tests of each pass",
    shows_when="sparse_prefill gets the tensor that indexer returned",
    killed_by=(SELECTED, EVERY_KEY),
)
class SharedWorkspace(TorchExplicit):
    """Both kernels take their scratch memory from the start of one buffer, where the selected indices still lie."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)

    def scratch(self, like: Tensor) -> Tensor:
        """Int32 memory of the shape of ``like``."""
        if self.buffer.numel() < like.numel():
            self.buffer = torch.empty(like.numel(), dtype=torch.int32, device=like.device)
        return self.buffer[: like.numel()].view(like.shape)

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, top_k: int
    ) -> tuple[Tensor | None, Tensor]:
        logits, indices = super().indexer(q, k, weights, cu_seqlens_q, cu_seqlens_k, top_k=top_k)
        return logits, self.scratch(indices).copy_(indices)

    def sparse_prefill(self, q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> Any:
        row = torch.arange(len(indices), device=q.device)
        self.scratch(row).copy_(row * indices.shape[-1])  # where each row of indices begins
        return super().sparse_prefill(q, kv, indices, **options)


@planted(
    "X-ties-counted-in-16-bits",
    symptom="sparse attention finds nothing in a very long document that repeats itself",
    shows_when="65536 equal logits or more, of which some are selected",
    killed_by=("test_indexer_at_production_counts", "test_indexer_ties_go_to_the_smaller_index"),
)
class TiesCountedIn16Bits(TorchAbsorbed):
    """A radix select counts the keys of a bucket in 16 bits, and takes so many of them."""

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        chosen = super().largest(logits, top_k)
        equal = logits == logits.gather(1, chosen[:, -1:])
        counted = equal.sum(dim=1, keepdim=True) % 2**16
        return super().largest(logits.masked_fill(equal & (equal.cumsum(dim=1) > counted), -torch.inf), top_k)
