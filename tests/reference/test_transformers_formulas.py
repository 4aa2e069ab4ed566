"""The formulas of published model code, as transformers has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.profile import RopeProfile
from mla_spec.bounds.rope import angle_error, rope_with_bound
from mla_spec.reference.config import MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.published import published_models
from mla_spec.reference.rope import apply_rope, half_from_interleaved, rope_frequencies

pytest.importorskip("transformers", reason="compares with model code of transformers, which is not installed")

from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)

CONFIG_CLASSES: dict[str, Any] = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}
POSITIONS = np.array([0, 1, 2, 4095, 4096, 65537, 163839])


def transformers_config(name: str, model_type: str = "deepseek_v3", **rope_scaling: Any) -> Any:
    """The rotary part of a published entry as transformers' configuration; the other dimensions are small."""
    fields = published_models()[name].fields
    rope = {**(fields["rope_scaling"] or {"type": "default"}), **rope_scaling}
    rope = {key: value for key, value in rope.items() if value is not None}
    return CONFIG_CLASSES[model_type](
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=16,
        qk_nope_head_dim=fields["qk_nope_head_dim"],
        qk_rope_head_dim=fields["qk_rope_head_dim"],
        v_head_dim=16,
        max_position_embeddings=fields["max_position_embeddings"],
        rope_parameters={**rope, "rope_type": rope.pop("type"), "rope_theta": float(fields["rope_theta"])},
    )


YARN_MODELS = ("DeepSeek-V2", "DeepSeek-V3", "Kimi-K2 (0711)", "Kimi-K2-Thinking", "Kimi-K2.5/K2.6", "Sarvam-105B")


@pytest.mark.parametrize("name", YARN_MODELS)
def test_yarn_frequencies_agree_to_float32(name: str) -> None:
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](transformers_config(name))
    rope = MLAConfig.published(name).rope
    assert rope is not None
    # The angle at position 1 is the frequency; a float32 product with 1 is exact.
    allowed = angle_error(np.array(1), rope, RopeProfile())
    assert (np.abs(inv_freq.double().numpy() - rope_frequencies(rope)) <= allowed).all()
    assert attention_factor == rope.cos_sin_factor == 1.0


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2 (0711)"])
def test_yarn_frequencies_of_other_models_do_not_agree(name: str) -> None:
    """The allowance of the test above is no cover for a wrong ramp."""
    other = "Kimi-K2.5/K2.6" if name == "DeepSeek-V3" else "DeepSeek-V3"
    inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](transformers_config(other))
    rope = MLAConfig.published(name).rope
    assert rope is not None
    allowed = angle_error(np.array(1), rope, RopeProfile())
    assert (np.abs(inv_freq.double().numpy() - rope_frequencies(rope)) > allowed).any()


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("beta_fast", [32, 8, 2.5])
def test_yarn_frequencies_agree_for_other_betas(beta_fast: float, truncate: bool) -> None:
    changes = {"beta_fast": beta_fast, "truncate": truncate}
    inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](transformers_config("DeepSeek-V3", **changes))
    rope = RopeConfig(
        dim=64, yarn=YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001, **changes)
    )
    allowed = angle_error(np.array(1), rope, RopeProfile())
    assert (np.abs(inv_freq.double().numpy() - rope_frequencies(rope)) <= allowed).all()


@pytest.mark.parametrize("name", ["Moonlight-16B-A3B", "GLM-5.2 / 5.3"])
def test_plain_frequencies_agree_to_float32(name: str) -> None:
    inv_freq, _ = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(transformers_config(name))
    rope = MLAConfig.published(name).rope
    assert rope is not None
    allowed = angle_error(np.array(1), rope, RopeProfile())
    assert (np.abs(inv_freq.double().numpy() - rope_frequencies(rope)) <= allowed).all()


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim"),
    [(1.0, 1.0), (1.0, 0.5), (0.707, 1.0), (None, None), (0.5, None), (None, 0.5), (0.0, 1.0), (1.0, 0.0)],
)
def test_attention_factor_follows_the_transformers_rule(mscale: float | None, mscale_all_dim: float | None) -> None:
    config = transformers_config("DeepSeek-V3", mscale=mscale, mscale_all_dim=mscale_all_dim)
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    scaling = YarnScaling(
        factor=40,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor_rule="transformers",
    )
    assert scaling.cos_sin_factor == attention_factor  # the same float64 operations


@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V3", "Kimi-K2 (0711)", "Moonlight-16B-A3B"])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_softmax_scale_has_mscale_squared(model_type: str, name: str) -> None:
    attention_class: Any = {"deepseek_v2": DeepseekV2Attention, "deepseek_v3": DeepseekV3Attention}[model_type]
    module = attention_class(transformers_config(name, model_type), layer_idx=0)
    # scaling · m · m against scaling · m²: two roundings in other places.
    assert MLAConfig.published(name).scale == pytest.approx(module.scaling, rel=4 * 2.0**-53)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2 (0711)", "Moonlight-16B-A3B"])
def test_rotary_embedding_of_deepseek_v3_is_within_the_bound(name: str, dtype: str) -> None:
    """Its input is interleaved and its output in halves; with bfloat16 it stores the table in bfloat16."""
    rope = MLAConfig.published(name).rope
    assert rope is not None
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, len(POSITIONS), 64, generator=generator).to(torch_dtype)  # [b, h, s, r]
    k = torch.randn(1, 1, len(POSITIONS), 64, generator=generator).to(torch_dtype)
    table = DeepseekV3RotaryEmbedding(transformers_config(name))(q, torch.from_numpy(POSITIONS)[None])
    profile = RopeProfile(table=dtype, rotation=dtype)
    for x, got in zip((q, k), apply_rotary_pos_emb_interleave(q, k, *table), strict=True):
        by_position = np.swapaxes(x[0].double().numpy(), 0, 1)  # [s, h, r]
        expected, bound = rope_with_bound(by_position, POSITIONS, rope, profile, output=dtype)
        difference = np.abs(np.swapaxes(got[0].double().numpy(), 0, 1) - expected[..., half_from_interleaved(64)])
        assert (difference <= bound.total[..., half_from_interleaved(64)]).all()
        # The layout matters: in the layout of the input the same numbers are far off.
        assert not (np.abs(np.swapaxes(got[0].double().numpy(), 0, 1) - expected) <= bound.total).all()


def test_rotary_embedding_of_deepseek_v2_stays_interleaved() -> None:
    rope = MLAConfig.published("DeepSeek-V2").rope
    assert rope is not None
    inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](transformers_config("DeepSeek-V2", "deepseek_v2"))
    angles = torch.from_numpy(POSITIONS).float()[:, None] * inv_freq
    table = torch.polar(torch.ones_like(angles), angles)[None]
    q = torch.randn(1, 2, len(POSITIONS), 64, generator=torch.Generator().manual_seed(1))
    got, _ = apply_rotary_emb(q, q, table)
    x = np.swapaxes(q[0].double().numpy(), 0, 1)
    expected, bound = rope_with_bound(x, POSITIONS, rope, RopeProfile(), output="float32")
    np.testing.assert_array_equal(expected, apply_rope(x, POSITIONS, rope))
    assert (np.abs(np.swapaxes(got[0].double().numpy(), 0, 1) - expected) <= bound.total).all()
