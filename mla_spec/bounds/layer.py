"""The worst-case error of a whole MLA layer, by running error analysis.

Each intermediate carries its exact value and how far a computed one may be from it, elementwise, from 0 at the inputs.
Every intermediate is taken to be rounded to the profile's dtype; keeping more precision only helps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import (
    Bounded,
    concatenated,
    product,
    product_terms,
)
from mla_spec.bounds.running_steps import (
    bounded_gate,
    bounded_rms_norm,
    foldable,
    rotated,
    scaled_by_config,
    temperature,
)
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import Weights, absorb, check_weights, query_and_gate
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class BoundedLayer:
    """The intermediates of a layer and how far computed ones may be from them.

    Attributes:
        q_down, q_norm, c_q: the query latent before its norm, after it, and as it is projected, [..., s, q_lora_rank]; the tokens
            without compression.
        q_nope, q_pe: as they meet the keys, [..., s, h, n] and [..., s, h, r].
        kv_down: latent before its norm and k_pe before it is normalized and rotated, [..., t, c+r].
        kv_norm: the latent after its norm, [..., t, c].
        latent, k_pe: as they are cached, [..., t, c] and [..., t, r].
        q, k, v: the operands of attention, [..., s, h, n+r], [..., t, h, n+r] and [..., t, h, v] in the explicit form,
            [..., s, h, c+r], [..., t, 1, c+r] and [..., t, 1, c] in the absorbed one.
        attended: the result of attention, [..., s, h, v or c].
        lse: of its scores, [..., h, s].
        expanded: the values that it gives, [..., s, h·v].
        g: what g_proj gives, [..., s, h or h·v]; the tokens without a gate.
        out: what o_proj takes, [..., s, h·v].
    """

    q_down: Bounded
    q_norm: Bounded
    c_q: Bounded
    q_nope: Bounded
    q_pe: Bounded
    kv_down: Bounded
    kv_norm: Bounded
    latent: Bounded
    k_pe: Bounded
    q: Bounded
    k: Bounded
    v: Bounded
    attended: Bounded
    lse: Bounded
    expanded: Bounded
    g: Bounded
    out: Bounded


def layer_with_bound(
    hidden: Array,
    positions: IntArray,
    weights: Weights,
    config: MLAConfig,
    profile: Profile,
    *,
    last: int | None = None,
) -> tuple[Array, ErrorBound]:
    """``layer`` over a whole sequence, and the worst-case error of a layer with this profile.

    Row i holds for prefill and for decode with a cache alike, because the same intermediates are rounded once in both.

    Args:
        hidden: [..., s, e].
        positions: [..., s].
        last: outputs of so many tokens at the end only; None for all.

    Returns:
        (hidden states [..., s, e], its bound), of the last tokens where asked for.
    """
    out = bounded_layer(hidden, positions, weights, config, profile, last=last).out
    return product_terms("oe,...e->...o", weights["o_proj"], out, profile)


def bounded_stages(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, profile: Profile
) -> dict[str, Bounded]:
    """What a layer may hand out with ``trace``, by name, in the order of computation; see ``mla_spec.operations.layer``.

    Arguments are those of ``layer_with_bound``. A compressed query has the first two stages, a gate two before the output, which
    is the last one.
    """
    layer = bounded_layer(hidden, positions, weights, config, profile)
    compressed = {} if config.q_lora_rank is None else {"q_a_proj": layer.q_down, "q_a_layernorm": layer.q_norm}
    by_head = (*layer.out.value.shape[:-1], config.num_heads, config.v_head_dim)
    gate = {} if config.output_gate is None else {"g_proj": layer.g, "gated": layer.out.reshape(*by_head)}
    return {
        **compressed,
        "q_nope": layer.q_nope,
        "q_pe": layer.q_pe,
        "kv_a_proj_with_mqa": layer.kv_down,
        "kv_a_layernorm": layer.kv_norm,
        "latent": layer.latent,
        "k_pe": layer.k_pe,
        "lse": layer.lse,
        "attention": layer.expanded.reshape(*by_head),
        **gate,
        "o_proj": product("oe,...e->...o", weights["o_proj"], layer.out, profile),
    }


def bounded_layer(
    hidden: Array,
    positions: IntArray,
    weights: Weights,
    config: MLAConfig,
    profile: Profile,
    *,
    last: int | None = None,
) -> BoundedLayer:
    """The intermediates of ``layer_with_bound``, whose arguments these are."""
    check_weights(weights, config)
    h, n, c = config.num_heads, config.qk_nope_head_dim, config.kv_lora_rank
    x = Bounded(hidden, np.zeros_like(hidden))
    first = 0 if last is None else hidden.shape[-2] - last
    own, own_positions = x[..., first:, :], positions[..., first:]
    q_down, q_norm, c_q, query = _query(own, weights, config, profile)
    query = query.reshape(*own.value.shape[:-1], h, config.qk_head_dim)
    parts = query[..., :n], rotated(query[..., n:], own_positions, config.rope, profile)
    q_nope, q_pe = (temperature(part, own_positions, config.llama_4_scaling, profile) for part in parts)
    kv_down = product("oe,...e->...o", weights["kv_a_proj_with_mqa"], x, profile)
    kv_norm = bounded_rms_norm(kv_down[..., :c], weights["kv_a_layernorm"], config.latent_norm_eps, profile)
    latent = foldable(kv_norm, config.kv_lora_scale, profile.dtype)
    latent = scaled_by_config(latent, config.kv_lora_scale, profile)
    k_pe = kv_down[..., c:]
    if config.k_pe_norm:
        k_pe = bounded_rms_norm(k_pe, weights["k_rope_only_layernorm"], config.latent_norm_eps, profile)
    k_pe = rotated(k_pe, positions, config.rope, profile)
    shared = k_pe[..., None, :]  # [..., t, 1, r]
    w_uk, w_uv = absorb(weights["kv_b_proj"], config)
    if profile.form == "explicit":
        k_nope = product("hnc,...tc->...thn", w_uk, latent, profile)
        value = product("hvc,...tc->...thv", w_uv, latent, profile)
        q, k = concatenated(q_nope, q_pe), concatenated(k_nope, repeated(shared, h))
        attended, lse = _attend(q, k, value, weights, config, profile)
        out = attended
    else:
        q_latent = product("hnc,...shn->...shc", w_uk, q_nope, profile)
        value = latent[..., None, :]  # [..., t, 1, c]
        q, k = concatenated(q_latent, q_pe), concatenated(value, shared)
        attended, lse = _attend(q, k, value, weights, config, profile)
        out = product("hvc,...shc->...shv", w_uv, attended, profile)
    out = out.reshape(*own.value.shape[:-1], h * config.v_head_dim)
    g = _gate(own, c_q, weights, config, profile)
    gated = out if config.output_gate is None else bounded_gate(out, g, profile)
    return BoundedLayer(
        *(q_down, q_norm, c_q, q_nope, q_pe),
        *(kv_down, kv_norm, latent, k_pe),
        *(q, k, value, attended, lse, out, g, gated),
    )


def _query(
    x: Bounded, weights: Weights, config: MLAConfig, profile: Profile
) -> tuple[Bounded, Bounded, Bounded, Bounded]:
    """(q_down, q_norm, c_q, queries [..., s, h·(n+r)] before they are rotated)."""
    if config.q_lora_rank is None:
        return x, x, x, product("oe,...e->...o", weights["q_proj"], x, profile)
    q_down = product("oe,...e->...o", weights["q_a_proj"], x, profile)
    q_norm = bounded_rms_norm(q_down, weights["q_a_layernorm"], config.latent_norm_eps, profile)
    c_q = foldable(q_norm, config.q_lora_scale, profile.dtype)
    if config.output_gate == "query":
        both = concatenated(q_norm, q_down)
        w_q, _ = query_and_gate(weights, config)
        return q_down, q_norm, both, product("oe,...e->...o", w_q, both, profile)
    query = product("oe,...e->...o", weights["q_b_proj"], c_q, profile)
    return q_down, q_norm, c_q, scaled_by_config(query, config.q_lora_scale, profile)


def _gate(x: Bounded, c_q: Bounded, weights: Weights, config: MLAConfig, profile: Profile) -> Bounded:
    """What the gate is the sigmoid of; the tokens x where there is none."""
    if config.output_gate is None:
        return x
    if config.output_gate == "query":
        return product("oe,...e->...o", query_and_gate(weights, config)[1], c_q, profile)
    return product("oe,...e->...o", weights["g_proj"], x, profile)


def repeated(x: Bounded, heads: int) -> Bounded:
    """x [..., 1, i] for each of ``heads`` heads."""
    return Bounded(*(np.repeat(a, heads, axis=-2) for a in (x.value, x.error)))


def _attend(
    q: Bounded, k: Bounded, v: Bounded, weights: Weights, config: MLAConfig, profile: Profile
) -> tuple[Bounded, Bounded]:
    """(out, lse)."""
    bounded = attention_with_bound(
        q.value,
        k.value,
        v.value,
        softmax_scale=config.scale,
        profile=replace(profile, cache_dequantised=None),  # a layer's own cache holds the dtype
        inherited=InheritedError(q.error, k.error, v.error),
        attn_sink=weights["sinks"] if config.attention_sink else None,
        sink_joins=True,
    )
    return Bounded(bounded.out, bounded.out_error.total), Bounded(bounded.lse, bounded.lse_error.total)
