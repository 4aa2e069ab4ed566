"""Configurations: what is refused and how it is said, and the numbers that follow from YaRN."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from mla_spec.reference.config import (
    Llama4Scaling,
    LongRopeScaling,
    MLAConfig,
    RopeConfig,
    YarnScaling,
    yarn_mscale,
)

DEEPSEEK_V3_YARN: dict[str, Any] = {"factor": 40, "original_max_position_embeddings": 4096}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}


def yarn(**changes: Any) -> YarnScaling:
    return YarnScaling(**{**DEEPSEEK_V3_YARN, **changes})


def longrope(**changes: Any) -> LongRopeScaling:
    entry = {"short_factor": (1.0, 1.5), "long_factor": (2.0, 4.0), "original_max_position_embeddings": 4096}
    return LongRopeScaling(**{**entry, **changes})


def config(**changes: Any) -> MLAConfig:
    return MLAConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_factor": [1.0, 1.5]}, "short_factor must be a tuple of numbers, got [1.0, 1.5]"),
        ({"long_factor": (2.0, 0.0)}, "long_factor[1] must be a positive finite number, got 0.0"),
        (
            {"long_factor": (2.0,)},
            "short_factor and long_factor must have the same length, got 2 and 1",
        ),
        (
            {"original_max_position_embeddings": 0},
            "original_max_position_embeddings must be a positive integer, got 0",
        ),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings must exceed 1, got 1"),
        ({"factor": -1.0}, "factor must be a positive finite number, got -1.0"),
        ({"attention_factor": 0.0}, "attention_factor must be a positive finite number, got 0.0"),
    ],
)
def test_longrope_scaling_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('LongRopeScaling: ' + message)}$"):
        longrope(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        (
            {"original_max_position_embeddings": 8192.0},
            "original_max_position_embeddings must be a positive integer, got 8192.0",
        ),
    ],
)
def test_llama_4_scaling_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('Llama4Scaling: ' + message)}$"):
        Llama4Scaling(**{"beta": 0.1, "original_max_position_embeddings": 8192, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "YarnScaling: factor must be at least 1, got 0.5"),
        ({"factor": 0}, "YarnScaling: factor must be a positive finite number, got 0"),
        ({"factor": math.inf}, "YarnScaling: factor must be a positive finite number, got inf"),
        ({"factor": math.nan}, "YarnScaling: factor must be a positive finite number, got nan"),
        ({"factor": "40"}, "YarnScaling: factor must be a positive finite number, got '40'"),
        ({"beta_fast": -1.0}, "YarnScaling: beta_fast must be a positive finite number, got -1.0"),
        ({"beta_slow": 0.0}, "YarnScaling: beta_slow must be a positive finite number, got 0.0"),
        (
            {"beta_fast": 1.0, "beta_slow": 2.0},
            "YarnScaling: beta_fast must not be below beta_slow, got 1.0 < 2.0",
        ),
        (
            {"original_max_position_embeddings": 4096.0},
            "YarnScaling: original_max_position_embeddings must be a positive integer, got 4096.0",
        ),
        (
            {"original_max_position_embeddings": 0},
            "YarnScaling: original_max_position_embeddings must be a positive integer, got 0",
        ),
        (
            {"attention_factor_rule": "vllm"},
            "YarnScaling: attention_factor_rule must be 'ratio' or 'transformers', got 'vllm'",
        ),
        ({"attention_factor": 0.0}, "YarnScaling: attention_factor must be a positive finite number, got 0.0"),
        ({"softmax_mscale": -1.0}, "YarnScaling: softmax_mscale must be a positive finite number, got -1.0"),
        ({"ramp_guard": 0.0}, "YarnScaling: ramp_guard must be a positive finite number, got 0.0"),
        ({"mscale": math.nan}, "YarnScaling: mscale must be a finite number, not negative, or None, got nan"),
        (
            {"mscale_all_dim": -0.5},
            "YarnScaling: mscale_all_dim must be a finite number, not negative, or None, got -0.5",
        ),
        ({"applies": "never"}, "YarnScaling: applies must be 'always' or 'beyond_original', got 'never'"),
    ],
)
def test_yarn_scaling_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        yarn(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 63}, "RopeConfig: dim (qk_rope_head_dim) must be even, got 63"),
        ({"dim": 0}, "RopeConfig: dim must be a positive integer, got 0"),
        ({"dim": -2}, "RopeConfig: dim must be a positive integer, got -2"),
        ({"dim": 64.0}, "RopeConfig: dim must be a positive integer, got 64.0"),
        ({"dim": True}, "RopeConfig: dim must be a positive integer, got True"),
        ({"dim": 64, "theta": 0.0}, "RopeConfig: theta must be a positive finite number, got 0.0"),
        ({"dim": 64, "theta": math.inf}, "RopeConfig: theta must be a positive finite number, got inf"),
        ({"dim": 64, "theta": 1.0}, "RopeConfig: theta must exceed 1, got 1.0"),
        (
            {"dim": 64, "yarn": yarn(applies="beyond_original")},
            "RopeConfig: yarn.applies='beyond_original' needs max_position_embeddings, got None",
        ),
        (
            {"dim": 4, "yarn": yarn(ramp_guard=0.001), "longrope": longrope(), "max_position_embeddings": 8192},
            "RopeConfig: yarn and longrope cannot both be given",
        ),
        ({"dim": 4, "longrope": longrope()}, "RopeConfig: longrope needs max_position_embeddings, got None"),
        (
            {"dim": 6, "longrope": longrope(), "max_position_embeddings": 8192},
            "RopeConfig: longrope must have dim/2 = 3 factors, got 2",
        ),
    ],
)
def test_rope_config_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RopeConfig(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"MLAConfig: {name} must be a positive integer, got 0")
            for name in (
                "hidden_size",
                "num_heads",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "v_head_dim",
            )
        ),
        ({"kv_lora_rank": 8.0}, "MLAConfig: kv_lora_rank must be a positive integer, got 8.0"),
        ({"num_heads": True}, "MLAConfig: num_heads must be a positive integer, got True"),
        ({"qk_rope_head_dim": -2}, "MLAConfig: qk_rope_head_dim must be a positive integer, got -2"),
        ({"qk_rope_head_dim": 5}, "MLAConfig: qk_rope_head_dim must be even, got 5"),
        ({"rope": RopeConfig(dim=8)}, "MLAConfig: rope.dim must equal qk_rope_head_dim, got 8 and 6"),
        (
            {"qk_rope_head_dim": 0, "rope": RopeConfig(dim=6)},
            "MLAConfig: rope.dim must equal qk_rope_head_dim, got 6 and 0",
        ),
        ({"latent_norm_eps": 0.0}, "MLAConfig: latent_norm_eps must be a positive finite number, got 0.0"),
        (
            {"mla_scale_q_lora": True, "q_lora_rank": None},
            "MLAConfig: mla_scale_q_lora needs a q_lora_rank, got None",
        ),
        (
            {"k_pe_norm": True, "qk_rope_head_dim": 0},
            "MLAConfig: k_pe_norm needs a k_pe, got qk_rope_head_dim 0",
        ),
        (
            {"output_gate": "tensor"},
            "MLAConfig: output_gate must be 'head', 'element', 'query' or None, got 'tensor'",
        ),
        (
            {"output_gate": "query", "q_lora_rank": None},
            "MLAConfig: output_gate 'query' needs a q_lora_rank, and no mla_scale_q_lora",
        ),
        (
            {"output_gate": "query", "q_lora_rank": 4, "mla_scale_q_lora": True},
            "MLAConfig: output_gate 'query' needs a q_lora_rank, and no mla_scale_q_lora",
        ),
        ({"softmax_scale": -0.1}, "MLAConfig: softmax_scale must be a positive finite number, got -0.1"),
        ({"softmax_scale": 0.0}, "MLAConfig: softmax_scale must be a positive finite number, got 0.0"),
    ],
)
def test_mla_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(**changes)


def test_configurations_are_immutable_and_hashable() -> None:
    # The reference caches frequency tables by configuration.
    made = config(rope=RopeConfig(dim=6, yarn=yarn(ramp_guard=0.001)))
    assert hash(made) == hash(config(rope=RopeConfig(dim=6, yarn=yarn(ramp_guard=0.001))))
    with pytest.raises(FrozenInstanceError):
        made.num_heads = 3  # type: ignore[misc]


def test_derived_dimensions() -> None:
    made = config()
    assert (made.qk_head_dim, made.cache_dim) == (4 + 6, 8 + 6)
    assert config(qk_rope_head_dim=0).qk_head_dim == 4
    assert config(q_lora_rank=None).q_lora_rank is None


# 4 tokens are less than one rotation (2π tokens) of the fastest pair: both ends of the range fall on pair 0.
EMPTY_RANGE: dict[str, Any] = {"factor": 4, "original_max_position_embeddings": 4}


def test_empty_correction_range_is_refused_without_guard() -> None:
    message = (
        "RopeConfig: YaRN correction range is empty (low == high == 0) for dim=8, theta=10000; "
        "set ramp_guard (DeepSeek's code uses 0.001) or other betas"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RopeConfig(dim=8, yarn=YarnScaling(**EMPTY_RANGE))


def test_inverted_correction_range_is_refused() -> None:
    inverted = YarnScaling(factor=4, original_max_position_embeddings=2**20, beta_fast=1.5, ramp_guard=0.001)
    with pytest.raises(ValueError, match=r"^RopeConfig: YaRN correction range is inverted \(low 536 > high 63\)"):
        RopeConfig(dim=64, theta=2.0, yarn=inverted)


def test_empty_correction_range_is_allowed_by_guard() -> None:
    rope = RopeConfig(dim=8, yarn=YarnScaling(**EMPTY_RANGE, ramp_guard=0.001))
    assert rope.yarn_correction_range() == (0, 0)


def test_empty_correction_range_is_no_matter_where_yarn_is_not_in_effect() -> None:
    scaling = YarnScaling(**EMPTY_RANGE, applies="beyond_original")
    RopeConfig(dim=8, yarn=scaling, max_position_embeddings=4)
    with pytest.raises(ValueError, match="correction range is empty"):
        RopeConfig(dim=8, yarn=scaling, max_position_embeddings=5)


def test_yarn_may_apply_beyond_the_original_context_only() -> None:
    scaling = yarn(applies="beyond_original", mscale=1.0, mscale_all_dim=0.5)
    short = RopeConfig(dim=64, yarn=scaling, max_position_embeddings=4096)
    long = RopeConfig(dim=64, yarn=scaling, max_position_embeddings=4097)
    assert short.active_yarn is None
    assert short.cos_sin_factor == 1.0
    assert long.active_yarn is scaling
    assert long.cos_sin_factor == scaling.cos_sin_factor != 1.0
    dims = {**SMALL, "qk_rope_head_dim": 64}
    assert MLAConfig(**dims, rope=short).scale == 68**-0.5
    assert MLAConfig(**dims, rope=long).scale == 68**-0.5 * scaling.softmax_factor


def test_yarn_applies_always_by_default() -> None:
    scaling = yarn()
    assert RopeConfig(dim=64, yarn=scaling).active_yarn is scaling
    assert RopeConfig(dim=64, yarn=scaling, max_position_embeddings=1).active_yarn is scaling
    assert RopeConfig(dim=64).active_yarn is None


def test_yarn_mscale_is_one_up_to_factor_one() -> None:
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40, 1.0) == 0.1 * math.log(40) + 1
    assert yarn_mscale(40, 0.0) == 1.0
    # DeepSeek-V2 (arXiv 2405.04434), section 3.1.4: 0.0707 ln s + 1, to the few roundings of either side.
    assert yarn_mscale(40, 0.707) == pytest.approx(0.0707 * math.log(40) + 1, rel=2**-51)


LN40 = math.log(40)


@pytest.mark.parametrize(
    ("rule", "mscale", "mscale_all_dim", "expected"),
    [
        ("ratio", 1.0, 1.0, 1.0),
        ("transformers", 1.0, 1.0, 1.0),
        ("ratio", 0.707, 0.707, 1.0),
        ("transformers", 0.707, 0.707, 1.0),
        ("ratio", 1.0, 0.5, (0.1 * LN40 + 1) / (0.05 * LN40 + 1)),
        ("transformers", 1.0, 0.5, (0.1 * LN40 + 1) / (0.05 * LN40 + 1)),
        # An absent mscale counts as 1 and an absent mscale_all_dim as 0.
        ("ratio", None, None, 0.1 * LN40 + 1),
        ("ratio", 0.5, None, 0.05 * LN40 + 1),
        ("ratio", None, 0.5, (0.1 * LN40 + 1) / (0.05 * LN40 + 1)),
        ("ratio", 0.0, 0.5, 1 / (0.05 * LN40 + 1)),
        # The other rule ignores both unless both are given and nonzero.
        ("transformers", None, None, 0.1 * LN40 + 1),
        ("transformers", 0.5, None, 0.1 * LN40 + 1),
        ("transformers", None, 0.5, 0.1 * LN40 + 1),
        ("transformers", 0.0, 0.5, 0.1 * LN40 + 1),
        ("transformers", 0.5, 0.0, 0.1 * LN40 + 1),
    ],
)
def test_attention_factor_rules(rule: Any, mscale: float | None, mscale_all_dim: float | None, expected: float) -> None:
    scaling = yarn(attention_factor_rule=rule, mscale=mscale, mscale_all_dim=mscale_all_dim)
    # Both sides are a handful of float64 operations; the values told apart differ by 10 % and more.
    assert scaling.cos_sin_factor == pytest.approx(expected, rel=2**-50)


@pytest.mark.parametrize("rule", ["ratio", "transformers"])
def test_attention_factor_overrides_the_rules(rule: Any) -> None:
    assert yarn(attention_factor=1.25, attention_factor_rule=rule, mscale_all_dim=0.5).cos_sin_factor == 1.25


@pytest.mark.parametrize("factor", [1, 1.0, 1.5])
def test_any_extension_from_one_on_is_accepted(factor: float) -> None:
    assert yarn(factor=factor).cos_sin_factor == 1.0
    assert yarn(factor=factor).softmax_factor == (0.1 * math.log(factor) + 1) ** 2


def test_softmax_factor() -> None:
    assert yarn().softmax_factor == (0.1 * LN40 + 1) ** 2
    assert yarn(mscale_all_dim=None).softmax_factor == 1.0
    assert yarn(mscale_all_dim=0.0).softmax_factor == 1.0
    assert yarn(mscale=0.25, mscale_all_dim=1.0).softmax_factor == (0.1 * LN40 + 1) ** 2
    assert yarn(softmax_mscale=1.0).softmax_factor == 1.0
    assert yarn(softmax_mscale=1.5).softmax_factor == 2.25


def test_scale_of_deepseek_v3() -> None:
    scale = MLAConfig.published("DeepSeek-V3").scale
    assert scale == 192**-0.5 * (0.1 * LN40 + 1) ** 2
    # The same number from 40-digit decimal arithmetic; the float64 formula rounds six times.
    assert abs(scale - 0.13523377886088008810) <= 3 * math.ulp(scale)


def test_scale_without_yarn_and_overridden() -> None:
    assert config().scale == 10**-0.5
    assert config(rope=RopeConfig(dim=6)).scale == 10**-0.5
    assert config(softmax_scale=0.125, rope=RopeConfig(dim=6, yarn=yarn(ramp_guard=0.001))).scale == 0.125


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DeepSeek-V3", (10, 23)),
        ("DeepSeek-V2", (10, 23)),
        ("Kimi-K2 (0711)", (19, 20)),  # beta_fast = beta_slow = 1: a ramp one pair wide
        ("Kimi-K2-Thinking", (19, 20)),
        ("Kimi-K2.5/K2.6", (8, 20)),
    ],
)
def test_correction_range_of_published_models(name: str, expected: tuple[int, int]) -> None:
    rope = MLAConfig.published(name).rope
    assert rope is not None
    assert rope.yarn_correction_range() == expected


def test_correction_range_may_stay_fractional() -> None:
    low, high = RopeConfig(dim=64, yarn=yarn(truncate=False)).yarn_correction_range()
    # The formula of YaRN, section 3.2, written with base-theta logarithms; both are a few float64 roundings.
    assert low == pytest.approx(32 * math.log(4096 / (64 * math.pi), 10000), rel=2**-48)
    assert high == pytest.approx(32 * math.log(4096 / (2 * math.pi), 10000), rel=2**-48)
    assert (math.floor(low), math.ceil(high)) == (10, 23)


def test_correction_range_is_clamped_to_the_dims() -> None:
    assert RopeConfig(dim=8, yarn=yarn(factor=2, original_max_position_embeddings=64)).yarn_correction_range()[0] == 0
    wide = RopeConfig(dim=8, theta=2.0, yarn=yarn(beta_fast=512, original_max_position_embeddings=4096))
    assert wide.yarn_correction_range() == (1, 7)


def test_correction_range_needs_yarn() -> None:
    message = "yarn_correction_range: this RopeConfig has no YaRN scaling"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RopeConfig(dim=64).yarn_correction_range()


def from_checkpoint(rope_scaling: dict[str, Any] | None, **changes: Any) -> RopeConfig:
    arguments = {"dim": 64, "theta": 10000, "interleaved": True, **changes}
    return RopeConfig.from_checkpoint(rope_scaling=rope_scaling, **arguments)


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}, {"rope_type": "default"}])
def test_checkpoint_without_scaling(scaling: dict[str, Any] | None) -> None:
    assert from_checkpoint(scaling) == RopeConfig(dim=64, theta=10000.0, interleaved=True)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_checkpoint_with_yarn(key: str) -> None:
    entry = {key: "yarn", **DEEPSEEK_V3_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    kept = dict(entry)
    rope = from_checkpoint(entry, max_position_embeddings=163840)
    assert rope == RopeConfig(dim=64, theta=10000.0, yarn=yarn(ramp_guard=0.001), max_position_embeddings=163840)
    assert entry == kept


def test_checkpoint_prefers_rope_type() -> None:
    assert from_checkpoint({"type": "default", "rope_type": "yarn", **DEEPSEEK_V3_YARN}).yarn is not None


def test_checkpoint_without_mscale_leaves_it_unstated() -> None:
    scaling = from_checkpoint({"type": "yarn", **DEEPSEEK_V3_YARN}).yarn
    assert scaling is not None
    assert (scaling.mscale, scaling.mscale_all_dim) == (None, None)
    assert scaling.softmax_factor == 1.0


def test_checkpoint_of_unknown_type_or_parameter_is_refused() -> None:
    message = "rope_scaling: unknown rope type 'llama3'; known types are 'default', 'yarn' and 'longrope'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_checkpoint({"rope_type": "llama3", "factor": 8})
    with pytest.raises(ValueError, match=r"^rope_scaling: unknown YaRN parameter 'finetuned'$"):
        from_checkpoint({"type": "yarn", **DEEPSEEK_V3_YARN, "finetuned": True})


def longrope_config(context: int, **changes: Any) -> RopeConfig:
    return RopeConfig(dim=4, longrope=longrope(**changes), max_position_embeddings=context)


def test_longrope_takes_the_long_factors_beyond_the_original_context() -> None:
    assert longrope_config(4096).frequency_divisors == (1.0, 1.5)
    assert longrope_config(4097).frequency_divisors == (2.0, 4.0)
    assert RopeConfig(dim=4).frequency_divisors is None


def test_longrope_factor_on_cos_and_sin() -> None:
    assert longrope_config(4096).cos_sin_factor == 1.0
    assert longrope_config(2048).cos_sin_factor == 1.0
    # 32 = 2^5 and 4096 = 2^12: sqrt(1 + 5/12), but for the rounding of the two logarithms.
    expected = pytest.approx(math.sqrt(17 / 12), rel=4 * 2.0**-53)
    assert longrope_config(131072).cos_sin_factor == expected
    assert longrope_config(4096, factor=32).cos_sin_factor == expected
    assert longrope_config(131072, factor=2).cos_sin_factor == pytest.approx(math.sqrt(13 / 12), rel=4 * 2.0**-53)
    assert longrope_config(131072, factor=0.5).cos_sin_factor == 1.0
    assert longrope_config(131072, attention_factor=1.25).cos_sin_factor == 1.25


def test_scales_of_the_latents() -> None:
    plain, scaled = config(), config(mla_scale_q_lora=True, mla_scale_kv_lora=True)
    assert (plain.q_lora_scale, plain.kv_lora_scale) == (1.0, 1.0)
    assert (scaled.q_lora_scale, scaled.kv_lora_scale) == (math.sqrt(16 / 6), math.sqrt(16 / 8))
    assert config(mla_scale_kv_lora=True).q_lora_scale == 1.0
    assert plain.scale == scaled.scale


def test_llama_4_factor_is_one_within_the_original_context_and_steps_by_it() -> None:
    factor = Llama4Scaling(beta=0.1, original_max_position_embeddings=8192).factor(np.array([[0, 8191], [8192, 65535]]))
    assert factor.tolist() == [[1.0, 1.0], [1 + 0.1 * math.log1p(1), 1 + 0.1 * math.log1p(7)]]


LONGROPE_ENTRY: dict[str, Any] = {
    "type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 4096,
}


def test_checkpoint_with_longrope() -> None:
    rope = from_checkpoint(LONGROPE_ENTRY, dim=4, max_position_embeddings=131072)
    assert rope == RopeConfig(dim=4, longrope=longrope(), max_position_embeddings=131072)


def test_checkpoint_with_incomplete_or_unknown_longrope_is_refused() -> None:
    for name in ("short_factor", "long_factor", "original_max_position_embeddings"):
        with pytest.raises(ValueError, match=f"^rope_scaling: LongRoPE needs {name}$"):
            from_checkpoint({**LONGROPE_ENTRY, name: None}, dim=4)
    with pytest.raises(ValueError, match=r"^rope_scaling: unknown LongRoPE parameter 'long_mscale'$"):
        from_checkpoint({**LONGROPE_ENTRY, "long_mscale": 1.2}, dim=4)
