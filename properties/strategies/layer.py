"""Strategies of layer cases: drawn options, or those of a published model, at small widths."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.layer import APART, LayerCase, layer_models
from mla_spec.properties.strategies.rope import THETAS, layouts, scalings, supported_scalings
from mla_spec.properties.strategies.sizes import FLAGS, SEEDS, between, choice, large_size
from mla_spec.reference.formats import format_of
from mla_spec.reference.published import PublishedModel
from mla_spec.subjects.supports import LAYER_DIMS, Supports

C = TypeVar("C", bound=LayerCase)

LONG = 4161
"""Tokens of a long prompt."""

IN_CHUNKS = (590,)
CHUNK = 70
"""Tokens of prompts that come in two calls, where the subject's prefill continues a cache, and those of the second call."""

BELOW_4096 = 4094
"""Tokens of a prompt after which decoded ones follow across 4096; in the first dtype only, since it takes long."""

PROMPTS = (126, 254, 574, *IN_CHUNKS, 1022, LONG)
"""Tokens of prompts; decoded ones follow across 128, 256 and 1024, where caches grow and kernels change."""


@functools.cache
def supported_models(supports: Supports) -> list[str]:
    """The names in ``layer_models`` of those whose options the subject has."""
    return [name for name, model in layer_models().items() if _supported(model, supports)]


def _supported(model: PublishedModel, supports: Supports) -> bool:
    fields = model.fields
    scaling = fields["rope_scaling"] or {"type": "default"}
    rotary = fields["rope"] == "rotary"
    layout = "interleaved" if fields["rope_interleave"] else "half"
    equal = scaling.get("mscale") == scaling.get("mscale_all_dim")
    return (
        (layout in supports.rope_layouts if rotary else supports.rope_optional)
        and (scaling["type"] != "yarn" or (supports.yarn and (equal or supports.yarn_mscale_rule == "any")))
        and (scaling["type"] != "longrope" or supports.longrope)
        and (supports.mla_scale_lora or not (fields.get("mla_scale_q_lora") or fields.get("mla_scale_kv_lora")))
        and (supports.k_pe_norm or not fields.get("k_pe_norm"))
        and (supports.mla_scale_lora != "always" or bool(fields.get("mla_scale_kv_lora")))
        and (supports.q_lora_rank == "any" or fields["q_lora_rank"] is not None)
        and (supports.llama_4_scaling or fields.get("llama_4_scaling") is None)
        and fields.get("output_gate") in (None, *supports.output_gate)
        and ("layer" in supports.dense_sink or not fields.get("attention_sink"))
        and (supports.layer_thetas is None or not rotary or float(fields["rope_theta"]) in supports.layer_thetas)
        and supports.latent_norm_eps in (None, fields["latent_norm_eps"])
    )


def fitted(case: C, supports: Supports) -> C:
    """The case, with what a layer of the subject always has, and without what it never has."""
    if not supports.rope_layouts:
        case = replace(case, layout="none", yarn="none", longrope="none")
    if supports.q_lora_rank == "required" and case.q_lora_rank is None:
        case = replace(case, q_lora_rank=5)
    if supports.mla_scale_lora == "always" and case.model == "none":
        case = replace(case, mla_scale_q_lora=case.q_lora_rank is not None, mla_scale_kv_lora=True)
    if supports.layer_thetas and case.theta not in supports.layer_thetas:
        case = replace(case, theta=supports.layer_thetas[case.seed % len(supports.layer_thetas)])
    if supports.layer_cache == "none":
        case = replace(case, steps=0)
    return _within_positions(_with_dims(case, supports), supports)


def _with_dims(case: C, supports: Supports) -> C:
    """The case with dimensions that the subject has: none smaller than before."""
    rounded = {name: getattr(case, name) for name in LAYER_DIMS if getattr(case, name)}
    if case.qk_rope_head_dim:
        rounded["qk_rope_head_dim"] = max(case.qk_rope_head_dim, supports.layer_min_rope_dim)
    rounded = {
        name: _up(dim, math.lcm(_EVEN.get(name, 1), supports.multiple_of(name))) for name, dim in rounded.items()
    }
    if supports.layer_equal_head_dims:
        both = math.lcm(*(supports.multiple_of(name) for name in ("qk_nope_head_dim", "v_head_dim")))
        rounded["qk_nope_head_dim"] = rounded["v_head_dim"] = _up(case.qk_nope_head_dim, both)
    return replace(case, **rounded)


_EVEN = {"qk_rope_head_dim": 2}


def _up(dim: int, multiple: int) -> int:
    return -(-dim // multiple) * multiple


def _within_positions(case: C, supports: Supports) -> C:
    """The case with positions that the subject has: fewer sequences, an earlier start, and where that is too little, a shorter prompt."""
    if supports.layer_max_positions is None:
        return case
    after_first = supports.layer_max_positions - case.steps - 1
    batch = min(case.batch, 1 + after_first // APART)
    free = after_first + 1 - APART * (batch - 1)
    prompt = min(case.prompt, free)
    return replace(case, batch=batch, prompt=prompt, start=min(case.start, free - prompt))


def first_layout(supports: Supports) -> str:
    """The first layout that the subject has, "none" where it has no rotary embedding."""
    return supports.rope_layouts[0] if supports.rope_layouts else "none"


def draw_layer(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_prompt: int = 1,
    min_steps: int = 0,
    max_steps: int = 3,
) -> LayerCase:
    """Layers with all dimensions different, half of them with the options of a published model.

    16-bit formats get aligned weights, small dims and small query gains: there the worst-case bound still means something.
    A quarter of the cases has many sequences or tokens, or, where the format is not bfloat16, many heads.
    """
    narrow = format_of(profile.dtype).precision <= 11
    coarse = format_of(profile.dtype).precision <= 8
    names = supported_models(supports)
    name = draw(choice(*names)) if names and draw(FLAGS) else "none"
    size = large_size(draw, ("batch", "prompt") if coarse else ("batch", "prompt", "prompt", "heads"))
    heads = draw(choice(5, 8) if size == "heads" else between(1, 2 if coarse else 4))
    largest = 6 if narrow else 16
    multiple = supports.layer_dim_multiple
    if name == "none":
        compressed = draw(FLAGS)
        rope_dim = 2 * draw(between(0 if supports.rope_optional else 1, 4))
    else:
        fields = layer_models()[name].fields
        compressed = fields["q_lora_rank"] is not None
        # Fewer pairs may all lie where YaRN leaves frequencies as they are.
        rope_dim = 0 if fields["qk_rope_head_dim"] == 0 else 2 * draw(between(4, 6))
    q_lora_rank = draw(between(1, largest)) if compressed else None
    start = draw(choice(*_starts(name, narrow)))
    # Angles in float32 are off by 1e-3 rad beyond 2^11 and by 0.03 rad in the farthest, times the size of the scores.
    gains: tuple[float, ...] = (1.0, 0.5, 2.0)
    if coarse or (start > 2**14 and profile.rope.angle != "float64"):
        gains = (0.0625, 0.125)
    elif start > 2**11 and profile.rope.angle != "float64":
        gains = (0.25,)
    case = LayerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(choice(5, 9) if size == "batch" else between(1, 3)),
        prompt=draw(choice(16, 32, 64, 16, 17, 33, 65) if size == "prompt" else between(min_prompt, 9)),
        steps=draw(between(min_steps, max(min_steps, max_steps))),
        hidden_size=heads * draw(between(2, 4 if narrow else 12)),
        num_heads=heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=multiple * draw(between(-(-2 // multiple), max(1, largest // multiple))),
        qk_nope_head_dim=multiple * draw(between(1, max(1, largest // 2 // multiple))),
        qk_rope_head_dim=rope_dim,
        v_head_dim=draw(between(1, largest // 2)),
        **(layer_options(draw, supports, q_lora_rank, rope_dim) if name == "none" else {"model": name}),
        start=start,
        weights="aligned" if narrow else "dense",
        gain=draw(choice(*gains)),
        hidden_scale=draw(choice(1.0, 2.0**-10)),
    )
    return fitted(case, supports)


@st.composite
def layer_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> LayerCase:
    """What ``draw_layer`` draws."""
    return draw_layer(draw, supports, profile, **keywords)


def every_option(supports: Supports, profile: Profile) -> list[LayerCase]:
    """Every published model once, every scaling once, and the widths of DeepSeek-V3's cache."""
    narrow, coarse = (format_of(profile.dtype).precision <= bits for bits in (11, 8))
    multiple = supports.layer_dim_multiple
    base = LayerCase(
        dtype=profile.dtype,
        prompt=3,
        steps=1,
        hidden_size=5,
        q_lora_rank=5,
        kv_lora_rank=multiple * -(-5 // multiple),
        qk_nope_head_dim=multiple * -(-3 // multiple),
        qk_rope_head_dim=8,
        v_head_dim=3,
        layout=first_layout(supports),
        latent_norm_eps=supports.latent_norm_eps or 1e-6,
        weights="aligned" if narrow else "dense",
        gain=0.0625 if coarse else 0.5,
    )
    cases = []
    for i, name in enumerate(supported_models(supports)):
        fields, starts = layer_models()[name].fields, _starts(name, narrow)
        start = starts[i % len(starts)]
        far = start > 2**11 and profile.rope.angle != "float64"
        case = replace(base, model=name, seed=i, start=start, gain=0.0625 if far else base.gain)
        if fields["q_lora_rank"] is None:
            case = replace(case, q_lora_rank=None)
        cases.append(case if fields["qk_rope_head_dim"] else replace(case, qk_rope_head_dim=0))
    cases += [replace(base, seed=i, start=250, **scaling) for i, scaling in enumerate(supported_scalings(supports))]
    if supports.k_pe_norm:
        cases += [replace(base, start=250, k_pe_norm=True), replace(base, start=250, k_pe_norm=True, layout="none")][
            : 1 + supports.rope_optional
        ]
    cases += [replace(base, output_gate=gate, num_heads=2, hidden_size=6) for gate in supports.output_gate]
    if "layer" in supports.dense_sink:
        cases.append(replace(base, attention_sink=True, num_heads=2, hidden_size=6))
    cases += [replace(base, seed=seed, gain=1.0, hidden_scale=2.0**-10) for seed in range(3)]
    cases.append(replace(base, num_heads=72, hidden_size=72, attention_sink="layer" in supports.dense_sink))
    # sums over so many elements leave a bound its meaning where few of them change sign
    wide = replace(base, weights="aligned", gain=0.0625)
    cases.append(replace(wide, num_heads=128, hidden_size=128, kv_lora_rank=512))
    cases.append(replace(wide, qk_nope_head_dim=192, qk_rope_head_dim=64, kv_lora_rank=512))
    cases.append(replace(wide, q_lora_rank=1536))
    cases.append(replace(wide, hidden_size=7168))
    cases.append(replace(wide, batch=130))
    cases.append(replace(base, kv_lora_rank=256, qk_rope_head_dim=32, num_heads=2, hidden_size=6))
    cases.append(replace(base, kv_lora_rank=512, qk_rope_head_dim=64, num_heads=2, hidden_size=6))
    return list(dict.fromkeys(fitted(case, supports) for case in cases))


def long_layers(supports: Supports, profile: Profile) -> list[LayerCase]:
    """Hundreds of tokens and thousands, where the subject has so many positions; with two sequences, a sink and YaRN once each.

    Rows of the cache are as wide as DeepSeek-V3's in formats of 16 bits, and narrow in others.
    """
    case = every_option(supports, profile)[-1]
    if format_of(profile.dtype).bits > 16:
        case = replace(case, kv_lora_rank=case.qk_nope_head_dim, qk_rope_head_dim=8)
    # aligned weights have a mean, so that outputs over many tokens do not average out to 0
    case = replace(case, num_heads=1, hidden_size=5, gain=0.0625, q_lora_rank=None, weights="aligned")
    sunk = {"attention_sink": True} if "layer" in supports.dense_sink else {}
    scaled = {"yarn": "deepseek-v3"} if supports.yarn and case.layout != "none" else {}
    options: dict[int, dict[str, Any]] = {574: {"steps": 8}, 1022: {"batch": 2} | sunk, LONG: scaled}
    prompts = (*PROMPTS, *((BELOW_4096,) if profile.dtype == supports.dtypes[0] else ()))
    wanted = [replace(case, **{"prompt": prompt, "steps": 3} | options.get(prompt, {})) for prompt in prompts]
    made = [fitted(each, supports) for each in wanted]
    return [case for case, prompt in zip(made, prompts, strict=True) if case.prompt == prompt]


def layer_options(draw: DrawFn, supports: Supports, q_lora_rank: int | None, rope_dim: int) -> dict[str, Any]:
    """Options that a layer of no published model has."""
    layout = "none"
    if rope_dim:
        rotary = bool(supports.rope_layouts) and (not supports.rope_optional or draw(between(0, 4)) > 0)
        layout = draw(layouts(supports)) if rotary else "none"
    scaled = FLAGS if supports.mla_scale_lora else choice(False)
    options = {
        "layout": layout,
        "theta": draw(choice(*THETAS)),
        **(draw(scalings(supports)) if layout != "none" else {}),
        "latent_norm_eps": supports.latent_norm_eps or draw(choice(1e-6, 1e-5)),
        "mla_scale_q_lora": q_lora_rank is not None and draw(scaled),
        "mla_scale_kv_lora": draw(scaled),
        "llama_4_scaling": supports.llama_4_scaling and draw(FLAGS),
        "k_pe_norm": supports.k_pe_norm and rope_dim > 0 and draw(FLAGS),
        "output_gate": draw(choice("none", *supports.output_gate)) if supports.output_gate else "none",
        "attention_sink": "layer" in supports.dense_sink and draw(FLAGS),
    }
    if options["output_gate"] == "query" and (q_lora_rank is None or options["mla_scale_q_lora"]):
        options["output_gate"] = "none"
    return options


def _starts(model: str, narrow: bool) -> tuple[int, ...]:
    """First positions; those of a model with a temperature reach the first position that has one."""
    scaling = None if model == "none" else layer_models()[model].fields.get("llama_4_scaling")
    if scaling is not None:
        original = scaling["original_max_position_embeddings"]
        return original - 2, original, 4 * original - 2, 0
    return (0, 1, 60) if narrow else (0, 0, 1, 60, 4093)


def rotating_layer(supports: Supports, profile: Profile) -> list[LayerCase]:
    """A small layer whose queries and keys are rotated, with decoded tokens."""
    narrow, coarse = (format_of(profile.dtype).precision <= bits for bits in (11, 8))
    multiple = supports.layer_dim_multiple
    case = LayerCase(
        dtype=profile.dtype,
        prompt=4,
        steps=2,
        hidden_size=8,
        num_heads=2,
        kv_lora_rank=multiple * -(-4 // multiple),
        qk_nope_head_dim=multiple * -(-2 // multiple),
        qk_rope_head_dim=4,
        layout=first_layout(supports),
        start=60,
        latent_norm_eps=supports.latent_norm_eps or 1e-6,
        weights="aligned" if narrow else "dense",
        gain=0.125 if coarse else 0.5,
    )
    return [fitted(case, supports)]
