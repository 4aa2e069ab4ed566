"""Faults of merging parts by their LSEs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

AGREES = "test_merge_agrees_with_reference"
LSE_AGREES = "test_merge_lse_agrees_with_reference"


@planted(
    "E7-merge",
    source=(
        "https://github.com/vllm-project/vllm/pull/57012",
        "https://github.com/sgl-project/sglang/issues/9363",
    ),
    symptom="crash, or silently wrong merges",
    shows_when="several heads and queries",
    killed_by=(AGREES, LSE_AGREES),
)
class LsesReadByToken(TorchAbsorbed):
    """LSEs [h, s] are read as if they were [s, h]."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        by_token = lses.reshape(*lses.shape[:-2], lses.shape[-1], lses.shape[-2])
        return super().merge(outs, by_token.transpose(-1, -2))


@planted(
    "E8-merge",
    source=(
        "https://github.com/vllm-project/vllm/pull/47079",
        "https://github.com/vllm-project/vllm/pull/28840",
    ),
    symptom="context-parallel decode picks other tokens",
    shows_when="LSEs of the parts differ",
    killed_by=(AGREES, LSE_AGREES, "test_merge_of_decoded_parts_is_the_whole"),
)
class LsesTakenForBase2(TorchAbsorbed):
    """Parts come with natural logarithms, and are merged as if those were binary."""

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        shares, lse = super().shares(lses * math.log(2))
        return shares, lse / math.log(2)


@planted(
    "E16-merge",
    source=(
        "https://github.com/ROCm/aiter/pull/2106",
        "https://github.com/ROCm/aiter/pull/2319",
    ),
    symptom="NaN for some lengths",
    shows_when="a row has no keys in any part",
    killed_by=(AGREES, LSE_AGREES),
)
class EmptyRowsGiveNaN(TorchExplicit):
    """The maximum of LSEs that are all -inf is subtracted from them."""

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(lses - lses.amax(dim=0))
        total = weights.sum(dim=0)
        return weights / total, lses.amax(dim=0) + total.log()


@planted(
    "E19-merge",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/4401",),
    symptom="valid rows return 0",
    shows_when="all LSEs of a row lie below -5e4",
    killed_by=(AGREES, LSE_AGREES),
)
class MaximumStartsAtSentinel(TorchExplicit):
    """The running maximum starts at -5e4, the value used for masked scores."""

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        m = lses.amax(dim=0).clamp(min=-5e4)
        weights = torch.exp(lses - m)
        total = weights.sum(dim=0)
        return weights / total.masked_fill(total == 0, 1.0), m + total.log()


@planted(
    "E22",
    source=(
        "https://github.com/ROCm/aiter/pull/3391",
        "https://github.com/ROCm/aiter/commit/ff61bb399",
    ),
    symptom="the reduction crashes or loses splits",
    shows_when="more than 16 parts",
    killed_by=(AGREES, "test_merge_order_of_parts_changes_nothing", "test_merge_is_associative"),
)
class SplitCapTooSmall(TorchAbsorbed):
    """The reduction has room for 16 parts."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs[:16], lses[:16])


@planted(
    "G17-merge",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/3838",),
    symptom="the LSE is that of one part",
    shows_when="the result is merged again",
    killed_by=(LSE_AGREES, "test_merge_is_associative"),
)
class LseNotWritten(TorchAbsorbed):
    """The LSE of the merged row is never stored, and the buffer still holds the first part's."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs, lses)[0], lses[0].clone()


@planted(
    "X30",
    symptom="NaN for long contexts",
    shows_when="an LSE is beyond what exp can take",
    killed_by=(AGREES, LSE_AGREES),
)
class MergedWithoutMaximum(TorchExplicit):
    """Weights are exp of the LSEs themselves."""

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(lses)
        total = weights.sum(dim=0)
        return weights / total.masked_fill(total == 0, 1.0), total.log()


@planted(
    "X31",
    symptom="the second use of the parts gives another result",
    shows_when="the caller keeps the parts",
    killed_by=("test_merge_does_not_modify_its_inputs",),
)
class AccumulatesInFirstPart(TorchAbsorbed):
    """The sum is formed in the memory of the first part."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge(outs, lses)
        outs[0] = out
        return out, lse


@planted(
    "X-lses-shifted-in-place",
    symptom="the LSEs that are kept for the backward pass are all at most 0",
    shows_when="the caller keeps the parts",
    killed_by=("test_merge_does_not_modify_its_inputs",),
)
class ShiftsLsesInPlace(TorchAbsorbed):
    """The largest LSE is subtracted in the memory of the parts."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        merged = super().merge(outs, lses)
        lses -= lses.amax(dim=0).clamp(min=torch.finfo(lses.dtype).min)
        return merged


@planted(
    "X-vector-of-eight-parts",
    symptom="wrong with eight splits, right with seven and with nine",
    shows_when="exactly eight parts",
    killed_by=("test_merge_order_of_parts_changes_nothing",),
)
class VectorOfEightParts(TorchAbsorbed):
    """Where the parts fill a vector, its last place is taken to be empty."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        kept = 7 if len(lses) == 8 else len(lses)
        return super().merge(outs[:kept], lses[:kept])


@planted(
    "X32",
    symptom="the output changes when the buffer of parts is used again",
    shows_when="the keys were not split",
    killed_by=("test_merge_output_is_not_aliased",),
)
class OnePartReturnedAsItIs(TorchAbsorbed):
    """With one part there is nothing to do, and the part itself is returned."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return (outs[0], lses[0]) if len(outs) == 1 else super().merge(outs, lses)


@planted(
    "X33",
    symptom="wrong weights for some callers",
    shows_when="LSEs are a view of a buffer for more tokens, or stored by token",
    killed_by=("test_merge_reads_strides",),
)
class LsesIgnoreStrides(TorchAbsorbed):
    """LSEs are taken to be contiguous."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs, as_if_contiguous(lses))


@planted(
    "X34",
    symptom="what a split without keys left in its buffer reaches the output",
    shows_when="a row has no keys in any part",
    killed_by=("test_merge_ignores_outputs_of_empty_parts",),
)
class EmptyPartsAtMaskValue(TorchExplicit):
    """-inf is replaced by the value of masked scores, so that rows without keys are averages."""

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        shares, lse = super().shares(lses.clamp(min=-1e4))
        return shares, lse.masked_fill(lses.amax(dim=0) == -torch.inf, -torch.inf)
