"""Multi-head Latent Attention: projections, the explicit and the absorbed form, and whole layers.

DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; equation numbers are that paper's. einsum letters: s query
position, t key position, h head, n nope dim, r rope dim, c latent, v value dim, e model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.attention import attention
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.product import accurate_product
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.typing import Array, IntArray

Weights = Mapping[str, Array]
"""Weights under their checkpoint names, each [out, in]; see ``weight_shapes``."""

Attend = Callable[..., tuple[Array, Array]]
"""``explicit`` or ``absorbed``."""


def weight_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's weights, as in published checkpoints.

    ``kv_a_proj_with_mqa`` has the latent rows first, then the rope rows; ``kv_b_proj`` is viewed as (h, n + v, c), key
    rows first; ``q_proj`` and ``q_b_proj`` as (h, n + r, ·), nope rows first; ``q_gate_proj`` as (h, n + r + v, ·), rows of the
    gate last.
    """
    e, h, c = config.hidden_size, config.num_heads, config.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        shapes["q_proj"] = (h * config.qk_head_dim, e)
    else:
        shapes["q_a_proj"] = (config.q_lora_rank, e)
        shapes["q_a_layernorm"] = (config.q_lora_rank,)
        if config.output_gate == "query":
            shapes["q_gate_proj"] = (h * (config.qk_head_dim + config.v_head_dim), 2 * config.q_lora_rank)
        else:
            shapes["q_b_proj"] = (h * config.qk_head_dim, config.q_lora_rank)
    shapes["kv_a_proj_with_mqa"] = (config.cache_dim, e)
    shapes["kv_a_layernorm"] = (c,)
    if config.k_pe_norm:
        shapes["k_rope_only_layernorm"] = (config.qk_rope_head_dim,)
    shapes["kv_b_proj"] = (h * (config.qk_nope_head_dim + config.v_head_dim), c)
    shapes["o_proj"] = (e, h * config.v_head_dim)
    if config.output_gate in ("head", "element"):
        shapes["g_proj"] = (h if config.output_gate == "head" else h * config.v_head_dim, e)
    if config.attention_sink:
        shapes["sinks"] = (h,)
    return shapes


def check_weights(weights: Weights, config: MLAConfig) -> None:
    """Raise ValueError unless ``weights`` has exactly the names and shapes of ``weight_shapes``."""
    shapes = weight_shapes(config)
    for name in sorted(set(shapes) ^ set(weights)):
        raise ValueError(f"weights: {'missing' if name in shapes else 'unexpected'} {name!r}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"weights: {name} must have shape {shape}, got {tuple(weights[name].shape)}")


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Weight · x / sqrt(mean(x²) + eps) over the last axis (RMSNorm, arXiv 1910.07467, equation 4)."""
    rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return weight * x / rms


def project_query(hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig) -> tuple[Array, Array]:
    """The queries, equations 37-40: c_Q = W_DQ h, [q_C; q_R] = [W_UQ; W_QR] c_Q, q_R rotated.

    LongCat-Flash multiplies c_Q by sqrt(e / q_lora_rank) after its norm (transformers models/longcat_flash), Mistral-Large-3
    the finished query by ``llama_4_scaling``.

    Args:
        hidden: [..., s, e].
        positions: [..., s].

    Returns:
        (q_nope [..., s, h, n], q_pe [..., s, h, r]).
    """
    if config.q_lora_rank is None:
        q = accurate_product(hidden, weights["q_proj"].T)  # [..., s, h·(n+r)]
    else:
        w_q = query_and_gate(weights, config)[0] if config.output_gate == "query" else weights["q_b_proj"]
        q = accurate_product(query_latent(hidden, weights, config), w_q.T)  # [..., s, h·(n+r)]
    q = q.reshape(*hidden.shape[:-1], config.num_heads, config.qk_head_dim)  # [..., s, h, n+r]
    q_nope, q_pe = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
    if config.rope is not None:
        q_pe = apply_rope(q_pe, positions, config.rope)
    if config.llama_4_scaling is not None:
        factor = config.llama_4_scaling.factor(positions)[..., None, None]  # [..., s, 1, 1]
        q_nope, q_pe = factor * q_nope, factor * q_pe
    return q_nope, q_pe


def query_latent(hidden: Array, weights: Weights, config: MLAConfig) -> Array:
    """What is projected up to queries, [..., s, q_lora_rank]; beside it, with a gate "query", the latent before its norm.

    Source of the latter: transformers 5.23.0, models/axk2/modeling_axk2.py, lines 586-590 (A.X-K2).
    """
    down = accurate_product(hidden, weights["q_a_proj"].T)
    c_q = config.q_lora_scale * rms_norm(down, weights["q_a_layernorm"], config.latent_norm_eps)
    return np.concatenate([c_q, down], axis=-1) if config.output_gate == "query" else c_q


def query_and_gate(weights: Weights, config: MLAConfig) -> tuple[Array, Array]:
    """(W_Q [h·(n+r), 2·q_lora_rank], W_G [h·v, 2·q_lora_rank]): the rows of ``q_gate_proj``."""
    rows = weights["q_gate_proj"].reshape(config.num_heads, -1, weights["q_gate_proj"].shape[-1])  # [h, n+r+v, ·]
    of_query, of_gate = np.split(rows, [config.qk_head_dim], axis=1)
    return of_query.reshape(-1, rows.shape[-1]), of_gate.reshape(-1, rows.shape[-1])


def project_latent(hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig) -> tuple[Array, Array]:
    """What is cached, equations 41 and 43: the normalised latent c_KV = W_DKV h, and k_R = RoPE(W_KR h).

    The RMSNorm on the latents is in every published implementation; the paper mentions it in section 3.1.2. LongCat-Flash
    multiplies the latent, not k_R, by sqrt(e / kv_lora_rank) after it (transformers models/longcat_flash). dots3 has an RMSNorm
    on k_R too, before it is rotated (transformers models/dots3_note).

    Returns:
        (latent [..., s, c], k_pe [..., s, r]).
    """
    both = accurate_product(hidden, weights["kv_a_proj_with_mqa"].T)  # [..., s, c+r]
    latent, k_pe = both[..., : config.kv_lora_rank], both[..., config.kv_lora_rank :]
    if config.k_pe_norm:
        k_pe = rms_norm(k_pe, weights["k_rope_only_layernorm"], config.latent_norm_eps)
    if config.rope is not None:
        k_pe = apply_rope(k_pe, positions, config.rope)
    latent = rms_norm(latent, weights["kv_a_layernorm"], config.latent_norm_eps)
    return config.kv_lora_scale * latent, k_pe


def absorb(kv_b_proj: Array, config: MLAConfig) -> tuple[Array, Array]:
    """Split W_UKV into the factors that absorption folds into the query and the output.

    Args:
        kv_b_proj: [h·(n+v), c].

    Returns:
        (w_uk [h, n, c], w_uv [h, v, c]): rows of ``kv_b_proj``, unchanged.
    """
    n, v = config.qk_nope_head_dim, config.v_head_dim
    per_head = kv_b_proj.reshape(config.num_heads, n + v, config.kv_lora_rank)  # [h, n+v, c]
    return per_head[:, :n], per_head[:, n:]


def explicit(
    q_nope: Array,
    q_pe: Array,
    latent: Array,
    k_pe: Array,
    w_uk: Array,
    w_uv: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    attn_sink: Array | None = None,
) -> tuple[Array, Array]:
    """Expand keys and values per head, equations 42, 44-46: k = [W_UK c; k_R], v = W_UV c, then multi-head attention.

    Args:
        q_nope, q_pe: [..., s, h, n] and [..., s, h, r].
        latent, k_pe: [..., t, c] and [..., t, r].
        w_uk, w_uv: [h, n, c] and [h, v, c].
        attn_sink: [h]; see ``attention``.

    Returns:
        (out [..., s, h, v], lse [..., h, s]).
    """
    k_nope = _by_head(latent[..., None, :], np.swapaxes(w_uk, 1, 2))  # [..., t, h, n]
    value = _by_head(latent[..., None, :], np.swapaxes(w_uv, 1, 2))  # [..., t, h, v]
    shared = np.broadcast_to(k_pe[..., None, :], (*k_nope.shape[:-1], k_pe.shape[-1]))  # [..., t, h, r]
    return attention(
        np.concatenate([q_nope, q_pe], axis=-1),
        np.concatenate([k_nope, shared], axis=-1),
        value,
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        attn_sink=attn_sink,
    )


def absorbed(
    q_nope: Array,
    q_pe: Array,
    latent: Array,
    k_pe: Array,
    w_uk: Array,
    w_uv: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    attn_sink: Array | None = None,
) -> tuple[Array, Array]:
    """Fold W_UK into the query and W_UV into the output: q̃ = [W_UKᵀ q_C; q_R] attends to rows [c; k_R], value c.

    Multi-query attention over the cache itself (section 2.1.2: "absorb"). Arguments and result are those of
    ``explicit``, to which it is equal in exact arithmetic.
    """
    q_latent = _by_head(q_nope, w_uk)  # [..., s, h, c]
    out, lse = attention(
        np.concatenate([q_latent, q_pe], axis=-1),
        np.concatenate([latent, k_pe], axis=-1)[..., None, :],  # [..., t, 1, c+r]
        latent[..., None, :],  # [..., t, 1, c]
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        attn_sink=attn_sink,
    )
    return _by_head(out, np.swapaxes(w_uv, 1, 2)), lse


def _by_head(x: Array, weights: Array) -> Array:
    """The product of each head with its own weights: x [..., t, h or 1, i], weights [h, i, o], result [..., t, h, o]."""
    return np.swapaxes(accurate_product(np.swapaxes(x, -2, -3), weights), -2, -3)


@dataclass(frozen=True)
class LatentCache:
    """Rows cached so far: latent [..., t, c] and k_pe [..., t, r]."""

    latent: Array
    k_pe: Array

    def append(self, latent: Array, k_pe: Array) -> LatentCache:
        """The cache with the rows of later tokens after its own."""
        return LatentCache(np.concatenate([self.latent, latent], axis=-2), np.concatenate([self.k_pe, k_pe], axis=-2))


def layer(
    hidden: Array,
    positions: IntArray,
    weights: Weights,
    config: MLAConfig,
    *,
    cache: LatentCache | None = None,
    attend: Attend = explicit,
) -> tuple[Array, LatentCache]:
    """One MLA layer, equations 37-47: prefill without a cache, decode (or a further chunk) with one.

    Token i attends to the cached rows and to tokens 0 .. i of ``hidden``.

    Args:
        hidden: [..., s, e].
        positions: [..., s], of these tokens.
        cache: rows of the earlier tokens.
        attend: ``explicit`` or ``absorbed``.

    Returns:
        (hidden states [..., s, e], cache with the new rows).

    Raises:
        ValueError: weights do not fit the configuration.
    """
    check_weights(weights, config)
    q_nope, q_pe = project_query(hidden, positions, weights, config)
    latent, k_pe = project_latent(hidden, positions, weights, config)
    cache = LatentCache(latent, k_pe) if cache is None else cache.append(latent, k_pe)
    w_uk, w_uv = absorb(weights["kv_b_proj"], config)
    out, _ = attend(
        *(q_nope, q_pe, cache.latent, cache.k_pe, w_uk, w_uv),
        softmax_scale=config.scale,
        attn_sink=weights["sinks"] if config.attention_sink else None,
    )
    out = gated(out, hidden, weights, config)
    return accurate_product(out.reshape(*hidden.shape[:-1], -1), weights["o_proj"].T), cache


def gated(out: Array, hidden: Array, weights: Weights, config: MLAConfig) -> Array:
    """The result of attention [..., s, h, v] times sigmoid(W_G h), of which each head has one number or v.

    Sources: transformers 5.23.0, models/bailing_hybrid/modeling_bailing_hybrid.py, lines 395-396 (Ling-3.0), and
    models/dots3_note/modeling_dots3_note.py, lines 601-602: one a head; models/hy_v4/modeling_hy_v4.py, lines 408 and 478
    (Hy4), and vLLM 0.33.0, vllm/models/kimi_k3/nvidia/mla.py (Kimi-K3): one an element. models/axk2/modeling_axk2.py, lines
    589-592 and 396 of its modular file (A.X-K2): one an element, of the query's latent.
    """
    if config.output_gate is None:
        return out
    return out * gate(hidden, weights, config).reshape(*out.shape[:-1], -1)


def gate(hidden: Array, weights: Weights, config: MLAConfig) -> Array:
    """sigmoid(W_G h) of a configuration with an output gate, [..., s, h or h·v]."""
    if config.output_gate == "query":
        return sigmoid(accurate_product(query_latent(hidden, weights, config), query_and_gate(weights, config)[1].T))
    return sigmoid(accurate_product(hidden, weights["g_proj"].T))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)), to a few roundoffs of itself whatever its size."""
    e = np.exp(-np.abs(x))
    share: Array = np.where(x < 0, e, 1.0) / (1 + e)
    return share


def multi_head_as_mla(k: Array, v: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """Multi-head, grouped-query or multi-query attention as MLA of full rank, with identity up-projections.

    The latent is the concatenation of all keys and values; W_UK and W_UV select each head's own rows. With these,
    ``explicit`` and ``absorbed`` (with no rope dims) equal ``attention(q, k, v)``.

    Args:
        k: [..., t, g, d]; g = h for multi-head, 1 for multi-query attention.
        v: [..., t, g, dv].
        num_heads: h, a multiple of g; heads of a group are consecutive.

    Returns:
        (latent [..., t, g·(d+dv)], w_uk [h, d, g·(d+dv)], w_uv [h, dv, g·(d+dv)]).
    """
    g, d = k.shape[-2:]
    dv = v.shape[-1]
    latent = np.concatenate([k.reshape(*k.shape[:-2], g * d), v.reshape(*v.shape[:-2], g * dv)], axis=-1)
    identity = np.eye(g * (d + dv))
    group = np.arange(num_heads) // (num_heads // g)
    w_uk = identity[: g * d].reshape(g, d, -1)[group]
    w_uv = identity[g * d :].reshape(g, dv, -1)[group]
    return latent, w_uk, w_uv
