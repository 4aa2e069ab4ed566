"""The worst-case error of the gradients of a whole MLA layer, by running error analysis of its backward pass.

The steps are those of ``layer_backward``, from the intermediates that ``layer_bound`` says a layer has computed. The two
forms of attention round different gradients: the explicit one those of every head's keys and values, the absorbed one those
of queries and results in the latent space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention_backward import BackwardAttention
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.layer import BoundedLayer, bounded_layer
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import (
    Bounded,
    concatenated,
    perhaps_stored,
    product,
)
from mla_spec.bounds.running_gradients import (
    Gradient,
    added,
    gate_gradients,
    rms_norm_gradients,
    summed_over_heads,
    summed_over_tokens,
    weight_gradient,
    weight_gradient_by_head,
)
from mla_spec.bounds.running_steps import (
    foldable,
    rotated,
    scaled_by_config,
    temperature,
)
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import Weights, absorb
from mla_spec.reference.typing import Array, IntArray


def layer_backward_with_bound(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, out_grad: Array, profile: Profile
) -> tuple[Gradient, dict[str, Gradient]]:
    """``layer_backward`` and the worst-case error of a layer with this profile.

    A gradient is an array with its ``ErrorBound``. Arguments, shapes and errors are those of ``layer_backward``.

    Args:
        hidden: [..., s, e].
        positions: [..., s].
        out_grad: [..., s, e], exact.

    Returns:
        (gradient of hidden [..., s, e], those of the weights by name).
    """
    layer = bounded_layer(hidden, positions, weights, config, profile)
    backward = _Backward(hidden, positions, weights, config, profile, layer)
    grads = {"o_proj": weight_gradient(_exact(out_grad), layer.out, profile)}
    attended_grad, g_grad = backward.gate(product("oi,...o->...i", weights["o_proj"], _exact(out_grad), profile))
    attended_grad = attended_grad.reshape(*hidden.shape[:-1], config.num_heads, config.v_head_dim)
    heads = backward.explicit(attended_grad) if profile.form == "explicit" else backward.absorbed(attended_grad)
    grads["kv_b_proj"] = _stacked(heads.w_uk_grad, heads.w_uv_grad, weights["kv_b_proj"].shape)
    if heads.of_sink is not None:
        grads["sinks"] = summed_over_tokens(heads.of_sink, profile)
    by_query, q_grads = backward.query(heads.q_grad, g_grad)
    by_latent, kv_grads = backward.keys(heads.latent_grad, heads.k_pe_grad)
    parts, grads = [by_query, by_latent], {**q_grads, **kv_grads, **grads}
    if "g_proj" in weights and g_grad is not None:
        by_gate, gate_grads = backward.of_hidden("g_proj", g_grad)
        parts, grads = [*parts, by_gate], {**grads, **gate_grads}
    total = added(*parts, profile=profile)
    return (total.value, ErrorBound({"error of earlier stages": total.error})), {name: grads[name] for name in weights}


@dataclass(frozen=True)
class _Heads:
    """What leaves attention and the projections of its form."""

    q_grad: Bounded  # [..., s, h, n+r]
    latent_grad: Bounded  # [..., t, c]
    k_pe_grad: Bounded  # [..., t, r]
    w_uk_grad: Gradient  # [h, n, c]
    w_uv_grad: Gradient  # [h, v, c]
    of_sink: Bounded | None  # what each query adds to the sink's, [..., s, h]


@dataclass(frozen=True)
class _Backward:
    """The steps of a backward pass over one layer."""

    hidden: Array
    positions: IntArray
    weights: Weights
    config: MLAConfig
    profile: Profile
    layer: BoundedLayer

    def gate(self, grad: Bounded) -> tuple[Bounded, Bounded | None]:
        """(∂ of what is gated [..., s, h·v], ∂g [..., s, h or h·v]), given ∂ of what o_proj takes; ∂g is None without a gate."""
        if self.config.output_gate is None:
            return grad, None
        return gate_gradients(self.layer.expanded, self.layer.g, grad, self.profile)

    def explicit(self, attended_grad: Bounded) -> _Heads:
        """Through k = [W_UK c; k_R] and v = W_UV c, given the gradient of attention [..., s, h, v]."""
        profile, n, h = self.profile, self.config.qk_nope_head_dim, self.config.num_heads
        w_uk, w_uv = absorb(self.weights["kv_b_proj"], self.config)
        q_grad, k_grad, v_grad, of_sink = self.attention(attended_grad)
        k_nope_grad, latent = k_grad[..., :n], self.layer.latent[..., None, :]
        terms = h * (n + self.config.v_head_dim)  # one projection back sums those of all heads, in any order
        by_key = summed_over_heads(product("hnc,...thn->...thc", w_uk, k_nope_grad, profile, terms), profile)
        by_value = summed_over_heads(product("hvc,...thv->...thc", w_uv, v_grad, profile, terms), profile)
        return _Heads(
            q_grad=q_grad,
            latent_grad=added(by_key, by_value, profile=profile),
            k_pe_grad=summed_over_heads(k_grad[..., n:], profile),
            w_uk_grad=weight_gradient_by_head(k_nope_grad, latent, profile),
            w_uv_grad=weight_gradient_by_head(v_grad, latent, profile),
            of_sink=of_sink,
        )

    def absorbed(self, attended_grad: Bounded) -> _Heads:
        """Through q̃ = [W_UKᵀ q_C; q_R] and W_UV, given the gradient of W_UV's result [..., s, h, v]."""
        profile, c, layer = self.profile, self.config.kv_lora_rank, self.layer
        w_uk, w_uv = absorb(self.weights["kv_b_proj"], self.config)
        latent_out_grad = product("hvc,...shv->...shc", w_uv, attended_grad, profile)
        q_grad, k_grad, v_grad, of_sink = self.attention(latent_out_grad)
        q_latent_grad = q_grad[..., :c]
        q_nope_grad = product("hnc,...shc->...shn", w_uk, q_latent_grad, profile)
        return _Heads(
            q_grad=concatenated(q_nope_grad, q_grad[..., c:]),
            latent_grad=added(k_grad[..., 0, :c], v_grad[..., 0, :], profile=profile),
            k_pe_grad=k_grad[..., 0, c:],
            w_uk_grad=weight_gradient_by_head(layer.q_nope, q_latent_grad, profile),
            w_uv_grad=weight_gradient_by_head(attended_grad, layer.attended, profile),
            of_sink=of_sink,
        )

    def attention(self, out_grad: Bounded) -> tuple[Bounded, Bounded, Bounded, Bounded | None]:
        """(∂q, ∂k, ∂v, what each query adds to ∂sinks [..., s, h] or None), given the gradient of the result."""
        q, k, v, sunk = self.layer.q, self.layer.k, self.layer.v, self.config.attention_sink
        attention = BackwardAttention.of(
            q.value,
            k.value,
            v.value,
            softmax_scale=self.config.scale,
            profile=self.profile,
            cache_seqlens=None,
            causal=True,
            inherited=InheritedError(q.error, k.error, v.error),
            attn_sink=self.weights["sinks"] if sunk else None,
            sink_joins=sunk,
        )
        gradients = attention.gradients(out_grad.value, out_grad.error, None)
        q_grad, k_grad, v_grad = (perhaps_stored(x, self.profile.dtype) for x in gradients)
        if not sunk:
            return q_grad, k_grad, v_grad, None
        of_sink = attention.sink_gradient(out_grad.value, out_grad.error)
        return q_grad, k_grad, v_grad, perhaps_stored(of_sink, self.profile.dtype)

    def query(self, q_grad: Bounded, g_grad: Bounded | None = None) -> tuple[Bounded, dict[str, Gradient]]:
        """(∂hidden, ∂weights) through the queries and a gate that comes with them, given ∂[q_nope; q_pe] [..., s, h, n+r]."""
        config, profile, weights, n = self.config, self.profile, self.weights, self.config.qk_nope_head_dim
        parts = (
            temperature(x, self.positions, config.llama_4_scaling, profile) for x in (q_grad[..., :n], q_grad[..., n:])
        )
        q_nope_grad, q_pe_grad = parts
        grad = concatenated(q_nope_grad, rotated(q_pe_grad, -self.positions, config.rope, profile))
        if config.output_gate == "query" and g_grad is not None:
            grad = concatenated(grad, g_grad.reshape(*self.hidden.shape[:-1], config.num_heads, -1))
        grad = grad.reshape(*self.hidden.shape[:-1], -1)
        if config.q_lora_rank is None:
            return self.of_hidden("q_proj", grad)
        name = "q_gate_proj" if config.output_gate == "query" else "q_b_proj"
        grad = scaled_by_config(grad, config.q_lora_scale, profile)
        c_q_grad = product("oi,...o->...i", weights[name], grad, profile)
        past_norm, c_q_grad = c_q_grad[..., config.q_lora_rank :], c_q_grad[..., : config.q_lora_rank]
        c_q_grad = foldable(c_q_grad, config.q_lora_scale, profile.dtype)
        down_grad, norm_grad = rms_norm_gradients(
            self.layer.q_down, weights["q_a_layernorm"], config.latent_norm_eps, c_q_grad, profile
        )
        if config.output_gate == "query":
            down_grad = added(down_grad, past_norm, profile=profile)
        up_grad = weight_gradient(grad, self.layer.c_q, profile)
        hidden_grad, grads = self.of_hidden("q_a_proj", down_grad)
        return hidden_grad, {**grads, "q_a_layernorm": norm_grad, name: up_grad}

    def keys(self, latent_grad: Bounded, k_pe_grad: Bounded) -> tuple[Bounded, dict[str, Gradient]]:
        """(∂hidden, ∂weights) through what is cached, given ∂latent [..., t, c] and ∂k_pe [..., t, r]."""
        config, profile, c = self.config, self.profile, self.config.kv_lora_rank
        latent_grad = scaled_by_config(latent_grad, config.kv_lora_scale, profile)
        latent_grad = foldable(latent_grad, config.kv_lora_scale, profile.dtype)
        down_grad, norm_grad = rms_norm_gradients(
            self.layer.kv_down[..., :c], self.weights["kv_a_layernorm"], config.latent_norm_eps, latent_grad, profile
        )
        norms = {"kv_a_layernorm": norm_grad}
        k_pe_grad = rotated(k_pe_grad, -self.positions, config.rope, profile)
        if config.k_pe_norm:
            name, down_pe = "k_rope_only_layernorm", self.layer.kv_down[..., c:]
            k_pe_grad, norms[name] = rms_norm_gradients(
                down_pe, self.weights[name], config.latent_norm_eps, k_pe_grad, profile
            )
        hidden_grad, grads = self.of_hidden("kv_a_proj_with_mqa", concatenated(down_grad, k_pe_grad))
        return hidden_grad, {**grads, **norms}

    def of_hidden(self, name: str, grad: Bounded) -> tuple[Bounded, dict[str, Gradient]]:
        """(∂hidden, ∂weight) of the projection ``name`` of the hidden states."""
        grads = {name: weight_gradient(grad, _exact(self.hidden), self.profile)}
        return product("oi,...o->...i", self.weights[name], grad, self.profile, self._fused), grads

    @property
    def _fused(self) -> int | None:
        """Terms of the sum where q_a_proj, kv_a_proj_with_mqa and a gate are one projection, whose products are added on the way
        back; None where queries are not compressed.
        """
        names = ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")
        return (
            sum(len(self.weights[name]) for name in names if name in self.weights)
            if "q_a_proj" in self.weights
            else None
        )


def _exact(x: Array) -> Bounded:
    return Bounded(x, np.zeros_like(x))


def _stacked(w_uk_grad: Gradient, w_uv_grad: Gradient, shape: tuple[int, ...]) -> Gradient:
    """The gradient of kv_b_proj, whose rows are those of W_UK and W_UV of each head."""

    def stack(a: Array, b: Array) -> Array:
        return np.concatenate([a, b], axis=1).reshape(shape)

    (a, a_bound), (b, b_bound) = w_uk_grad, w_uv_grad
    return stack(a, b), ErrorBound({name: stack(a_bound.terms[name], b_bound.terms[name]) for name in a_bound.terms})
