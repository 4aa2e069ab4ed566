"""Faults of the softmax scale: its value, YaRN's mscale², log₂ e."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig, yarn_mscale


@planted(
    "A1",
    source=(
        "https://github.com/AI-Hypercomputer/maxtext/issues/1370",
        "https://github.com/AI-Hypercomputer/maxtext/commit/f1498e186",
    ),
    symptom="training is unstable",
    shows_when="always",
    killed_by=("test_decode_agrees_with_reference", "test_absorbed_equals_explicit"),
)
class DividesByScale(TorchAbsorbed):
    """The query is divided by softmax_scale."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().scores(q, k, 1 / softmax_scale)


@planted(
    "A2",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/787",
        "https://github.com/flashinfer-ai/flashinfer/commit/23413e00a",
    ),
    symptom="decode output far off",
    shows_when="always",
    killed_by=("test_decode_agrees_with_reference",),
)
class Exp2WithoutLog2e(TorchAbsorbed):
    """The kernel takes powers of 2 of scores that were not multiplied by log₂ e."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ln2 = 0.6931471805599453
        return super().softmax(scores * ln2)


@planted(
    "A4",
    source=("https://github.com/huggingface/transformers/pull/47435",),
    symptom="models with YaRN score with too small a scale",
    shows_when="YaRN with mscale_all_dim other than 0, and two keys",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class ScaleWithoutMscale(TorchAbsorbed):
    """YaRN's mscale² never reaches the softmax scale."""

    def softmax_scale(self, config: MLAConfig) -> float:
        return config.qk_head_dim**-0.5


@planted(
    "A7",
    source=("https://github.com/AI-Hypercomputer/maxtext/issues/3138",),
    symptom="attention differs from that of another backend",
    shows_when="always",
    killed_by=("test_decode_agrees_with_reference",),
)
class ScalesTwice(TorchAbsorbed):
    """The query is scaled before a kernel that scales again."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().scores(q, k, softmax_scale) * softmax_scale


@planted(
    "A11",
    source=("https://github.com/kekzl/imp/pull/880",),
    symptom="perplexity degrades with position",
    shows_when="YaRN with mscale_all_dim other than 0",
    killed_by=(
        "test_rope_preserves_norm",
        "test_rope_at_position_zero_is_identity",
    ),
)
class MscaleOnCosSin(TorchAbsorbed):
    """cos and sin are multiplied by yarn_mscale(factor, mscale_all_dim) instead of the ratio of the two mscales."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        yarn = rope.active_yarn
        return 1.0 if yarn is None else yarn_mscale(yarn.factor, yarn.mscale_all_dim or 0.0)


@planted(
    "A16",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/3698",),
    symptom="the user's softmax_scale has no effect",
    shows_when="softmax_scale is not the default",
    killed_by=("test_decode_agrees_with_reference",),
)
class IgnoresSoftmaxScale(TorchAbsorbed):
    """decode takes the scale from the width of the query, whatever it is told."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().scores(q, k, q.shape[-1] ** -0.5)


@planted(
    "A18",
    source=("https://github.com/AMD-AGI/Primus/pull/930",),
    symptom="training mathematics differs from the reference model",
    shows_when="YaRN whose mscale_all_dim is 0",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class MscaleWhereThereIsNone(TorchAbsorbed):
    """The scale gets mscale² although the model puts the temperature on cos and sin."""

    def softmax_scale(self, config: MLAConfig) -> float:
        yarn = None if config.rope is None else config.rope.active_yarn
        if yarn is None or yarn.mscale_all_dim:
            return config.scale
        return config.scale * yarn_mscale(yarn.factor, yarn.mscale or 0.0) ** 2


@planted(
    "C13",
    source=("https://github.com/ml-explore/mlx-lm/pull/868",),
    symptom="the model repeats its previous answer",
    shows_when="16-bit tensors and scores of some size",
    killed_by=("test_decode_agrees_with_reference",),
)
class RoundsUnscaledScores(TorchAbsorbed):
    """q kᵀ is rounded to the dtype of q before it is scaled."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        dtype = wide(q.dtype)
        product = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
        return product.to(q.dtype).to(dtype) * torch.tensor(softmax_scale, dtype=dtype)


@planted(
    "X-root-of-the-scale-on-both-operands",
    symptom="a model with a negative softmax scale attends to what it should ignore",
    shows_when="softmax_scale is negative",
    killed_by=(
        "test_decode_agrees_with_reference",
        "test_prefill_agrees_with_reference",
        "test_sparse_prefill_agrees_with_reference",
        "test_sparse_decode_agrees_with_reference",
    ),
)
class ScaleWithoutSign(TorchAbsorbed):
    """Query and key are each multiplied by the root of |softmax_scale|, and neither by its sign."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().scores(q, k, abs(softmax_scale))


@planted(
    "X-largest-product-before-the-scale",
    symptom="NaN in every row of a model with a negative softmax scale",
    shows_when="softmax_scale is negative",
    killed_by=("test_decode_agrees_with_reference", "test_prefill_agrees_with_reference"),
)
class LargestProductSubtracted(TorchAbsorbed):
    """As flash kernels do, the largest product q·k is subtracted before the scale, whose sign makes it the smallest score."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        if k.shape[-2] == 0:
            return super().attend(q, k, v, visible, softmax_scale)
        products = self.masked(self.scores(q, k, 1.0), visible)  # [b, h, s, t]
        largest = products.amax(dim=-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = torch.exp((products - largest) * softmax_scale)
        total = weights.sum(dim=-1, keepdim=True)
        lse = (largest * softmax_scale + total.log()).squeeze(-1)
        return self.weighted_values(weights / total.masked_fill(total == 0, 1.0), v).to(q.dtype), lse
