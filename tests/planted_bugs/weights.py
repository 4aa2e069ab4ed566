"""Faults of norms, projections and the layout of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "C7-absorb",
    source=("https://github.com/ModelTC/LightLLM/commit/808d8325f",),
    symptom="shape error, or a wrong output projection",
    shows_when="v_head_dim differs from qk_nope_head_dim",
    killed_by=("test_absorb_splits_kv_b_proj", "test_absorbed_equals_explicit"),
)
class ValuesByNopeWidth(TorchAbsorbed):
    """The value rows of a head are taken to begin where the next head's key rows would, were all widths equal."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        n, v = config.qk_nope_head_dim, config.v_head_dim
        head = torch.arange(config.num_heads, device=kv_b_proj.device)[:, None]
        rows = 2 * n * head + torch.arange(n + v, device=kv_b_proj.device)  # [h, n+v]
        w_uk, w_uv = kv_b_proj[rows.clamp(max=len(kv_b_proj) - 1)].split([n, v], dim=1)
        return w_uk, w_uv


@planted(
    "C12-absorb",
    source=("https://github.com/vllm-project/vllm/pull/48986",),
    symptom="an adapter on kv_b_proj has no effect in the absorbed path",
    shows_when="a second weight has the shape of the first",
    killed_by=("test_absorb_calls_are_independent",),
)
class AbsorbedOncePerShape(TorchAbsorbed):
    """The parts of the first weight of a shape are kept, and given for every later one."""

    def __init__(self) -> None:
        self.absorbed: dict[Any, tuple[Tensor, Tensor]] = {}

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        key = config, kv_b_proj.dtype
        return self.absorbed.setdefault(key, super().absorb(kv_b_proj, config=config))


@planted(
    "K4-absorb",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/5412",),
    symptom="wrong weight gradients",
    shows_when="the caller uses the weight again",
    killed_by=("test_absorb_does_not_modify_its_inputs",),
)
class AbsorbsInPlace(TorchAbsorbed):
    """The key rows are scaled in place once they were copied, although another step has kept them."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        w_uk, w_uv = super().absorb(kv_b_proj, config=config)
        absorbed = w_uk.clone(), w_uv.clone()
        w_uk.mul_(0.5)
        return absorbed


@planted(
    "X8",
    symptom="long contexts degrade: scores carry no position",
    shows_when="the model has rope dimensions",
    killed_by=("test_decode_one_hot_by_the_rope_part", "test_decode_agrees_with_reference"),
)
class RopePartDropped(TorchAbsorbed):
    """Scores are products of the latent part alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        width = v.shape[-1]
        return super().attend(q[..., :width], k[..., :width], v, visible, softmax_scale)
