"""Published models: what the data file says, and what is refused rather than guessed."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from mla_spec.reference.config import Llama4Scaling, MLAConfig
from mla_spec.reference.published import PublishedModel, published_model, published_models

MODELS = published_models()

REQUIRED_FIELDS = (
    "attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_mla_layers",
    "rope",
    "rope_theta",
    "rope_interleave",
    "rope_scaling",
    "max_position_embeddings",
    "rms_norm_eps",
)


def mscale2(factor: float, mscale: float) -> float:
    return (0.1 * mscale * math.log(factor) + 1) ** 2


# (n + r, mscale² by each model's own rule)
MODELLED = {
    "DeepSeek-V2": (192, mscale2(40, 0.707)),
    "DeepSeek-V2.5": (192, mscale2(40, 1.0)),
    "DeepSeek-V2-Lite": (192, mscale2(40, 0.707)),
    "DeepSeek-V3": (192, mscale2(40, 1.0)),
    "DeepSeek-R1": (192, mscale2(40, 1.0)),
    "DeepSeek-V3.1": (192, mscale2(40, 1.0)),
    "DeepSeek-V3.2(-Exp)": (192, mscale2(40, 1.0)),
    "Kimi-K2 (0711)": (192, mscale2(32, 1.0)),
    "Kimi-K2-Thinking": (192, mscale2(64, 1.0)),
    "Kimi-K2.5/K2.6": (192, mscale2(64, 1.0)),
    "Kimi-K2.7": (192, mscale2(64, 1.0)),
    "Moonlight-16B-A3B": (192, 1.0),
    "Kimi-VL-A3B (text)": (192, 1.0),
    "Kimi-Linear-48B-A3B": (192, 1.0),
    "GLM-4.7-Flash": (256, 1.0),
    "GLM-5": (256, 1.0),
    "GLM-5.1": (256, 1.0),
    "GLM-5.2 / 5.3": (256, 1.0),
    "GLM-5.3-Flash (glm5_next)": (256, 1.0),
    "Mistral-Large-3-675B": (192, 1.0),
    "Mistral-Small-4-119B-2603": (128, mscale2(128, 1.0)),
    "LongCat-Flash-Chat": (192, 1.0),
    "LongCat-Flash-Lite-Sparse": (192, mscale2(120, 1.0)),
    "Youtu-LLM-2B": (192, 1.0),
    "Sarvam-105B": (192, mscale2(40, 1.0)),
    "Kimi-K3 (text)": (192, 1.0),
    "Ling-3.0-Flash": (192, 1.0),
    "Ling-3.0-tiny": (192, 1.0),
    "dots3-note-prev (DSA layers)": (192, 1.0),
}

NOT_MODELLED = {
    "Mistral-Large-4-1T-A52B": "LeRoPE frequencies",
    "Ling-2.6-1T / Ring-2.6-1T": "which of its layers are MLA",
    "VAETKI-112B": "sliding window",
    "VAETKI-VL-7B": "sliding window",
}

UNPUBLISHED = {
    "A.X-K1": "rope_theta",
    "A.X-K2-Light": "rope_theta",
    "Hy4-preview (class default)": "rope_theta",
    "Ling-2.5-1T / Ring-2.5-1T": "hidden_size",
    "openPangu-Ultra-MoE-718B": "rope_theta",
    "GigaChat3-702B / 10B": "hidden_size",
    "JoyAI-LLM-Flash": "rope_theta",
    "Kanana-2-30B-A3B": "hidden_size",
    "LongCat-2.0": "hidden_size",
    "DeepSeek-VL2": "hidden_size",
}

NOT_MLA = {
    "DeepSeek-V4-Flash": "shared-kv-mqa",
    "DeepSeek-V4-Pro": "shared-kv-mqa",
    "DeepSeek-V4.1-Flash": "shared-kv-mqa",
    "DeepSeek-OCR": "mha",
}

UNVERIFIED = {
    "DeepSeek-V4.1-Flash",
    "Ling-2.5-1T / Ring-2.5-1T",
    "Hy4-preview (class default)",
    "openPangu-Ultra-MoE-718B",
    "GigaChat3-702B / 10B",
    "GLM-5.1",
    "Kimi-K2.7",
    "JoyAI-LLM-Flash",
    "Ling-3.0-tiny",
    "Ling-2.6-1T / Ring-2.6-1T",
    "Kanana-2-30B-A3B",
    "VAETKI-112B",
    "VAETKI-VL-7B",
    "LongCat-2.0",
    "DeepSeek-VL2",
    "DeepSeek-OCR",
}


def test_every_entry_is_accounted_for() -> None:
    # A new entry must say here whether it is modelled, and with what scale.
    assert set(MODELS) == {*MODELLED, *NOT_MODELLED, *UNPUBLISHED, *NOT_MLA, "MiniCPM3-4B"}


@pytest.mark.parametrize("model", MODELS.values(), ids=str)
def test_entry_is_complete_and_sourced(model: PublishedModel) -> None:
    assert set(REQUIRED_FIELDS) <= set(model.fields)
    assert model.name == model.name.strip() != ""
    assert model.source
    assert all(isinstance(source, str) and source.strip() for source in model.source)
    assert all(isinstance(field, str) and field.strip() for field in model.unverified_fields)
    assert isinstance(model.verified, bool)
    assert model.fields["rope"] in ("rotary", "none")


def test_names_are_told_apart_by_more_than_case() -> None:
    assert len({name.lower() for name in MODELS}) == len(MODELS)


@pytest.mark.parametrize("name", MODELLED)
def test_scale_and_cos_sin_factor(name: str) -> None:
    config = MLAConfig.published(name)
    head_dim, factor = MODELLED[name]
    assert config.qk_head_dim == head_dim
    # A few float64 roundings on either side; a wrong rule moves the scale by 20 % and more.
    assert config.scale == pytest.approx(head_dim**-0.5 * factor, rel=2**-50)
    assert config.softmax_scale is None
    if config.rope is not None:
        assert config.rope.cos_sin_factor == 1.0


@pytest.mark.parametrize("name", MODELLED)
def test_config_has_the_entrys_dimensions(name: str) -> None:
    config, fields = MLAConfig.published(name), MODELS[name].fields
    for field in ("hidden_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(config, field) == fields[field]
    assert config.num_heads == fields["num_attention_heads"]
    if fields["rope"] == "none":
        assert config.rope is None
        return
    assert config.rope is not None
    assert config.rope.theta == fields["rope_theta"]
    assert config.rope.interleaved is fields["rope_interleave"]
    assert config.rope.max_position_embeddings == fields["max_position_embeddings"]
    assert (config.rope.yarn is None) == (fields["rope_scaling"] is None)


def test_deepseek_v3_in_full() -> None:
    config = MLAConfig.published("DeepSeek-V3")
    assert (config.hidden_size, config.num_heads, config.q_lora_rank, config.kv_lora_rank) == (7168, 128, 1536, 512)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert config.latent_norm_eps == 1e-6
    assert config.rope is not None
    assert config.rope.interleaved
    assert config.rope.yarn is not None
    assert (config.rope.theta, config.rope.yarn.factor) == (10000, 40)
    assert MODELS["DeepSeek-V3"].num_cached_layers == 61


def test_models_without_position_have_no_rope() -> None:
    assert MLAConfig.published("Kimi-Linear-48B-A3B").qk_rope_head_dim == 64
    assert MLAConfig.published("GLM-5.3-Flash (glm5_next)").qk_rope_head_dim == 0


def test_cached_layers() -> None:
    assert MODELS["LongCat-Flash-Chat"].num_cached_layers == 56
    assert MODELS["Kimi-Linear-48B-A3B"].num_cached_layers == 7
    assert MODELS["GigaChat3-702B / 10B"].num_cached_layers is None


@pytest.mark.parametrize("key", ["mla_layers_0based", "mla_layers_1based"])
def test_listed_layers_are_counted(key: str) -> None:
    listed = [model for model in MODELS.values() if key in model.fields]
    assert listed
    for model in listed:
        assert len(set(model.fields[key])) == model.num_cached_layers
        assert max(model.fields[key]) < model.fields["num_hidden_layers"] + (key == "mla_layers_1based")


@pytest.mark.parametrize("name", NOT_MLA)
def test_another_attention_is_refused_as_not_mla(name: str) -> None:
    assert not MODELS[name].is_mla
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: attention is '{NOT_MLA[name]}', not MLA$"):
        MLAConfig.published(name)


@pytest.mark.parametrize("name", NOT_MODELLED)
def test_option_not_modelled_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{re.escape(name)}: MLAConfig does not express '.*{re.escape(NOT_MODELLED[name])}"
    ):
        MLAConfig.published(name)


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_unpublished_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: {UNPUBLISHED[name]} is not published$"):
        MLAConfig.published(name)


def test_every_dimension_may_be_unpublished() -> None:
    model = MODELS["DeepSeek-V3"]
    for field in (
        "hidden_size",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rope_theta",
    ):
        with pytest.raises(ValueError, match=f"^DeepSeek-V3: {field} is not published$"):
            replace(model, fields={**model.fields, field: None}).mla_config()


def test_rope_layout_is_read() -> None:
    model = MODELS["DeepSeek-V3"]
    rope = replace(model, fields={**model.fields, "rope_interleave": False}).mla_config().rope
    assert rope is not None
    assert not rope.interleaved


def test_minicpm3_divides_each_frequency_by_a_factor() -> None:
    rope = MLAConfig.published("MiniCPM3-4B").rope
    assert rope is not None
    assert rope.longrope is not None
    assert rope.longrope.short_factor == rope.longrope.long_factor == rope.frequency_divisors
    assert len(rope.longrope.short_factor) == rope.dim // 2 == 16
    # Factors i and 15 - i are as far from 18 / 2: the curve is symmetric, which a digit lost in copying would end.
    assert [rope.longrope.short_factor[i] + rope.longrope.short_factor[15 - i] for i in range(16)] == pytest.approx(
        16 * [18]
    )
    assert rope.cos_sin_factor == 1.0


def test_unpublished_longrope_factors_are_named() -> None:
    model = MODELS["MiniCPM3-4B"]
    scaling = {**model.fields["rope_scaling"], "short_factor": None}
    with pytest.raises(ValueError, match=r"^MiniCPM3-4B: rope_scaling.short_factor is not published$"):
        replace(model, fields={**model.fields, "rope_scaling": scaling}).mla_config()


def test_unpublished_widths_are_named() -> None:
    with pytest.raises(ValueError, match=r"^Kanana-2-30B-A3B: kv_lora_rank is not published$"):
        MODELS["Kanana-2-30B-A3B"].latent_rows()


def test_ling_caches_eleven_kib_a_token() -> None:
    assert MODELS["Ling-2.5-1T / Ring-2.5-1T"].latent_rows() == [(10, 576)]


def test_unknown_rope_type_is_named() -> None:
    model = MODELS["DeepSeek-V3"]
    with pytest.raises(ValueError, match=r"^DeepSeek-V3: rope_scaling: unknown rope type 'llama3'"):
        replace(model, fields={**model.fields, "rope_scaling": {"type": "llama3"}}).mla_config()


def test_eps_of_the_latent_norms() -> None:
    """1e-6 by DeepSeek's code and most model classes, whatever rms_norm_eps says."""
    passed_on = {name for name in MODELLED if MLAConfig.published(name).latent_norm_eps != 1e-6}
    assert passed_on == {"GLM-5.3-Flash (glm5_next)", "Mistral-Large-3-675B", "dots3-note-prev (DSA layers)"}
    for name in MODELLED:
        fields = MODELS[name].fields
        assert MLAConfig.published(name).latent_norm_eps == fields["latent_norm_eps"]
        if fields["rms_norm_eps"] != 1e-6:
            assert any(source.startswith("latent_norm_eps: ") for source in MODELS[name].source), name


def test_longcat_scales_its_latents() -> None:
    config = MLAConfig.published("LongCat-Flash-Chat")
    assert (config.q_lora_scale, config.kv_lora_scale) == (2.0, 12**0.5)
    scaled = {name for name in MODELLED if MLAConfig.published(name).mla_scale_kv_lora}
    assert scaled == {"LongCat-Flash-Chat", "LongCat-Flash-Lite-Sparse", "dots3-note-prev (DSA layers)"}


def test_mistral_has_a_temperature() -> None:
    scaling = MLAConfig.published("Mistral-Large-3-675B").llama_4_scaling
    assert scaling == Llama4Scaling(beta=0.1, original_max_position_embeddings=8192)
    assert {name for name in MODELLED if MLAConfig.published(name).llama_4_scaling} == {
        "Mistral-Large-3-675B",
        "Mistral-Small-4-119B-2603",
    }


def test_unverified_entries_stay_marked() -> None:
    assert {name for name, model in MODELS.items() if not model.verified} == UNVERIFIED
    assert all(MODELS[name].unverified_fields for name in UNVERIFIED)
    assert not MODELS["DeepSeek-V3"].unverified_fields


def test_name_ignores_case() -> None:
    assert published_model("deepseek-v3") is MODELS["DeepSeek-V3"]
    assert published_model("KIMI-K2 (0711)") is MODELS["Kimi-K2 (0711)"]


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'DeepSeek-V33'; did you mean .*DeepSeek-V3.*\?$"):
        MLAConfig.published("DeepSeek-V33")
    with pytest.raises(ValueError, match=r"^unknown model 'kimi-k2'; did you mean .*Kimi-K2 \(0711\).*\?$"):
        published_model("kimi-k2")
    with pytest.raises(ValueError, match=r"^unknown model 'KIMI-LINEAR-48B'; did you mean Kimi-Linear-48B-A3B.*\?$"):
        published_model("KIMI-LINEAR-48B")


def test_unknown_name_without_close_ones_says_where_they_are() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'zzz'; see `mla-spec models`$"):
        published_model("zzz")


def test_gates_and_sinks() -> None:
    gates = {name: MLAConfig.published(name).output_gate for name in MODELLED}
    assert {name: gate for name, gate in gates.items() if gate} == {
        "Kimi-K3 (text)": "element",
        "Ling-3.0-Flash": "head",
        "Ling-3.0-tiny": "head",
        "dots3-note-prev (DSA layers)": "head",
    }
    hy4 = MODELS["Hy4-preview (class default)"].fields
    assert (hy4["output_gate"], hy4["attention_sink"]) == ("element", True)
