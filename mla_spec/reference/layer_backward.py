"""The gradients of a whole MLA layer: reverse-mode differentiation of ``mla.layer``, written out.

With ∂x for the gradient of a scalar loss with respect to x, each step of equations 37-47 of DeepSeek-V2 (arXiv 2405.04434)
is taken backwards; o is any output dim.
"""

from __future__ import annotations

import numpy as np

from mla_spec.reference.attention import attention, sink_share
from mla_spec.reference.backward import attention_backward, sink_backward
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.mla import (
    Weights,
    check_weights,
    gate,
    gated,
    project_latent,
    project_query,
    query_latent,
)
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.typing import Array, IntArray


def layer_backward(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, out_grad: Array
) -> tuple[Array, dict[str, Array]]:
    """The gradients of Σ out_grad · out, where out is ``layer(hidden, positions, weights, config)`` without a cache.

    Both forms of attention have these gradients, as they compute the same function.

    Args:
        hidden: [..., s, e].
        positions: [..., s].
        out_grad: [..., s, e].

    Returns:
        (gradient of hidden [..., s, e], those of the weights by name, each of its weight's shape): sums over all tokens.

    Raises:
        ValueError: weights do not fit the configuration, or out_grad does not have the shape of hidden.
    """
    check_weights(weights, config)
    if out_grad.shape != hidden.shape:
        raise ValueError(f"out_grad must have the shape {hidden.shape} of hidden, got {out_grad.shape}")
    h, n = config.num_heads, config.qk_nope_head_dim
    q = np.concatenate(project_query(hidden, positions, weights, config), axis=-1)  # [..., s, h, n+r]
    latent, k_pe = project_latent(hidden, positions, weights, config)
    up = (latent @ weights["kv_b_proj"].T).reshape(*hidden.shape[:-1], h, -1)  # [..., t, h, n+v]
    shared = np.broadcast_to(k_pe[..., None, :], (*up.shape[:-1], k_pe.shape[-1]))  # [..., t, h, r]
    k, v = np.concatenate([up[..., :n], shared], axis=-1), up[..., n:]
    out, lse = attention(q, k, v, softmax_scale=config.scale)
    attended = out
    if config.attention_sink:
        attended = sink_share(np.swapaxes(lse, -1, -2), weights["sinks"])[..., None] * out  # [..., s, h, v]
    result = gated(attended, hidden, weights, config)

    grads = {"o_proj": linear_backward(out_grad, result.reshape(*hidden.shape[:-1], -1))}
    attended_grad, g_grad = gate_backward(
        attended, hidden, weights, config, (out_grad @ weights["o_proj"]).reshape(out.shape)
    )
    lse_grad = None
    if config.attention_sink:
        attended_grad, lse_grad, grads["sinks"] = sink_backward(out, lse, attended_grad, weights["sinks"])
    q_grad, k_grad, v_grad = attention_backward(q, k, v, attended_grad, softmax_scale=config.scale, lse_grad=lse_grad)
    up_grad = np.concatenate([k_grad[..., :n], v_grad], axis=-1).reshape(*hidden.shape[:-1], -1)  # [..., t, h·(n+v)]
    latent_grad = up_grad @ weights["kv_b_proj"]  # [..., t, c]
    k_pe_grad = k_grad[..., n:].sum(axis=-2)  # every head has the same k_pe
    grads["kv_b_proj"] = linear_backward(up_grad, latent)

    hidden_grad, q_grads = project_query_backward(hidden, positions, weights, config, q_grad, g_grad)
    by_latent, kv_grads = project_latent_backward(hidden, positions, weights, config, latent_grad, k_pe_grad)
    hidden_grad = hidden_grad + by_latent
    if "g_proj" in weights and g_grad is not None:
        grads["g_proj"] = linear_backward(g_grad, hidden)
        hidden_grad = hidden_grad + g_grad @ weights["g_proj"]
    grads |= q_grads | kv_grads
    return hidden_grad, {name: grads[name] for name in weights}


def gate_backward(
    out: Array, hidden: Array, weights: Weights, config: MLAConfig, grad: Array
) -> tuple[Array, Array | None]:
    """(∂out, ∂g) through ``gated``, given the gradient of its result [..., s, h, v]; g is what the sigmoid is taken of.

    With y = sigmoid(g), dy/dg = y (1 − y). A gate of each head has the gradients of all its elements: ∂g is [..., s, h], else
    [..., s, h·v], and None without a gate.
    """
    if config.output_gate is None:
        return grad, None
    y = gate(hidden, weights, config).reshape(*out.shape[:-1], -1)  # [..., s, h, 1 or v]
    y_grad = grad * out
    if config.output_gate == "head":
        y_grad = y_grad.sum(axis=-1, keepdims=True)
    return grad * y, (y_grad * y * (1 - y)).reshape(*hidden.shape[:-1], -1)


def project_query_backward(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, q_grad: Array, g_grad: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """(∂hidden, ∂weights) through ``project_query``, given ∂[q_nope; q_pe] [..., s, h, n+r].

    A gate "query" comes from the same weights as the queries: ``g_grad`` [..., s, h·v] then goes back with theirs.
    """
    n = config.qk_nope_head_dim
    if config.llama_4_scaling is not None:
        q_grad = config.llama_4_scaling.factor(positions)[..., None, None] * q_grad
    q_pe_grad = rope_backward(q_grad[..., n:], positions, config.rope)
    parts = [q_grad[..., :n], q_pe_grad]
    if config.output_gate == "query" and g_grad is not None:
        parts.append(g_grad.reshape(*q_grad.shape[:-1], -1))  # [..., s, h, v]
    grad = np.concatenate(parts, axis=-1).reshape(*hidden.shape[:-1], -1)  # [..., s, h·(n+r) or h·(n+r+v)]
    if config.q_lora_rank is None:
        return grad @ weights["q_proj"], {"q_proj": linear_backward(grad, hidden)}
    name = "q_gate_proj" if config.output_gate == "query" else "q_b_proj"
    down = hidden @ weights["q_a_proj"].T  # [..., s, q_lora_rank]
    c_q_grad, past_norm = np.split(
        grad @ weights[name], [config.q_lora_rank], axis=-1
    )  # the latter [..., s, 0] but for A.X-K2
    down_grad, norm_grad = rms_norm_backward(
        down, weights["q_a_layernorm"], config.latent_norm_eps, config.q_lora_scale * c_q_grad
    )
    if past_norm.size:
        down_grad = down_grad + past_norm
    return down_grad @ weights["q_a_proj"], {
        "q_a_proj": linear_backward(down_grad, hidden),
        "q_a_layernorm": norm_grad,
        name: linear_backward(grad, query_latent(hidden, weights, config)),
    }


def project_latent_backward(
    hidden: Array, positions: IntArray, weights: Weights, config: MLAConfig, latent_grad: Array, k_pe_grad: Array
) -> tuple[Array, dict[str, Array]]:
    """(∂hidden, ∂weights) through ``project_latent``, given ∂latent [..., s, c] and ∂k_pe [..., s, r]."""
    weight, c = weights["kv_a_proj_with_mqa"], config.kv_lora_rank
    down = hidden @ weight[:c].T  # [..., s, c]
    scaled_grad = config.kv_lora_scale * latent_grad
    down_grad, norm_grad = rms_norm_backward(down, weights["kv_a_layernorm"], config.latent_norm_eps, scaled_grad)
    grads = {"kv_a_layernorm": norm_grad}
    k_pe_grad = rope_backward(k_pe_grad, positions, config.rope)
    if config.k_pe_norm:
        name, down_pe = "k_rope_only_layernorm", hidden @ weight[c:].T  # [..., s, r]
        k_pe_grad, grads[name] = rms_norm_backward(down_pe, weights[name], config.latent_norm_eps, k_pe_grad)
    both_grad = np.concatenate([down_grad, k_pe_grad], axis=-1)  # [..., s, c+r]
    return both_grad @ weight, {"kv_a_proj_with_mqa": linear_backward(both_grad, hidden), **grads}


def linear_backward(grad: Array, x: Array) -> Array:
    """∂W [o, i] of y = W x: Σ over all tokens of ∂y xᵀ, for ∂y [..., o] and x [..., i]."""
    total: Array = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return total


def rms_norm_backward(x: Array, weight: Array, eps: float, grad: Array) -> tuple[Array, Array]:
    """(∂x [..., i], ∂weight [i]) of y = weight · x̂ with x̂ = x / rms, given ∂y.

    ∂x = (weight·∂y − x̂ · mean(x̂ · weight·∂y)) / rms: x̂ moves only across x, apart from what eps lets through.
    """
    rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)  # [..., 1]
    unit = x / rms
    unit_grad = weight * grad
    along = np.mean(unit * unit_grad, axis=-1, keepdims=True)  # [..., 1]
    return (unit_grad - unit * along) / rms, (grad * unit).reshape(-1, x.shape[-1]).sum(axis=0)


def rope_backward(grad: Array, positions: IntArray, rope: RopeConfig | None) -> Array:
    """∂x of ``apply_rope``: the rotation back, times the same factor; the gradient itself where nothing is rotated."""
    return grad if rope is None else apply_rope(grad, -np.asarray(positions), rope)
