"""Layers of models with options of their own, against their modules in transformers, in float32."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.operations.layer import LayerCase, LayerInputs, layer_models
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import project_latent
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.typing import Array

pytest.importorskip("transformers", reason="compares with model code of transformers, which is not installed")

WIDTHS: dict[str, Any] = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5, "kv_lora_rank": 16}
PROFILE = Profile.default("float32", operand_roundings=4, tile=16)
"""SDPA multiplies q and k by the root of the scale."""


def inputs_of(model: str, start: int, **changes: Any) -> LayerInputs:
    """A small layer with the options of a published model, and six tokens from position ``start``."""
    case = LayerCase(
        dtype="float32", prompt=6, hidden_size=24, num_heads=3, q_lora_rank=12, model=model, start=start, **WIDTHS
    )
    inputs = case.build()
    return replace(inputs, config=replace(inputs.config, **changes))


def module_output(inputs: LayerInputs, package: str, attention: str, prefix: str, **options: Any) -> Array:
    """What the attention module of a model in transformers computes of them."""
    config = inputs.config
    assert config.rope is not None
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    theirs = getattr(configuration, f"{prefix}Config")(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank,
        attn_implementation="sdpa",
        attention_bias=False,
        **WIDTHS,
        **options,
    )
    module = getattr(modeling, attention)(theirs, layer_idx=0).eval()
    weights = {f"{name}.weight": torch.from_numpy(w).float() for name, w in inputs.weights.items()}
    module.load_state_dict(weights, strict=True)
    hidden, positions = torch.from_numpy(inputs.hidden).float(), torch.from_numpy(inputs.positions)
    s = hidden.shape[1]
    mask = torch.full((s, s), -torch.inf).triu(1)[None, None]
    table = getattr(modeling, f"{prefix}RotaryEmbedding")(config=theirs)(hidden, positions)
    with torch.no_grad():
        # position_ids is read by the modules whose attention depends on the position itself.
        out: Array = module(hidden, position_embeddings=table, attention_mask=mask, position_ids=positions)[0].numpy()
    return out


def excess(got: Array, inputs: LayerInputs, **changes: Any) -> float:
    """The largest error as a multiple of the bound of a layer of this configuration."""
    config = replace(inputs.config, **changes)
    want, bound = layer_with_bound(inputs.hidden, inputs.positions, inputs.weights, config, PROFILE)
    return float(np.max(np.abs(got - want) / bound.total))


def longcat_output(inputs: LayerInputs) -> Array:
    rope = {"rope_type": "default", "rope_theta": 1e7}
    return module_output(
        inputs, "longcat_flash", "LongcatFlashMLA", "LongcatFlash", rope_parameters=rope, head_dim=8, index_head_dim=8
    )


def test_longcat_scales_its_latents() -> None:
    inputs = inputs_of("longcat-flash-chat", 100)
    assert (inputs.config.q_lora_scale, inputs.config.kv_lora_scale) == (2.0**0.5, 1.5**0.5)
    got = longcat_output(inputs)
    assert excess(got, inputs) <= 1
    for option in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        assert excess(got, inputs, **{option: False}) > 1


def test_dots3_normalizes_k_pe_before_it_is_rotated() -> None:
    """Its norm of k_pe, alone: the module gates its heads, which MLAConfig does not express."""
    modeling = importlib.import_module("transformers.models.dots3_note.modeling_dots3_note")
    plain = inputs_of("deepseek-v3", 100)
    config = replace(plain.config, k_pe_norm=True, latent_norm_eps=1e-5)
    assert config.rope is not None
    r, c, rng = config.qk_rope_head_dim, config.kv_lora_rank, np.random.default_rng(0)
    weights = {**plain.weights, "k_rope_only_layernorm": rng.uniform(0.5, 1.5, r)}
    _, k_pe = project_latent(plain.hidden, plain.positions, weights, config)
    norm = modeling.Dots3NoteRMSNorm(r, eps=1e-5)
    norm.weight.data = torch.from_numpy(weights["k_rope_only_layernorm"]).float()
    down = torch.from_numpy(plain.hidden @ weights["kv_a_proj_with_mqa"][c:].T).float()
    normed = norm(down).detach().double().numpy()
    want = apply_rope(normed, plain.positions, config.rope)
    assert np.abs(k_pe - want).max() <= 2**-20 * np.abs(want).max()  # the module's norm is of float32
    other = project_latent(plain.hidden, plain.positions, weights, replace(config, k_pe_norm=False))[1]
    assert np.abs(k_pe - other).max() > 0.01 * np.abs(want).max()


def mistral_output(inputs: LayerInputs) -> Array:
    scaling = layer_models()["mistral-small-4-119b-2603"].fields["rope_scaling"]
    rope = {**scaling, "rope_type": "yarn", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    return module_output(inputs, "mistral4", "Mistral4Attention", "Mistral4", rope_parameters=rope)


@pytest.mark.parametrize("start", [0, 8189, 24570])
def test_mistral_queries_have_a_temperature_from_the_original_context_on(start: int) -> None:
    inputs = inputs_of("mistral-small-4-119b-2603", start)
    got = mistral_output(inputs)
    assert excess(got, inputs) <= 1
    assert (excess(got, inputs, llama_4_scaling=None) > 1) == (start > 0)


def minicpm3_output(inputs: LayerInputs) -> Array:
    assert inputs.config.rope is not None
    longrope = inputs.config.rope.longrope
    assert longrope is not None
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": list(longrope.short_factor),
        "long_factor": list(longrope.long_factor),
        "original_max_position_embeddings": longrope.original_max_position_embeddings,
    }
    context = inputs.config.rope.max_position_embeddings
    return module_output(
        inputs, "minicpm3", "MiniCPM3Attention", "MiniCPM3", rope_parameters=rope, max_position_embeddings=context
    )


def with_context(config: MLAConfig, max_position_embeddings: int) -> MLAConfig:
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, max_position_embeddings=max_position_embeddings))


@pytest.mark.parametrize(("context", "start"), [(32768, 1000), (131072, 40000)])
def test_minicpm3_divides_its_frequencies(context: int, start: int) -> None:
    """The short factors within the original context, the long ones and their factor on cos and sin beyond."""
    plain = inputs_of("minicpm3-4b", start)
    inputs = replace(plain, config=with_context(plain.config, context))
    got = minicpm3_output(inputs)
    assert excess(got, inputs) <= 1
    assert excess(got, replace(plain, config=with_context(plain.config, 131072 + 32768 - context))) > 1
    assert inputs.config.rope is not None
    unscaled = replace(inputs.config.rope, longrope=None, max_position_embeddings=None)
    assert excess(got, inputs, rope=unscaled) > 1


def test_latent_norms_of_published_models_have_the_eps_of_their_class() -> None:
    """Each checkpoint states an rms_norm_eps of 1e-5, and the norms of the latents do not take it."""
    for model, output in (("longcat-flash-chat", longcat_output), ("minicpm3-4b", minicpm3_output)):
        assert layer_models()[model].fields["rms_norm_eps"] == 1e-5
        inputs = inputs_of(model, 0)
        inputs = replace(inputs, hidden=inputs.hidden * 2.0**-10)
        got = output(inputs)
        assert excess(got, inputs) <= 1
        assert excess(got, inputs, latent_norm_eps=1e-5) > 1


def test_ling_gates_its_heads() -> None:
    case = LayerCase(
        dtype="float32", prompt=6, hidden_size=24, num_heads=3, model="ling-3.0-flash", start=100, **WIDTHS
    )
    inputs = case.build()
    assert (inputs.config.output_gate, inputs.config.q_lora_rank) == ("head", None)
    rope = {"rope_type": "default", "rope_theta": 6e6}
    got = module_output(
        inputs, "bailing_hybrid", "BailingHybridAttention", "BailingHybrid", rope_parameters=rope, head_dim=8
    )
    assert excess(got, inputs) <= 1
    ungated = {name: w for name, w in inputs.weights.items() if name != "g_proj"}
    assert excess(got, replace(inputs, weights=ungated), output_gate=None) > 1


def axk2_output(inputs: LayerInputs) -> Array:
    """Of a layer whose indexer selects all keys."""
    modeling = importlib.import_module("transformers.models.axk2.modeling_axk2")
    configuration = importlib.import_module("transformers.models.axk2.configuration_axk2")
    config, hidden = inputs.config, torch.from_numpy(inputs.hidden).float()
    b, s, _ = hidden.shape
    theirs = configuration.AXK2Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        num_hidden_layers=1,
        q_lora_rank=config.q_lora_rank,
        index_topk=s,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
        attention_bias=False,
        **WIDTHS,
    )
    module = modeling.AXK2Attention(theirs, layer_idx=0).eval()
    state = {f"{name}.weight": torch.from_numpy(w).float() for name, w in inputs.weights.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("indexer.") for name in missing)
    positions = torch.from_numpy(inputs.positions)
    mask = torch.full((s, s), torch.finfo(torch.float32).min).triu(1).expand(b, 1, s, s)
    table = modeling.AXK2RotaryEmbedding(config=theirs)(hidden, positions)
    with torch.no_grad():
        out: Array = module(hidden, table, mask, position_ids=positions)[0].numpy()
    return out


def test_axk2_gates_each_element_by_the_latent_of_its_query() -> None:
    case = LayerCase(
        dtype="float32", prompt=6, hidden_size=24, num_heads=3, q_lora_rank=12, start=100, output_gate="query", **WIDTHS
    )
    inputs = case.build()
    got = axk2_output(inputs)
    assert excess(got, inputs) <= 1
    halves = np.roll(inputs.weights["q_gate_proj"], 12, axis=1)  # the latent before its norm first
    assert excess(got, replace(inputs, weights={**inputs.weights, "q_gate_proj": halves})) > 1


def hy4_output(inputs: LayerInputs) -> Array:
    """Of a layer that shares the selection of an earlier one, here of all keys, and so has no indexer of its own."""
    modeling = importlib.import_module("transformers.models.hy_v4.modeling_hy_v4")
    configuration = importlib.import_module("transformers.models.hy_v4.configuration_hy_v4")
    config = inputs.config
    theirs = configuration.HYV4Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        num_hidden_layers=2,
        q_lora_rank=config.q_lora_rank,
        indexer_types=["full", "shared"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        head_dim=8,
        attn_implementation="eager",
        attention_bias=False,
        **WIDTHS,
    )
    module = modeling.HYV4Attention(theirs, layer_idx=1).eval()
    named = {"g_proj": "gate_proj.weight", "sinks": "sinks"}
    module.load_state_dict(
        {named.get(name, f"{name}.weight"): torch.from_numpy(w).float() for name, w in inputs.weights.items()}
    )
    hidden, positions = torch.from_numpy(inputs.hidden).float(), torch.from_numpy(inputs.positions)
    s = hidden.shape[1]
    mask = torch.full((s, s), -torch.inf).triu(1)[None, None]
    every = torch.arange(s).expand(1, s, s)
    table = modeling.HYV4RotaryEmbedding(config=theirs)(hidden, positions)
    with torch.no_grad():
        out: Array = module(hidden, table, mask, position_ids=positions, prev_topk_indices=every)[0].numpy()
    return out


def test_hy4_has_a_sink_of_each_head_and_gates_each_element() -> None:
    """Their module stores scores, and weights beside the sink, as eager attention does."""
    case = LayerCase(
        dtype="float32",
        prompt=6,
        hidden_size=24,
        num_heads=3,
        q_lora_rank=12,
        layout="half",
        start=100,
        output_gate="element",
        attention_sink=True,
        **WIDTHS,
    )
    inputs = case.build()
    got = hy4_output(inputs)
    assert excess(got, inputs) <= 1
    for option, without in (("attention_sink", False), ("output_gate", None)):
        name = {"attention_sink": "sinks", "output_gate": "g_proj"}[option]
        fewer = {each: w for each, w in inputs.weights.items() if each != name}
        assert excess(got, replace(inputs, weights=fewer), **{option: without}) > 1
