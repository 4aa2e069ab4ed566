"""Hugging Face transformers: MLA modules of other models than DeepSeek's, as they differ from DeepSeek-V3's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.adapters.transformers import DeepseekV3
from mla_spec.reference.config import MLAConfig, RopeConfig

V3 = DeepseekV3.supports


class Glm4MoeLite(DeepseekV3):
    """transformers.models.glm4_moe_lite, SDPA."""

    name = "transformers:glm4_moe_lite"
    model, prefix = "glm4_moe_lite", "Glm4MoeLite"


class Youtu(DeepseekV3):
    """transformers.models.youtu, SDPA."""

    name = "transformers:youtu"
    model, prefix = "youtu", "Youtu"


class AXK1(DeepseekV3):
    """transformers.models.axk1, SDPA; queries are always compressed."""

    name = "transformers:axk1"
    model, prefix = "axk1", "AXK1"
    supports = replace(V3, q_lora_rank="required")


class MiniCPM3(DeepseekV3):
    """transformers.models.minicpm3, SDPA; pairs are halves apart."""

    name = "transformers:minicpm3"
    model, prefix = "minicpm3", "MiniCPM3"
    supports = replace(V3, rope_layouts=("half",))

    def extra_config(self, rope: RopeConfig) -> dict[str, Any]:
        return {}


class LongcatFlash(DeepseekV3):
    """transformers.models.longcat_flash, SDPA; latents are always scaled, queries always compressed."""

    name = "transformers:longcat_flash"
    model, prefix, attention_class = "longcat_flash", "LongcatFlash", "MLA"
    supports = replace(V3, rope_layouts=("interleaved",), q_lora_rank="required", mla_scale_lora="always")

    def extra_config(self, rope: RopeConfig) -> dict[str, Any]:
        return {"head_dim": rope.dim}


class Mistral4(DeepseekV3):
    """transformers.models.mistral4, SDPA; queries have a temperature by position, which is 1 where its factor is 0."""

    name = "transformers:mistral4"
    model, prefix = "mistral4", "Mistral4"
    by_position = True
    supports = replace(V3, llama_4_scaling=True)

    def supports_layer(self, config: MLAConfig) -> str:
        """Their default rotary embedding is as wide as the whole head, and YaRN's original length is the temperature's too."""
        scaling, yarn = config.llama_4_scaling, config.rope.active_yarn if config.rope is not None else None
        if yarn is None:
            return "without YaRN its rotary embedding is as wide as the whole head"
        if scaling is None:
            return ""
        same = scaling.original_max_position_embeddings == yarn.original_max_position_embeddings
        return "" if same else "YaRN and the temperature must have the same original_max_position_embeddings"

    def rope_config(self, config: MLAConfig) -> dict[str, Any]:
        theirs = super().rope_config(config)
        scaling = config.llama_4_scaling
        original = 4096 if scaling is None else scaling.original_max_position_embeddings
        theirs["rope_parameters"] = {
            "original_max_position_embeddings": original,
            **theirs["rope_parameters"],
            "llama_4_scaling_beta": 0.0 if scaling is None else scaling.beta,
        }
        return theirs


class KimiLinear(DeepseekV3):
    """transformers.models.kimi_linear, SDPA: the attention of its MLA layers, which has no rotary embedding."""

    name = "transformers:kimi_linear"
    model, prefix = "kimi_linear", "KimiLinear"
    supports = replace(V3, rope_layouts=(), rope_optional=True)

    def rope_config(self, config: MLAConfig) -> dict[str, Any]:
        return {"layer_types": ["full_attention"]}
