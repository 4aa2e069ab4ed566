"""Faults of the sums."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.adapters.pytorch_steps import wide
from mla_spec.planted_bugs.registry import planted


@planted(
    "G17",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/3838",),
    symptom="output halved, which a cosine does not see",
    shows_when="always",
    killed_by=("test_decode_agrees_with_reference",),
)
class OutputHalved(TorchAbsorbed):
    """The sum of a row's weights counts every weight twice."""

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        return super().weighted_values(p, v) / 2


class BatchInvariant(TorchExplicit):
    """Correct: one sequence at a time, and no matrix product, whose bits may depend on where in memory its operands are."""

    name = "torch-batch-invariant"
    profile = MappingProxyType(
        {dtype: replace(profile, batch_invariant=True) for dtype, profile in TorchExplicit.profile.items()}
    )

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        dtype = wide(q.dtype)
        return (q.to(dtype)[..., None, :] * k.to(dtype)[..., None, :, :]).sum(-1) * softmax_scale

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        return (p[..., None] * v.to(p.dtype)[..., None, :, :]).sum(-2)


@planted(
    "M4",
    source=("https://github.com/deepseek-ai/FlashMLA/issues/212",),
    symptom="the last bits change with the other sequences of the batch",
    shows_when="bits are compared",
    killed_by=("test_decode_sequences_are_independent",),
)
class SplitsByBatchSize(BatchInvariant):
    """Over how many splits the keys are summed depends on the batch."""

    splits = 1

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        self.splits = len(q)
        return super().decode(q, *args, **options)

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        parts = zip(p.tensor_split(self.splits, dim=-1), v.tensor_split(self.splits, dim=-2), strict=True)
        return sum(super(SplitsByBatchSize, self).weighted_values(*part) for part in parts)


@planted(
    "X115",
    symptom="activations drift from those of training, layer after layer",
    shows_when="the mean of squares is rounded to a 16-bit dtype; a layer's own error hides it in its output",
    killed_by=("test_layer_stages_agree_with_reference",),
)
class NormInDtype(TorchAbsorbed):
    """RMSNorm is computed in the dtype of its input."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
