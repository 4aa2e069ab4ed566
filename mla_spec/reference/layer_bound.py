"""The worst-case error of a whole MLA layer, by running error analysis.

Each intermediate carries its exact value and how far a computed one may be from it, elementwise, from 0 at the inputs.
Every intermediate is taken to be rounded to the profile's dtype; keeping more precision only helps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.reference.bounded import Bounded, concatenated, rounded
from mla_spec.reference.bounds import InheritedError, attention_with_bound
from mla_spec.reference.config import Llama4Scaling, MLAConfig
from mla_spec.reference.error_bound import ErrorBound
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.mla import Weights, absorb, check_weights, rms_norm
from mla_spec.reference.profile import Profile, gamma
from mla_spec.reference.rope_bound import rope_with_bound
from mla_spec.reference.typing import Array, IntArray

_U64 = FORMATS["float64"].unit_roundoff


def _product(subscripts: str, weight: Array, x: Bounded, profile: Profile) -> Bounded:
    """einsum(subscripts, weight, x) summed over one index, as a projection in the profile's arithmetic."""
    value, bound = _product_terms(subscripts, weight, x, profile)
    return Bounded(value, bound.total)


def _product_terms(subscripts: str, weight: Array, x: Bounded, profile: Profile) -> tuple[Array, ErrorBound]:
    value = np.einsum(subscripts, weight, x.value, optimize=True)
    carried = np.einsum(subscripts, np.abs(weight), x.error, optimize=True)
    gauge = np.einsum(subscripts, np.abs(weight), np.abs(x.value) + x.error, optimize=True)
    n = x.value.shape[-1]
    accumulated = (profile.linear.relative_error(n) + gamma(n, _U64)) * gauge
    unrounded = Bounded(value, carried + accumulated)
    return value, ErrorBound(
        {
            "error of earlier stages": carried,
            "accumulation of the projection": accumulated,
            f"rounding to {profile.dtype}": rounded(unrounded, profile.dtype).error - unrounded.error,
        }
    )


def _rms_norm(x: Bounded, weight: Array, eps: float, profile: Profile) -> Bounded:
    """RMSNorm, rounded after normalising and after the weight. The rms is 1-Lipschitz in x/√n."""
    n = x.value.shape[-1]
    value = rms_norm(x.value, weight, eps)
    rms = np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
    shift = np.minimum(np.sqrt(np.mean(x.error**2, axis=-1, keepdims=True)), rms * (1 - 1e-9))
    least = np.maximum(rms - shift, np.sqrt(eps))
    carried = np.abs(weight) * (x.error / least + np.abs(x.value) * shift / (rms * least))
    u, stored = format_of(profile.norm).unit_roundoff, format_of(profile.dtype)
    relative = gamma(n + 8, u) + gamma(n + 8, _U64) + stored.unit_roundoff
    error = carried + relative * (np.abs(value) + carried) + np.abs(weight) * stored.smallest_subnormal / 2
    return rounded(Bounded(value, error), profile.dtype)


def _foldable(x: Bounded, factor: float, dtype: str) -> Bounded:
    """A normalised latent before it is multiplied by ``factor``, which may be folded into the norm's weight instead.

    Folding rounds the product with the weight, and then the latent at its final size (vLLM, models/longcat_flash.py);
    roundoffs relative to x, unlike halves of an ulp, bound the latter at either size.
    """
    if factor == 1.0:
        return x
    u, least = FORMATS[dtype].unit_roundoff, FORMATS[dtype].smallest_subnormal / 2
    return Bounded(x.value, x.error + 2 * u * (np.abs(x.value) + x.error) + least * max(1.0, 1 / factor))


def _scaled(x: Bounded, factor: Array | float, relative: float, dtype: str) -> Bounded:
    """X times a factor that is computed to the error ``relative``; a factor of 1 rounds nothing."""
    value, error = factor * x.value, factor * x.error
    error = error + relative * (np.abs(value) + error)
    stored = rounded(Bounded(value, error), dtype)
    one = np.asarray(factor) == 1.0
    return Bounded(value, np.where(one, x.error, stored.error))


def _temperature(q: Bounded, positions: IntArray, scaling: Llama4Scaling | None, profile: Profile) -> Bounded:
    """Queries [..., s, h, ·] times the factor of their position, which is itself rounded to the dtype (transformers)."""
    if scaling is None:
        return q
    factor = scaling.factor(positions)[..., None, None]  # [..., s, 1, 1]
    u = format_of(profile.rope.angle).unit_roundoff
    # beta and each of ln, product and sum are rounded, all of them positive; the reference's own likewise.
    relative = 8 * (u + _U64) + format_of(profile.dtype).unit_roundoff
    return _scaled(q, factor, relative, profile.dtype)


def _rope(x: Bounded, positions: IntArray, config: MLAConfig, profile: Profile) -> Bounded:
    if config.rope is None:
        return x
    value, bound = rope_with_bound(x.value, positions, config.rope, profile.rope, output=profile.dtype, x_error=x.error)
    return Bounded(value, bound.total)


def layer_with_bound(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, profile: Profile
) -> tuple[Array, ErrorBound]:
    """``layer`` over a whole sequence, and the worst-case error of a layer with this profile.

    Row i holds for prefill and for decode with a cache alike, because the same intermediates are rounded once in both.

    Args:
        hidden: [..., s, e].
        positions: [..., s].

    Returns:
        (hidden states [..., s, e], its bound).
    """
    check_weights(weights, config)
    h, n, v = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
    x = Bounded(hidden, np.zeros_like(hidden))
    scalar = 2 * format_of(profile.norm).unit_roundoff + 3 * _U64  # a stated factor, and the product with it
    if config.q_lora_rank is None:
        q = _product("oe,...e->...o", weights["q_proj"], x, profile)
    else:
        c_q = _product("oe,...e->...o", weights["q_a_proj"], x, profile)
        c_q = _rms_norm(c_q, weights["q_a_layernorm"], config.latent_norm_eps, profile)
        c_q = _foldable(c_q, config.q_lora_scale, profile.dtype)
        q = _product("oe,...e->...o", weights["q_b_proj"], c_q, profile)
        q = _scaled(q, config.q_lora_scale, scalar, profile.dtype)
    q = q.reshape(*hidden.shape[:-1], h, config.qk_head_dim)
    q_nope, q_pe = q[..., :n], _rope(q[..., n:], positions, config, profile)
    q_nope, q_pe = (_temperature(part, positions, config.llama_4_scaling, profile) for part in (q_nope, q_pe))
    both = _product("oe,...e->...o", weights["kv_a_proj_with_mqa"], x, profile)
    latent = _rms_norm(both[..., : config.kv_lora_rank], weights["kv_a_layernorm"], config.latent_norm_eps, profile)
    latent = _scaled(
        _foldable(latent, config.kv_lora_scale, profile.dtype), config.kv_lora_scale, scalar, profile.dtype
    )
    k_pe = _rope(both[..., config.kv_lora_rank :], positions, config, profile)[..., None, :]  # [..., t, 1, r]
    w_uk, w_uv = absorb(weights["kv_b_proj"], config)
    if profile.form == "explicit":
        k_nope = _product("hnc,...tc->...thn", w_uk, latent, profile)
        value = _product("hvc,...tc->...thv", w_uv, latent, profile)
        shared = Bounded(*(np.repeat(a, h, axis=-2) for a in (k_pe.value, k_pe.error)))
        out = _attend(concatenated(q_nope, q_pe), concatenated(k_nope, shared), value, config, profile)
    else:
        q_latent = _product("hnc,...shn->...shc", w_uk, q_nope, profile)
        key = latent[..., None, :]  # [..., t, 1, c]
        out = _attend(concatenated(q_latent, q_pe), concatenated(key, k_pe), key, config, profile)
        out = _product("hvc,...shc->...shv", w_uv, out, profile)
    out = out.reshape(*hidden.shape[:-1], h * v)
    return _product_terms("oe,...e->...o", weights["o_proj"], out, profile)


def _attend(q: Bounded, k: Bounded, v: Bounded, config: MLAConfig, profile: Profile) -> Bounded:
    bounded = attention_with_bound(
        q.value,
        k.value,
        v.value,
        softmax_scale=config.scale,
        profile=replace(profile, cache_dequantised=None),  # a layer's own cache holds the dtype
        inherited=InheritedError(q.error, k.error, v.error),
    )
    return Bounded(bounded.out, bounded.out_error.total)
