"""Every verified model of the model table runs through the layer laws, small and with all its options on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.layer import LayerCase, layer_models
from mla_spec.operations.layer_gradients import LayerGradientCase
from mla_spec.planted_bugs import PLANTED
from mla_spec.properties.strategies.layer import supported_models
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.published import published_models
from mla_spec.subjects.supports import DTYPES, Supports

PUBLISHED_WIDTHS = "test_cache_bytes_are_those_of_published_models"
LAWS = [law for law in all_laws().values() if law.needs == ("layer",) and law.name != PUBLISHED_WIDTHS]
GRADIENT_LAWS = [law for law in LAWS if law.check.__module__.endswith("test_layer_gradients")]
RELATIVE = "test_layer_depends_on_relative_positions_only"
DOTS = "dots3-note-prev-dsa-layers"
WITHOUT_A_LAYER = {"Mistral-Large-4-1T-A52B", "A.X-K1", "A.X-K2-Light"}
"""Verified, but an option is not modelled or, for A.X-K1 and A.X-K2-Light, its rope_theta is not published."""


def small_case(model: str, dtype: str = "float32", **changes: object) -> LayerCase:
    """Six prompt tokens and three more, across the end of the original context where a model's temperature begins."""
    fields = layer_models()[model].fields
    narrow = dtype in ("float16", "bfloat16")
    case = LayerCase(
        dtype=dtype,
        seed=7,
        prompt=6,
        steps=3,
        hidden_size=8,
        num_heads=2,
        q_lora_rank=None if fields["q_lora_rank"] is None else 5,
        kv_lora_rank=6,
        qk_nope_head_dim=3,
        qk_rope_head_dim=0 if fields["qk_rope_head_dim"] == 0 else 8,
        v_head_dim=3,
        start=8189 if "llama_4_scaling" in fields else 60,
        model=model,
        weights="aligned" if narrow else "dense",
        gain=0.125 if narrow else 1.0,
    )
    return replace(case, **changes)  # type: ignore[arg-type]


def _depends_on_differences(case: LayerCase) -> bool:
    """Whether scores depend on positions, and on their differences alone."""
    return case.config.rope is not None and case.config.llama_4_scaling is None


def gradient_case(case: LayerCase) -> LayerGradientCase:
    """Two sequences of three tokens each, and smaller scores, lest the bound of the gradients say nothing."""
    gain = 0.125 if case.dtype == "bfloat16" else 0.5
    far = case.start > 4096
    changed = {"batch": 2, "prompt": 3, "steps": 0, "gain": gain, "weights": "aligned" if far else case.weights}
    return LayerGradientCase(**{**vars(case), **changed})


def test_every_verified_model_is_there() -> None:
    verified = {name for name, model in published_models().items() if model.verified and model.is_mla}
    assert {model.name for model in layer_models().values()} == verified - WITHOUT_A_LAYER


def test_names_can_be_written_in_case_ids() -> None:
    for name in layer_models():
        assert parse_case(small_case(name).id) == small_case(name)


@pytest.mark.parametrize("name", layer_models())
def test_small_layer_differs_from_the_model_in_its_widths_only(name: str) -> None:
    small = small_case(name).config
    if name == "minicpm3-4b":  # which has a LongRoPE factor for each pair of its own dims
        assert small.rope is not None
        assert small.rope.longrope is not None
        assert small.rope.longrope.original_max_position_embeddings == 32768
        return
    model = MLAConfig.published(layer_models()[name].name)
    widths = {f: getattr(small, f) for f in ("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim")}
    heads = {f: getattr(small, f) for f in ("qk_nope_head_dim", "qk_rope_head_dim")}
    rope = None if model.rope is None else replace(model.rope, dim=small.qk_rope_head_dim)
    assert small == replace(model, rope=rope, **widths, **heads)


@pytest.mark.parametrize("name", layer_models())
def test_layer_laws_hold(name: str) -> None:
    assert len(LAWS) > len(GRADIENT_LAWS) > 0
    for law in LAWS:
        for dtype in DTYPES:
            case = small_case(name, dtype)
            if law in GRADIENT_LAWS:
                if case.config.k_pe_norm and dtype in ("float16", "bfloat16"):
                    continue  # of that norm's gradient 16 bits leave nothing; see ``layer_gradient_cases``
                case = gradient_case(case)
            record = run_law(law, TorchAbsorbed(), Options(case=case))
            shown = law.name != RELATIVE or _depends_on_differences(case)
            assert record.verdict == ("pass" if shown else "incomplete"), record.text()


KILLS = {
    "A17": ("mistral-large-3-675b", "mistral-small-4-119b-2603"),
    "B10": ("deepseek-v3", "glm-4.7-flash", "minicpm3-4b"),
    "B24": ("deepseek-v3", "kimi-k2-0711", "sarvam-105b", "mistral-large-3-675b"),
    "C1": ("glm-5.3-flash-glm5-next", "mistral-large-3-675b"),
    "X70": ("longcat-flash-chat", "longcat-flash-lite-sparse"),
}
"""Planted bugs that ignore an option, and models that have it."""


@pytest.mark.parametrize(("bug", "name"), [(bug, name) for bug, names in KILLS.items() for name in names])
def test_ignoring_an_option_is_seen_on_its_model(bug: str, name: str) -> None:
    law = all_laws()["test_layer_decode_agrees_with_reference"]
    case = small_case(name, hidden_scale=2.0**-10 if bug == "C1" else 1.0)
    record = run_law(law, PLANTED[bug].make(), Options(case=case))
    assert record.verdict == "fail", record.text()
    assert run_law(law, TorchAbsorbed(), Options(case=case)).verdict == "pass"


def test_subjects_get_the_models_whose_options_they_have() -> None:
    gates = ("head", "element")
    everything = set(supported_models(Supports(output_gate=gates)))
    assert everything == set(layer_models())
    assert everything - set(supported_models(Supports())) == {"kimi-k3-text", "ling-3.0-flash", DOTS}
    assert everything - set(supported_models(Supports(output_gate=gates[:1]))) == {"kimi-k3-text"}

    def lost(**restriction: object) -> set[str]:
        return everything - set(supported_models(Supports(output_gate=gates, **restriction)))  # type: ignore[arg-type]

    assert lost(longrope=False) == {"minicpm3-4b"} == lost(rope_layouts=("interleaved",))
    assert lost(llama_4_scaling=False) == {"mistral-large-3-675b", "mistral-small-4-119b-2603"}
    assert lost(mla_scale_lora=False) == {"longcat-flash-chat", "longcat-flash-lite-sparse", DOTS}
    assert lost(rope_optional=False) == {"kimi-linear-48b-a3b", "glm-5.3-flash-glm5-next", "kimi-k3-text"}
    assert lost(latent_norm_eps=1e-6) == {"glm-5.3-flash-glm5-next", "mistral-large-3-675b", DOTS}
    yarn = {
        name for name, model in layer_models().items() if (model.fields["rope_scaling"] or {}).get("type") == "yarn"
    }
    assert lost(yarn=False) == yarn != set()


def test_other_widths_say_nothing_of_published_caches() -> None:
    record = run_law(all_laws()[PUBLISHED_WIDTHS], TorchAbsorbed(), Options(case=small_case("deepseek-v3")))
    assert record.verdict == "incomplete"
    assert "no published model has a cache of this width" in record.message
