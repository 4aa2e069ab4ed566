"""torchtitan: the attention module of its DeepSeek-V3, with SDPA for its inner attention. It trains, and has no cache.

Written for torchtitan 0.3.0. The module is built alone, by torchtitan's own ``make_mla_attention_config``. Its rotary embedding
multiplies complex float32 numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.func import functional_call

from mla_spec.bounds.profile import Profile, RopeProfile
from mla_spec.reference.config import MLAConfig
from mla_spec.subjects.supports import Supports

LENGTH = 8192
"""Positions of the rotary table."""

WEIGHTS = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
"""By the checkpoint's names of weights, torchtitan's."""

_DTYPES = ("float32", "float16", "bfloat16")


class Torchtitan:
    """torchtitan.models.deepseek_v3, SDPA.

    On the CPU SDPA takes the math backend for unequal head dims, as in the adapter of transformers.
    """

    name = "torchtitan"
    package = "torchtitan"
    profile = {d: Profile.default(d, rope=RopeProfile(), operand_roundings=4, tile=16) for d in _DTYPES}
    supports = Supports(
        dtypes=_DTYPES,
        backward=("layer",),
        rope_layouts=("interleaved",),
        rope_optional=False,
        yarn_options=("truncate",),
        yarn_mscale_rule="equal",
        longrope=False,
        mla_scale_lora=False,
        k_pe_norm=False,
        llama_4_scaling=False,
        latent_norm_eps=1e-5,  # the default of its RMSNorm, which its DeepSeek-V3 does not change
        layer_dim_multiple=2,  # complex numbers begin at even offsets of a row
        layer_cache="none",
        layer_max_positions=LENGTH,
    )

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        absent = [name for name in ("torchtitan", "spmd_types", "tyro", "triton") if not importlib.util.find_spec(name)]
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else ""

    def supports_layer(self, config: MLAConfig) -> str:
        """It puts no factor on cos and sin."""
        yarn = None if config.rope is None else config.rope.active_yarn
        return "" if yarn is None or yarn.cos_sin_factor == 1 else "YaRN must leave cos and sin as they are"

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> Any:
        return _Layer(weights, config)


class _Layer:
    """One module, called with the tensors of ``weights`` in the place of its parameters."""

    def __init__(self, weights: Mapping[str, Tensor], config: MLAConfig) -> None:
        first = next(iter(weights.values()))
        self.module = _module(config).to(first.device)
        self.parameters = {f"{WEIGHTS[name]}.weight": w for name, w in weights.items()}

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = functional_call(self.module, self.parameters, (hidden, None, positions))
        return out


def _module(config: MLAConfig) -> Any:
    from torchtitan.models.common import ComplexRoPE
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.deepseek_v3 import make_mla_attention_config

    assert config.rope is not None
    yarn = config.rope.active_yarn
    scaling: dict[str, Any] = {}
    if yarn is not None:
        scaling = {
            "scaling": "yarn",
            "rope_factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "original_seq_len": yarn.original_max_position_embeddings,
            "truncate": yarn.truncate,
        }
    rope = ComplexRoPE.Config(dim=config.rope.dim, max_seq_len=LENGTH, theta=config.rope.theta, **scaling)
    made = make_mla_attention_config(
        layer_id=0,
        dim=config.hidden_size,
        n_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        mscale=1.0 if yarn is None else yarn.mscale_all_dim or 0.0,
        attn_backend="flex",
        linear_init={},
        norm_init={},
        depth_init=lambda layer_id: {},
        rope=rope,
    )
    # It compiles FlexAttention for half a minute a shape; SDPA is the other attention that it ships.
    return replace(made, inner_attention=ScaledDotProductAttention.Config()).build()
