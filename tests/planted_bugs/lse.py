"""Faults of the LSE, of splits over the keys, and of rows without keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted


@planted(
    "E7",
    source=(
        "https://github.com/vllm-project/vllm/pull/57012",
        "https://github.com/vllm-project/vllm-xpu-kernels/pull/479",
        "https://github.com/sgl-project/sglang/issues/9363",
    ),
    symptom="crash, or silently wrong merges",
    shows_when="several heads and queries",
    killed_by=("test_decode_lse_agrees_with_reference",),
)
class LseLaidOutByToken(TorchAbsorbed):
    """The LSE is stored [b, s, h] and returned as [b, h, s]."""

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*args, **options)
        assert lse is not None
        return out, lse.transpose(1, 2).reshape(lse.shape)


@planted(
    "E8",
    source=(
        "https://github.com/vllm-project/vllm/pull/47079",
        "https://github.com/vllm-project/vllm/pull/28840",
    ),
    symptom="context-parallel decode picks other tokens",
    shows_when="parts of different LSEs are merged",
    killed_by=("test_decode_lse_agrees_with_reference", "test_decode_lse_recombines_disjoint_parts"),
)
class LseInBase2(TorchAbsorbed):
    """The LSE is a binary logarithm."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = super().softmax(scores)
        return weights, lse / 0.6931471805599453


@planted(
    "E16",
    source=(
        "https://github.com/ROCm/aiter/pull/2106",
        "https://github.com/ROCm/aiter/pull/2128",
        "https://github.com/ROCm/aiter/pull/2319",
    ),
    symptom="NaN for some lengths",
    shows_when="the last split has fewer keys than there are queries",
    killed_by=("test_decode_agrees_with_reference", "test_decode_two_equal_maxima_give_their_mean"),
)
class MaskedSplitGivesNaN(TorchExplicit):
    """A split that a query does not see has maximum -inf, and exp(-inf - -inf) is NaN."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if scores.shape[-1] == 0:
            return super().softmax(scores)
        splits = scores.split(16, dim=-1)
        local = torch.stack([split.amax(dim=-1) for split in splits])  # [splits, b, h, s]
        m = local.amax(dim=0)
        rescale = torch.exp(local - m)
        weights = [torch.exp(split - top[..., None]) for split, top in zip(splits, local, strict=True)]
        total = sum(w.sum(dim=-1) * r for w, r in zip(weights, rescale, strict=True))
        p = torch.cat([w * (r / total)[..., None] for w, r in zip(weights, rescale, strict=True)], dim=-1)
        # Rows that see nothing at all have a path of their own.
        empty = m == -torch.inf
        return p.masked_fill(empty[..., None], 0.0), (m + total.log()).masked_fill(empty, -torch.inf)


@planted(
    "E19",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/4401",),
    symptom="valid rows return 0",
    shows_when="all scores of a row lie below -5e4",
    killed_by=("test_decode_one_hot_far_below_zero",),
)
class FiniteInitialMaximum(TorchAbsorbed):
    """The running maximum starts at -5e4, the value used for masked scores."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if scores.shape[-1] == 0:
            return super().softmax(scores)
        m = scores.amax(dim=-1, keepdim=True).clamp(min=-5e4)
        weights = torch.exp(scores - m)
        total = weights.sum(dim=-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1.0), (m + total.log()).squeeze(-1)


@planted(
    "G11",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/13779",
        "https://github.com/vllm-project/vllm-ascend/commit/059df1f419",
    ),
    symptom="negative key length",
    shows_when="a sequence is shorter than the first split",
    killed_by=("test_decode_agrees_with_reference",),
)
class NegativeSplitLength(TorchExplicit):
    """The keys of the second split are counted without clamping at 0."""

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        page_size, split = kv_cache.shape[1], 4
        second = torch.arange(length - split, device=kv_cache.device) + split
        rows = kv_cache[table[second // page_size].long(), second % page_size, 0]
        return torch.cat([super().gather(kv_cache, table, split), rows])
