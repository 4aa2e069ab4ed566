"""Faults of norms, projections and the layout of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig


@planted(
    "C1",
    source=(
        "https://github.com/huggingface/transformers/pull/44346",
        "https://github.com/huggingface/transformers/pull/44585",
        "https://github.com/vllm-project/vllm/pull/35515",
    ),
    symptom="norms of the latents use the eps of their class",
    shows_when="an eps other than 1e-6 and small latents",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class NormWithDefaultEps(TorchAbsorbed):
    """The eps of the configuration is not passed on.

    Published implementations disagree on which eps the latent norms have; here the case states it.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, 1e-6)


@planted(
    "C3",
    source=("https://github.com/fla-org/flash-linear-attention/commit/f494277f",),
    symptom="underflow",
    shows_when="float16 and small latents",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class NormInLowPrecision(TorchAbsorbed):
    """The norm squares and averages in the dtype of its input."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


@planted(
    "C4",
    source=("https://github.com/vllm-project/vllm/pull/56773",),
    symptom="garbage from attention",
    shows_when="always",
    killed_by=(
        "test_absorb_splits_kv_b_proj",
        "test_absorbed_equals_explicit",
    ),
)
class PackedWeightReadRowMajor(TorchAbsorbed):
    """kv_b_proj was packed for another kernel and is read as if it were not."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        return super().absorb(kv_b_proj.T.contiguous().view_as(kv_b_proj), config=config)


@planted(
    "C7",
    source=("https://github.com/ModelTC/LightLLM/commit/808d8325f",),
    symptom="shape error, or a wrong output projection",
    shows_when="v_head_dim differs from qk_nope_head_dim",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class OutputByNopeWidth(TorchAbsorbed):
    """o_proj is viewed as heads of width qk_nope_head_dim."""

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        per_head = weights["o_proj"].T.reshape(config.num_heads, config.qk_nope_head_dim, -1)  # [h, n, e]
        return torch.einsum("bshv,hve->bse", out, per_head)


@planted(
    "X8",
    symptom="long contexts degrade: scores carry no position",
    shows_when="the model has rope dimensions",
    killed_by=("test_one_hot_by_the_rope_part", "test_decode_agrees_with_reference"),
)
class RopePartDropped(TorchAbsorbed):
    """Scores are products of the latent part alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        width = v.shape[-1]
        return super().attend(q[..., :width], k[..., :width], v, visible, softmax_scale)
