"""The strategy of cases of a layer's gradients: as ``layer_strategies``, at widths whose bound means something backwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.layer import layer_models
from mla_spec.operations.layer_gradients import LayerGradientCase
from mla_spec.properties.strategies.layer import first_layout, fitted, layer_options, supported_models
from mla_spec.properties.strategies.sizes import FLAGS, SEEDS, between, choice
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports


@st.composite
def layer_gradient_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_batch: int = 1
) -> LayerGradientCase:
    """Layers half of which have the options of a published model; prompts of two tokens or more, lest scores get no gradient.

    16-bit formats get aligned weights, and so do positions at which angles in float32 are off by 1e-3 rad and more. They get no
    norm on k_pe: the gradient of its weight is a sum of terms that cancel, of which 16 bits leave nothing.
    """
    narrow, coarse = (format_of(profile.dtype).precision <= bits for bits in (11, 8))
    known = replace(supports, k_pe_norm=supports.k_pe_norm and not narrow)
    names = supported_models(known)
    name = draw(choice(*names)) if names and draw(FLAGS) else "none"
    fields = {} if name == "none" else layer_models()[name].fields
    heads, multiple = draw(between(1, 2)), supports.layer_dim_multiple
    if name == "none":
        compressed = draw(FLAGS)
        rope_dim = 2 * draw(between(0 if supports.rope_optional else 1, 3))
    else:
        compressed = fields["q_lora_rank"] is not None
        rope_dim = 0 if fields["qk_rope_head_dim"] == 0 else 8
    q_lora_rank = draw(between(3, 5)) if compressed else None
    temperature = fields.get("llama_4_scaling")
    starts = (0, 1, 62) if temperature is None else (temperature["original_max_position_embeddings"] - 2, 0)
    start = draw(choice(*starts))
    aligned = narrow or (start > 2**12 and profile.rope.angle != "float64")
    case = LayerGradientCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(between(min_batch, max(min_batch, 1 if coarse else 2))),
        prompt=draw(between(2, 3) if aligned else between(3, 4)),
        hidden_size=heads * draw(between(2, 4)) + (heads == 1),
        num_heads=heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=multiple * draw(between(-(-3 // multiple), max(1, 5 // multiple))),
        qk_nope_head_dim=multiple * draw(between(1, max(1, 3 // multiple))),
        qk_rope_head_dim=rope_dim,
        v_head_dim=draw(between(2, 3)),
        **(layer_options(draw, known, q_lora_rank, rope_dim) if name == "none" else {"model": name}),
        start=start,
        weights="aligned" if aligned else "dense",
        gain=0.125 if coarse else 0.5,
        hidden_scale=1.0 if aligned else draw(choice(1.0, 2.0**-10)),
    )
    made: LayerGradientCase = fitted(case, supports)
    return made


MANY: tuple[dict[str, Any], ...] = ({"prompt": 70}, {"prompt": 260}, {"batch": 6}, {"num_heads": 24, "hidden_size": 24})
"""Tokens, sequences and heads of a layer, more than a tile or a small batch has."""


def many_of_each(supports: Supports, profile: Profile) -> list[LayerGradientCase]:
    """Layers with each gate, with a sink and with a scaled rotary embedding, and then, in formats of more than 16 bits, many
    tokens, sequences and heads.
    """
    scaled = scaled_rope(supports, profile)
    first = gated_or_sunk(supports, profile) + scaled
    if format_of(profile.dtype).bits <= 16:
        return first
    plain = [replace(case, yarn="none", longrope="none", weights="aligned") for case in scaled]
    return first + [fitted(replace(case, **changes), supports) for case in plain for changes in MANY]


def gated_or_sunk(supports: Supports, profile: Profile) -> list[LayerGradientCase]:
    """Two heads, with each kind of gate and with a sink, as far as the subject has them."""
    base = replace(small_layer(supports, profile), num_heads=2, hidden_size=6, q_lora_rank=4)
    cases = [replace(base, output_gate=gate) for gate in supports.output_gate]
    if "layer" in supports.dense_sink:
        cases.append(replace(base, attention_sink=True))
    return [fitted(case, supports) for case in cases]


def scaled_rope(supports: Supports, profile: Profile) -> list[LayerGradientCase]:
    """A layer whose rotary embedding has a factor on cos and sin, where the subject knows one."""
    yarn = supports.yarn and supports.yarn_mscale_rule == "any"
    if not supports.rope_layouts or (not yarn and not supports.longrope):
        return []
    base = small_layer(supports, profile)
    return [fitted(replace(base, yarn="ratio") if yarn else replace(base, longrope="long"), supports)]


def small_layer(supports: Supports, profile: Profile) -> LayerGradientCase:
    """A prompt of three tokens and one head."""
    narrow, coarse = (format_of(profile.dtype).precision <= bits for bits in (11, 8))
    multiple = supports.layer_dim_multiple
    return LayerGradientCase(
        dtype=profile.dtype,
        prompt=3,
        hidden_size=5,
        kv_lora_rank=multiple * -(-3 // multiple),
        qk_nope_head_dim=multiple * -(-2 // multiple),
        qk_rope_head_dim=4,
        v_head_dim=2,
        layout=first_layout(supports),
        latent_norm_eps=supports.latent_norm_eps or 1e-6,
        weights="aligned" if narrow else "dense",
        gain=0.125 if coarse else 0.5,
    )
