"""The analytic gradients of a layer: against complex steps, PyTorch's autograd, and transformers' modules in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.adapters.transformers import DeepseekV2, DeepseekV3
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.layer_backward import layer_backward, rms_norm_backward, rope_backward
from mla_spec.reference.mla import layer, weight_shapes
from mla_spec.reference.rope import apply_rope, join_pairs, rope_cos_sin, split_pairs
from mla_spec.reference.typing import Array, IntArray
from tests.bounds.test_layer_bound import LAYERS

SMALL = {"hidden_size": 6, "num_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 3, "v_head_dim": 2}
CONFIGS = {
    name: replace(config, **SMALL, q_lora_rank=None if config.q_lora_rank is None else 3)
    for name, config in LAYERS.items()
}
CONFIGS |= {
    "gate of heads": replace(CONFIGS["interleaved"], output_gate="head"),
    "gate of elements": replace(CONFIGS["no query compression"], output_gate="element"),
    "gate of queries": replace(CONFIGS["interleaved"], output_gate="query"),
    "sink": replace(CONFIGS["interleaved"], attention_sink=True),
    "sink and gate": replace(CONFIGS["half"], attention_sink=True, output_gate="element"),
}
Complex = NDArray[np.complex128]


def layer_case(config: MLAConfig, seed: int = 0) -> tuple[Array, IntArray, dict[str, Array], Array]:
    """(hidden [2, 3, e], positions, weights, out_grad); positions reach the temperature of ``CONFIGS``."""
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape)
        for name, shape in weight_shapes(config).items()
    }
    hidden, out_grad = rng.standard_normal((2, 2, 3, config.hidden_size))
    return hidden, np.array([[0, 1, 2], [7, 8, 9]]), weights, out_grad


def complex_layer(hidden: Complex, positions: IntArray, weights: dict[str, Complex], config: MLAConfig) -> Complex:
    """``layer`` for complex operands: every step of it is analytic, but for the largest score, whose real part serves."""
    h, n, c = config.num_heads, config.qk_nope_head_dim, config.kv_lora_rank

    def norm(x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.latent_norm_eps)

    def rotate(x: Any) -> Any:
        if config.rope is None:
            return x
        cos, sin = (a[..., None, :] * config.rope.cos_sin_factor for a in rope_cos_sin(positions, config.rope))
        a, b = split_pairs(x, config.rope.interleaved)
        return join_pairs(a * cos - b * sin, a * sin + b * cos, config.rope.interleaved)

    g = hidden @ weights["g_proj"].T if "g_proj" in weights else np.zeros((*hidden.shape[:-1], 0))
    if config.q_lora_rank is None:
        q = hidden @ weights["q_proj"].T
    else:
        q_down = hidden @ weights["q_a_proj"].T
        c_q = norm(q_down, weights["q_a_layernorm"])
        if config.output_gate == "query":
            c_q = np.concatenate([c_q, q_down], axis=-1)
        q = config.q_lora_scale * c_q @ weights["q_gate_proj" if config.output_gate == "query" else "q_b_proj"].T
    q = q.reshape(*hidden.shape[:-1], h, -1)
    if config.output_gate == "query":
        q, g = q[..., : config.qk_head_dim], q[..., config.qk_head_dim :]
    q = np.concatenate([q[..., :n], rotate(q[..., n:])], axis=-1)
    if config.llama_4_scaling is not None:
        q = config.llama_4_scaling.factor(positions)[..., None, None] * q
    down = hidden @ weights["kv_a_proj_with_mqa"].T
    latent = config.kv_lora_scale * norm(down[..., :c], weights["kv_a_layernorm"])
    k_pe = norm(down[..., c:], weights["k_rope_only_layernorm"]) if config.k_pe_norm else down[..., c:]
    k_pe = np.repeat(rotate(k_pe[..., None, :]), h, axis=-2)
    up = (latent @ weights["kv_b_proj"].T).reshape(*latent.shape[:-1], h, -1)
    k, v = np.concatenate([up[..., :n], k_pe], axis=-1), up[..., n:]
    scores = config.scale * np.einsum("bshd,bthd->bhst", q, k)
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    if config.attention_sink:
        sink = np.broadcast_to(weights["sinks"][:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([sink, scores], axis=-1)
    p = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    out = np.einsum("bhst,bthv->bshv", p[..., 1:] if config.attention_sink else p, v)
    if config.output_gate is not None:
        out = out / (1 + np.exp(-g.reshape(*out.shape[:-1], -1)))
    result: Complex = out.reshape(*hidden.shape[:-1], -1) @ weights["o_proj"].T
    return result


def relative_error(got: Array, want: Array) -> float:
    """The largest deviation as a share of the largest number."""
    return float(np.abs(got - want).max(initial=0.0) / np.abs(want).max(initial=1e-300))


def test_complex_layer_is_the_layer() -> None:
    for config in CONFIGS.values():
        hidden, positions, weights, _ = layer_case(config)
        got = complex_layer(hidden + 0j, positions, {name: w + 0j for name, w in weights.items()}, config)
        assert relative_error(got.real, layer(hidden, positions, weights, config)[0]) < 1e-13


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_complex_steps(name: str) -> None:
    """Im f(x + i·h) / h is the derivative to rounding, for h = 1e-30: nothing is subtracted (Squire and Trapp 1998)."""
    config, step = CONFIGS[name], 1e-30
    hidden, positions, weights, out_grad = layer_case(config)
    operands = {"hidden": hidden, **weights}
    hidden_grad, grads = layer_backward(hidden, positions, weights, config, out_grad)
    assert list(grads) == list(weights)
    for parameter, got in {"hidden": hidden_grad, **grads}.items():
        want = np.empty_like(operands[parameter])
        for index in np.ndindex(want.shape):
            moved = {k: x + 0j for k, x in operands.items()}
            moved[parameter][index] += 1j * step
            out = complex_layer(moved.pop("hidden"), positions, moved, config)
            want[index] = (out_grad * out.imag).sum() / step
        assert relative_error(got, want) < 1e-13, parameter


@pytest.mark.parametrize("subject", [TorchExplicit(), TorchAbsorbed()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_autograds(name: str, subject: TorchExplicit) -> None:
    config = CONFIGS[name]
    hidden, positions, weights, out_grad = layer_case(config, seed=1)
    tensors = {k: torch.from_numpy(x).requires_grad_() for k, x in {"hidden": hidden, **weights}.items()}
    made = subject.layer({k: x for k, x in tensors.items() if k != "hidden"}, config)
    made.prefill(tensors["hidden"], torch.from_numpy(positions)).backward(torch.from_numpy(out_grad))
    hidden_grad, grads = layer_backward(hidden, positions, weights, config, out_grad)
    for parameter, want in {"hidden": hidden_grad, **grads}.items():
        grad = tensors[parameter].grad
        assert grad is not None
        assert relative_error(grad.numpy(), want) < 1e-13, parameter


@pytest.mark.parametrize("subject", [DeepseekV2(), DeepseekV3()], ids=lambda s: s.name)
@pytest.mark.parametrize("q_lora_rank", [None, 3])
def test_gradients_are_those_of_transformers(subject: DeepseekV3, q_lora_rank: int | None) -> None:
    """In float64, but for their norms, which they compute in float32, and V2's rotation likewise."""
    pytest.importorskip("transformers")
    config = replace(CONFIGS["interleaved"], q_lora_rank=q_lora_rank, qk_nope_head_dim=4)
    hidden, positions, weights, out_grad = layer_case(config, seed=2)
    tensors = {k: torch.from_numpy(x).requires_grad_() for k, x in {"hidden": hidden, **weights}.items()}
    made = subject.layer({k: x for k, x in tensors.items() if k != "hidden"}, config)
    made.prefill(tensors["hidden"], torch.from_numpy(positions)).backward(torch.from_numpy(out_grad))
    hidden_grad, grads = layer_backward(hidden, positions, weights, config, out_grad)
    for parameter, want in {"hidden": hidden_grad, **grads}.items():
        grad = tensors[parameter].grad
        assert grad is not None
        assert relative_error(grad.numpy(), want) < 1e-5, parameter


def test_gradients_of_a_batch_are_sums_over_its_sequences() -> None:
    config = CONFIGS["interleaved"]
    hidden, positions, weights, out_grad = layer_case(config)
    whole, grads = layer_backward(hidden, positions, weights, config, out_grad)
    alone = [layer_backward(hidden[i], positions[i], weights, config, out_grad[i]) for i in range(len(hidden))]
    assert relative_error(np.stack([x for x, _ in alone]), whole) < 1e-14
    for name, grad in grads.items():
        assert relative_error(sum((g[name] for _, g in alone), np.zeros(())), grad) < 1e-14, name


def test_one_token_gives_the_way_to_its_scores_no_gradient() -> None:
    config = CONFIGS["interleaved"]
    hidden, positions, weights, out_grad = layer_case(config)
    _, grads = layer_backward(hidden[:, :1], positions[:, :1], weights, config, out_grad[:, :1])
    scores_only = ("q_a_proj", "q_a_layernorm", "q_b_proj")
    assert all(np.abs(grads[name]).max() < 1e-14 for name in scores_only)
    assert np.abs(grads["kv_a_proj_with_mqa"][config.kv_lora_rank :]).max() < 1e-14
    assert np.abs(grads["kv_a_proj_with_mqa"][: config.kv_lora_rank]).max() > 0.1


def test_rms_norm_passes_no_gradient_along_x() -> None:
    rng = np.random.default_rng(0)
    x, weight, grad = rng.standard_normal((3, 4, 6))
    x_grad, weight_grad = rms_norm_backward(x, weight[0], 1e-300, grad)
    np.testing.assert_allclose((x_grad * x).sum(axis=-1), 0, atol=1e-14)
    assert (weight_grad.shape, x_grad.shape) == ((6,), (4, 6))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_backward_is_the_adjoint(interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    rope, positions = RopeConfig(dim=6, theta=100.0, interleaved=interleaved), np.array([0, 3, 900])
    x, grad = rng.standard_normal((2, 3, 2, 6))
    through = (apply_rope(x, positions, rope) * grad).sum(axis=-1)
    np.testing.assert_allclose((x * rope_backward(grad, positions, rope)).sum(axis=-1), through, rtol=1e-13)
    assert rope_backward(grad, positions, None) is grad


def test_out_grad_of_another_shape_is_refused() -> None:
    hidden, positions, weights, out_grad = layer_case(CONFIGS["NoPE"])
    with pytest.raises(ValueError, match=r"out_grad must have the shape \(2, 3, 6\) of hidden, got \(2, 2, 6\)"):
        layer_backward(hidden, positions, weights, CONFIGS["NoPE"], out_grad[:, :2])
    with pytest.raises(ValueError, match="missing 'o_proj'"):
        layer_backward(
            hidden, positions, {k: w for k, w in weights.items() if k != "o_proj"}, CONFIGS["NoPE"], out_grad
        )
