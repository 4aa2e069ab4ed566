"""Hugging Face transformers: the attention modules of DeepSeek-V2 and V3, with their own rotary embedding and cache.

Written for transformers 5. The module is built alone, from an ``MLAConfig``; the caller of a module supplies its mask, so
the adapter makes it with the library's own ``create_causal_mask``. float64 is not offered: the modules compute norms and
rotary tables in float32 whatever the dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mla_spec.adapters.pytorch_layer import TRACED_WEIGHTS
from mla_spec.bounds.profile import Profile, RopeProfile
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.subjects.supports import Supports

_DTYPES = ("float32", "float16", "bfloat16")


def _profile(dtype: str, *, eager: bool, rope: RopeProfile) -> Profile:
    """What the modules round, read from modeling_deepseek_v2.py and v3.py of transformers 5.23.

    Eager attention stores q·kᵀ and the scaled scores in the dtype, and the normalised P too. SDPA takes the math backend
    for unequal head dims on CPU: it multiplies q and k by the root of the scale and keeps P in float32; other devices may
    choose a backend that rounds P, so the profile does not rely on that.
    """
    if eager:
        return Profile.default(dtype, rope=rope, score_format=dtype, score_roundings=2, row_sum="normalised")
    return Profile.default(dtype, rope=rope, operand_roundings=4, tile=16)


class _TransformersLayer:
    """One attention module with its DynamicCache.

    It is called with the tensors of ``weights`` in the place of its own parameters, so that gradients reach them.
    """

    def __init__(
        self, module: Any, weights: Mapping[str, Tensor], rotary: Any, config: Any, by_position: bool = False
    ) -> None:
        self.module, self.rotary, self.config, self.by_position = module, rotary, config, by_position
        self.parameters = {f"{name}.weight": w for name, w in weights.items()}
        self.reset()

    def reset(self) -> None:
        from transformers.cache_utils import DynamicCache

        self.cache = DynamicCache(config=self.config)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        past = self.cache.get_seq_length()
        # The mask goes by cache slot: rope positions may start anywhere.
        slots = torch.arange(past, past + hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=self.cache,
            position_ids=slots,
        )
        arguments = {
            "hidden_states": hidden,
            "attention_mask": mask,
            "past_key_values": self.cache,
            **({} if self.rotary is None else {"position_embeddings": self.rotary(hidden, positions)}),
            **({"position_ids": positions} if self.by_position else {}),
        }
        out: Tensor = functional_call(self.module, self.parameters, kwargs=arguments, strict=True)[0]
        return out

    prefill = decode = forward

    def trace(self, method: str, hidden: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """What the module's projections and norms give in a call, by name."""
        stages: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, arguments, out: stages.update({name: out})

        found = {name: getattr(self.module, name, None) for name in TRACED_WEIGHTS}
        hooks = [module.register_forward_hook(keep(name)) for name, module in found.items() if module is not None]
        try:
            stages["o_proj"] = getattr(self, method)(hidden, positions)
            return stages
        finally:
            for hook in hooks:
                hook.remove()

    def cache_bytes(self) -> int:
        layers: list[Any] = list(self.cache.layers)
        rows = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in rows)


class DeepseekV3:
    """transformers.models.deepseek_v3, SDPA."""

    name = "transformers:deepseek_v3"
    model, prefix = "deepseek_v3", "DeepseekV3"
    package = "transformers"
    attention_class, by_position = "Attention", False
    attention = "sdpa"
    # The cos/sin table is cast to the dtype, and the rotation computed in it.
    profile: Mapping[str, Profile] = {
        d: _profile(d, eager=False, rope=RopeProfile(table=d, rotation=d)) for d in _DTYPES
    }
    supports = Supports(
        dtypes=_DTYPES,
        backward=("layer",),
        rope_optional=False,
        latent_norm_eps=1e-6,
        longrope=False,
        mla_scale_lora=False,
        k_pe_norm=False,
        llama_4_scaling=False,
        yarn_options=("attention_factor", "truncate", "applies"),
    )

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        if not importlib.util.find_spec("transformers"):
            return "transformers is not installed"
        found = importlib.util.find_spec(f"transformers.models.{cls.model}")
        return "" if found else f"this version of transformers has no {cls.model}"

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> _TransformersLayer:
        package = f"transformers.models.{self.model}"
        modeling = importlib.import_module(f"{package}.modeling_{self.model}")
        configuration = importlib.import_module(f"{package}.configuration_{self.model}")
        their_config = getattr(configuration, f"{self.prefix}Config")(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            num_hidden_layers=1,
            attention_bias=False,
            attn_implementation=self.attention,
            **self.rope_config(config),
        )
        first = next(iter(weights.values()))
        module = getattr(modeling, f"{self.prefix}{self.attention_class}")(their_config, layer_idx=0)
        module = module.to(device=first.device, dtype=first.dtype).eval()
        rotary = None
        if config.rope is not None:
            # The rotary module stays in float32, as models keep it.
            rotary = getattr(modeling, f"{self.prefix}RotaryEmbedding")(config=their_config).to(first.device)
        return _TransformersLayer(module, weights, rotary, their_config, self.by_position)

    def rope_config(self, config: MLAConfig) -> dict[str, Any]:
        """What their configuration says of positions."""
        assert config.rope is not None
        return {
            "rope_parameters": rope_parameters(config.rope),
            "max_position_embeddings": context_length(config.rope),
            **self.extra_config(config.rope),
        }

    def extra_config(self, rope: RopeConfig) -> dict[str, Any]:
        return {"rope_interleave": rope.interleaved}


class DeepseekV3Eager(DeepseekV3):
    """transformers.models.deepseek_v3, eager attention."""

    name = "transformers:deepseek_v3-eager"
    attention = "eager"
    profile = {d: _profile(d, eager=True, rope=RopeProfile(table=d, rotation=d)) for d in _DTYPES}


class DeepseekV2(DeepseekV3):
    """transformers.models.deepseek_v2, SDPA; rotates interleaved pairs as complex float32 numbers."""

    name = "transformers:deepseek_v2"
    model, prefix = "deepseek_v2", "DeepseekV2"
    profile = {d: _profile(d, eager=False, rope=RopeProfile()) for d in _DTYPES}
    # Viewing pairs as complex numbers needs even offsets of the rope part in its row.
    supports = Supports(
        dtypes=_DTYPES,
        backward=("layer",),
        rope_optional=False,
        latent_norm_eps=1e-6,
        rope_layouts=("interleaved",),
        longrope=False,
        mla_scale_lora=False,
        k_pe_norm=False,
        llama_4_scaling=False,
        yarn_options=("attention_factor", "truncate", "applies"),
        layer_dim_multiple=2,
    )

    def extra_config(self, rope: RopeConfig) -> dict[str, Any]:
        return {}


class DeepseekV2Eager(DeepseekV2):
    """transformers.models.deepseek_v2, eager attention."""

    name = "transformers:deepseek_v2-eager"
    attention = "eager"
    profile = {d: _profile(d, eager=True, rope=RopeProfile()) for d in _DTYPES}


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """Their spelling of a RopeConfig."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    yarn = rope.active_yarn
    if yarn is not None:
        parameters |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
            "attention_factor": yarn.attention_factor,
            "truncate": yarn.truncate,
        }
    return {key: value for key, value in parameters.items() if value is not None}


def context_length(rope: RopeConfig) -> int:
    yarn = rope.active_yarn
    return 4096 if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)
