"""The yardstick of float64's own errors: how large a result would be if nothing in it cancelled.

The gauge of a result is Σ |∂result/∂x| |x| over the numbers x that it is computed from, intermediate ones included: what a
relative change ε of each of them moves, divided by ε. A sum of products has the sum of their magnitudes; an output of
attention Σ_j p_j (|v_j| + (1 + G_j) |v_j − o|) with G_j = σ Σ_i |q_i| |k_ji|, since the error δ of a score or of the logarithm
of a weight moves it by p_j δ (v_j − o); the LSE |lse| + Σ_j p_j (1 + G_j).

A sink leaves the share 1/(1 + e^(sink − lse)) of all this. The difference of sink and LSE, as large as both, moves o as well.

Source: Higham, *Accuracy and Stability of Numerical Algorithms*, sections 1.6 and 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.reference.attention import attention, sink_share
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.indexer import layer_norm as reference_layer_norm
from mla_spec.reference.mla import Weights, absorb, query_and_gate, sigmoid
from mla_spec.reference.mla import rms_norm as reference_rms_norm
from mla_spec.reference.rope import apply_rope, join_pairs, split_pairs
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class Gauged:
    """A float64 value and its gauge, of one shape."""

    value: Array
    gauge: Array

    @classmethod
    def of(cls, x: Array) -> Gauged:
        """An input, which is exact: its gauge is its magnitude."""
        return cls(x, np.abs(x))

    def __getitem__(self, index: Any) -> Gauged:
        return Gauged(self.value[index], self.gauge[index])

    def reshape(self, *shape: int) -> Gauged:
        return Gauged(self.value.reshape(*shape), self.gauge.reshape(*shape))


def concat(*parts: Gauged) -> Gauged:
    """The parts side by side, along the last axis."""
    values, gauges = ([getattr(part, name) for part in parts] for name in ("value", "gauge"))
    return Gauged(np.concatenate(values, axis=-1), np.concatenate(gauges, axis=-1))


def product(subscripts: str, weight: Array, x: Gauged) -> Gauged:
    """einsum(subscripts, weight, x), of an exact weight."""
    return Gauged(
        np.einsum(subscripts, weight, x.value, optimize=True),
        np.einsum(subscripts, np.abs(weight), x.gauge, optimize=True),
    )


def times(factor: float | Array, x: Gauged) -> Gauged:
    """Factor · x, where the factor is known to an ulp."""
    return Gauged(factor * x.value, np.abs(factor) * x.gauge)


def gated(x: Gauged, z: Gauged) -> Gauged:
    """x · y of y = sigmoid(z): what moves z moves y by y(1 − y) as much."""
    y = sigmoid(z.value)
    return Gauged(x.value * y, y * x.gauge + np.abs(x.value) * y * (1 + (1 - y) * z.gauge))


def rms_norm(x: Gauged, weight: Array, eps: float) -> Gauged:
    """Weight · x / rms: x moves an element itself, and all of x moves the rms."""
    mean_square = np.mean(x.value**2, axis=-1, keepdims=True) + eps
    rms_moves = np.mean(np.abs(x.value) * x.gauge, axis=-1, keepdims=True) / mean_square  # relative
    gauge = np.abs(weight) * (x.gauge + np.abs(x.value) * rms_moves) / np.sqrt(mean_square)
    return Gauged(reference_rms_norm(x.value, weight, eps), gauge)


def layer_norm(x: Gauged, weight: Array, bias: Array, eps: float) -> Gauged:
    """Weight · c / deviation + bias: x moves its mean as well, and what moves c moves the deviation."""
    centred = x.value - np.mean(x.value, axis=-1, keepdims=True)
    moved = x.gauge + np.mean(x.gauge, axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True) + eps
    deviation_moves = np.mean(np.abs(centred) * moved, axis=-1, keepdims=True) / variance  # relative
    gauge = np.abs(weight) * (moved + np.abs(centred) * deviation_moves) / np.sqrt(variance) + np.abs(bias)
    return Gauged(reference_layer_norm(x.value, weight, bias, eps), gauge)


def rope(x: Gauged, positions: IntArray, rope: RopeConfig | None) -> Gauged:
    """A rotated pair (a, b): |a| + |b| each, times the factor, since cos and sin err by ulps of 1 and not of themselves."""
    if rope is None:
        return x
    first, second = split_pairs(x.gauge, rope.interleaved)
    norm = rope.cos_sin_factor * (first + second)
    return Gauged(apply_rope(x.value, positions, rope), join_pairs(norm, norm, rope.interleaved))


def attend(
    q: Gauged,
    k: Gauged,
    v: Gauged,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | None = None,
    causal: bool = True,
    window: int | None = None,
    attn_sink: Array | None = None,
) -> tuple[Gauged, Gauged]:
    """``attention`` (same shapes, unpaged keys) as (out [..., s, h, dv], lse [..., h, s])."""
    lengths = cache_seqlens
    out, lse = attention(
        q.value,
        k.value,
        v.value,
        softmax_scale=softmax_scale,
        cache_seqlens=lengths,
        causal=causal,
        window=window,
        attn_sink=attn_sink,
    )
    s, t, groups = q.value.shape[-3], k.value.shape[-3], q.value.shape[-2] // k.value.shape[-2]
    keys, key_gauge, values, value_gauge = (np.repeat(x, groups, axis=-2) for x in (k.value, k.gauge, v.value, v.gauge))
    scores = np.einsum("...shd,...thd->...hst", q.value * softmax_scale, keys, optimize=True)
    score_gauge = np.einsum("...shd,...thd->...hst", q.gauge * softmax_scale, key_gauge, optimize=True)
    length = np.asarray(t if lengths is None else lengths)[..., None, None]  # [..., 1, 1]
    limit = length - s + 1 + np.arange(s)[:, None] if causal else length  # [..., s or 1, 1]
    seen = np.arange(t) < limit
    if window is not None:
        seen = seen & (np.arange(t) >= limit - window)
    seen = seen[..., None, :, :]  # [..., 1, s, t]
    top = np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.where(seen, np.exp(np.where(seen, scores - np.where(np.isneginf(top), 0.0, top), 0.0)), 0.0)
    p = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1.0)  # a row with keys sums to 1 at least
    moved = np.where(p > 0, p * (1 + score_gauge), 0.0)  # [..., h, s, t]
    apart = np.abs(
        np.moveaxis(values, -2, -3)[..., None, :, :] - np.moveaxis(out, -2, -3)[..., None, :]
    )  # [..., h, s, t, dv]
    out_gauge = np.einsum("...hst,...thv->...shv", p, value_gauge) + np.einsum("...hst,...hstv->...shv", moved, apart)
    size = np.where(np.isneginf(lse), 0.0, np.abs(lse))  # [..., h, s]
    if attn_sink is not None:
        share = sink_share(np.swapaxes(lse, -1, -2), attn_sink)  # [..., s, h]
        far = np.swapaxes(size, -1, -2) + np.where(np.isinf(attn_sink), 0.0, np.abs(attn_sink))
        out_gauge = share[..., None] * out_gauge + ((1 - share) * far)[..., None] * np.abs(out)
    lse_gauge = size + moved.sum(axis=-1)
    return Gauged(out, out_gauge), Gauged(lse, lse_gauge)


def explicit(
    q: Gauged, latent: Gauged, k_pe: Gauged, w_uk: Array, w_uv: Array, **options: Any
) -> tuple[Gauged, Gauged]:
    """``mla.explicit`` of q [..., s, h, n+r], latent [..., t, c] and k_pe [..., t, r]; ``options`` as in ``attend``."""
    k_nope = product("hnc,...tc->...thn", w_uk, latent)
    value = product("hvc,...tc->...thv", w_uv, latent)
    shared = Gauged(*(np.repeat(x[..., None, :], len(w_uk), axis=-2) for x in (k_pe.value, k_pe.gauge)))
    return attend(q, concat(k_nope, shared), value, **options)


def layer(hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig) -> Gauged:
    """One layer over whole sequences, in the explicit form; arguments as in ``mla.layer``, the absorbed form has the same gauge."""
    n, c, eps = config.qk_nope_head_dim, config.kv_lora_rank, config.latent_norm_eps
    x = Gauged.of(hidden)
    z = product("oe,...e->...o", weights["g_proj"], x) if config.output_gate in ("head", "element") else None
    if config.q_lora_rank is None:
        q = product("oe,...e->...o", weights["q_proj"], x)
    else:
        down = product("oe,...e->...o", weights["q_a_proj"], x)
        c_q = times(config.q_lora_scale, rms_norm(down, weights["q_a_layernorm"], eps))
        if config.output_gate == "query":
            w_q, w_gate = query_and_gate(weights, config)
            q, z = (product("oe,...e->...o", w, concat(c_q, down)) for w in (w_q, w_gate))
        else:
            q = product("oe,...e->...o", weights["q_b_proj"], c_q)
    q = q.reshape(*hidden.shape[:-1], config.num_heads, config.qk_head_dim)
    q = concat(q[..., :n], rope(q[..., n:], positions, config.rope))
    if config.llama_4_scaling is not None:
        q = times(config.llama_4_scaling.factor(positions)[..., None, None], q)
    both = product("oe,...e->...o", weights["kv_a_proj_with_mqa"], x)
    latent = times(config.kv_lora_scale, rms_norm(both[..., :c], weights["kv_a_layernorm"], eps))
    k_pe = both[..., c:]
    k_pe = rms_norm(k_pe, weights["k_rope_only_layernorm"], eps) if config.k_pe_norm else k_pe
    k_pe = rope(k_pe, positions, config.rope)
    w_uk, w_uv = absorb(weights["kv_b_proj"], config)
    sink = weights["sinks"] if config.attention_sink else None
    out, _ = explicit(q, latent, k_pe, w_uk, w_uv, softmax_scale=config.scale, attn_sink=sink)
    if z is not None:
        out = gated(out, z.reshape(*out.value.shape[:-1], -1))
    return product("oe,...e->...o", weights["o_proj"], out.reshape(*hidden.shape[:-1], -1))
