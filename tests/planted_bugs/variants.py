"""Faults of the options that single models have: factors on latents, a norm on k_pe, LongRoPE, temperature, several tokens a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import Llama4Scaling, MLAConfig, RopeConfig

AGREES = "test_layer_prefill_agrees_with_reference"


@planted(
    "A17",
    source=("https://github.com/antonellof/ferrox/pull/213",),
    symptom="Mistral-Large-3 degrades in long contexts",
    shows_when="a position past the original context",
    killed_by=(AGREES,),
)
class TemperatureDropped(TorchAbsorbed):
    """llama_4_scaling is not read: the factor of every query is 1."""

    def temperature(self, positions: Tensor, scaling: Llama4Scaling, dtype: torch.dtype) -> Tensor:
        return torch.ones_like(super().temperature(positions, scaling, dtype))


@planted(
    "X70",
    symptom="LongCat-Flash writes nonsense: its scores are several times too small",
    shows_when="a model with mla_scale_q_lora or mla_scale_kv_lora",
    killed_by=(AGREES, "test_layer_decode_agrees_with_reference"),
)
class LatentsNotScaled(TorchAbsorbed):
    """DeepSeek's projections serve a model whose latents are scaled."""

    def project_query(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        return super().project_query(hidden, positions, weights, replace(config, mla_scale_q_lora=False))

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        return super().project_latent(hidden, positions, weights, replace(config, mla_scale_kv_lora=False))


@planted(
    "X71",
    symptom="positions weigh too much",
    shows_when="a model with mla_scale_kv_lora and rope dimensions",
    killed_by=(AGREES,),
)
class WholeRowScaled(TorchAbsorbed):
    """The factor of the latent multiplies the whole cached row, k_pe too."""

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        latent, k_pe = super().project_latent(hidden, positions, weights, config)
        return latent, self.scaled(k_pe, config.kv_lora_scale)


@planted(
    "X-k-pe-not-normalized",
    symptom="positions weigh too much or too little, token by token",
    shows_when="a model with k_pe_norm",
    killed_by=(AGREES, "test_layer_decode_agrees_with_reference"),
)
class KPeNotNormalized(TorchAbsorbed):
    """DeepSeek's projection serves a model whose k_pe has a norm."""

    def k_pe_norm(self, k_pe: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return k_pe


@planted(
    "X-k-pe-normalized-after-rotation",
    symptom="short prompts are right, long ones degrade",
    shows_when="a model with k_pe_norm and a rotary embedding, beyond position 0",
    killed_by=(AGREES, "test_layer_decode_agrees_with_reference"),
)
class KPeNormalizedAfterRotation(TorchAbsorbed):
    """The norm's weight multiplies dims that the rotation has mixed; its root mean square is the same."""

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        latent, k_pe = super().project_latent(hidden, positions, weights, replace(config, k_pe_norm=False))
        return latent, self.k_pe_norm(k_pe, weights, config)


@planted(
    "X72",
    symptom="a prompt is understood until the conversation passes the original context",
    shows_when="a model of long context and a position within the original one",
    killed_by=("test_rope_agrees_with_reference",),
)
class FactorsByPosition(TorchAbsorbed):
    """Early tokens are rotated with the short factors although the model is in its long context."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        angles = super().angles(positions, rope, dtype)
        if rope.longrope is None:
            return angles
        original = rope.longrope.original_max_position_embeddings
        within = super().angles(positions, replace(rope, max_position_embeddings=original), dtype)
        return torch.where(positions[..., None] < original, within, angles)


@planted(
    "X73",
    symptom="long contexts degrade slowly",
    shows_when="LongRoPE in a context beyond the original one",
    killed_by=("test_rope_agrees_with_reference",),
)
class LongRopeWithoutFactor(TorchAbsorbed):
    """LongRoPE's frequencies without its factor on cos and sin."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        return 1.0 if rope.longrope is not None else rope.cos_sin_factor


@planted(
    "X74",
    symptom="drafted tokens past the fourth are rarely accepted",
    shows_when="more than four tokens decoded at once",
    killed_by=("test_layer_decodes_several_tokens_at_once",),
)
class FourTokensAtMost(TorchAbsorbed):
    """The mask of a decode step was written for four tokens; later ones see what the fourth sees."""

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        visible = super().layer_visible(q, k)
        s, t = visible.shape[-2:]
        return visible if s == t else visible[..., torch.arange(s).clamp(max=3), :]
