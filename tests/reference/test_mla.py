"""The explicit and the absorbed form, and whole layers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention
from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.mla import (
    Attend,
    LatentCache,
    absorb,
    absorbed,
    check_weights,
    explicit,
    layer,
    multi_head_as_mla,
    project_latent,
    project_query,
    rms_norm,
    weight_shapes,
)
from mla_spec.reference.product import accurate_product
from mla_spec.reference.rope import rope_frequencies
from mla_spec.reference.typing import Array

SAME_IN_FLOAT64 = 1e-13
"""Largest difference of two float64 forms, relative to the gauge Σ_j p_j |v_j|.

The project's requirement, for logits of standard deviation 1. It leaves 900 roundings, where the forms sum over 512 latent
dims in different orders; a wrong index, scale or layout is of the size of the gauge itself. Where one key takes all the
weight, its value may be near 0 by cancellation and the gauge with it: there, Σ_j p_j |W_UV| |c_j| is the gauge.
"""

YARN = YarnScaling(factor=8, original_max_position_embeddings=32, mscale=0.5, mscale_all_dim=1.0, beta_fast=4)
LONGROPE = LongRopeScaling(
    short_factor=(1.0,) * 4, long_factor=(1.1, 1.5, 2.5, 4.0), original_max_position_embeddings=32
)
BASE = MLAConfig(
    hidden_size=20,
    num_heads=4,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    rope=RopeConfig(dim=8, theta=100.0),
    latent_norm_eps=1e-3,
)
CONFIGS = {
    "interleaved rope": BASE,
    "half rope": replace(BASE, rope=RopeConfig(dim=8, theta=100.0, interleaved=False)),
    "YaRN with a factor on cos and sin": replace(BASE, rope=RopeConfig(dim=8, theta=100.0, yarn=YARN)),
    "LongRoPE": replace(BASE, rope=RopeConfig(dim=8, theta=100.0, longrope=LONGROPE, max_position_embeddings=64)),
    "scaled latents": replace(BASE, mla_scale_q_lora=True, mla_scale_kv_lora=True),
    "scaled latent of the keys": replace(BASE, mla_scale_kv_lora=True),
    "temperature": replace(BASE, llama_4_scaling=Llama4Scaling(beta=0.3, original_max_position_embeddings=32)),
    "norm on k_pe": replace(BASE, k_pe_norm=True),
    "norm on k_pe, not rotated": replace(BASE, k_pe_norm=True, rope=None),
    "no query compression": replace(BASE, q_lora_rank=None),
    "NoPE": replace(BASE, rope=None),
    "no rope dims": replace(BASE, rope=None, qk_rope_head_dim=0, q_lora_rank=None),
    "one head": replace(BASE, num_heads=1),
}
FLOAT64 = {
    explicit: Profile.default("float64", tile=512),
    absorbed: Profile.default("float64", tile=512, form="absorbed"),
}


def random_weights(config: MLAConfig, seed: int = 0) -> dict[str, Array]:
    """Projections that keep the variance and norm weights around 1."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) / shape[1] ** 0.5
        for name, shape in weight_shapes(config).items()
    }


def hidden_states(config: MLAConfig, *lead: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((*lead, config.hidden_size)) * 2


def naive_layer(hidden: Array, positions: Array, weights: dict[str, Array], config: MLAConfig) -> Array:
    """Equations 37-47 token by token and head by head; pairs are rotated as complex numbers."""
    n, r, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt(sum(a * a for a in x) / len(x) + config.latent_norm_eps) * weight

    def rotated(x: Array, position: int) -> Array:
        rope = config.rope
        if rope is None:
            return x
        first, second = (x[0::2], x[1::2]) if rope.interleaved else (x[: r // 2], x[r // 2 :])
        turned = (first + 1j * second) * np.exp(1j * position * rope_frequencies(rope)) * rope.cos_sin_factor
        pairs = [turned.real, turned.imag]
        return np.stack(pairs, -1).ravel() if rope.interleaved else np.concatenate(pairs)

    queries, keys, values = [], [], []
    for x, position in zip(hidden, positions, strict=True):
        if config.q_lora_rank is None:
            q = weights["q_proj"] @ x
        else:
            q = weights["q_b_proj"] @ norm(weights["q_a_proj"] @ x, weights["q_a_layernorm"])
        if config.mla_scale_q_lora:
            q = q * np.sqrt(config.hidden_size / 10)
        if config.llama_4_scaling is not None:
            q = q * (1 + 0.3 * np.log(1 + position // 32))
        down = weights["kv_a_proj_with_mqa"] @ x
        latent = norm(down[:c], weights["kv_a_layernorm"])
        up = weights["kv_b_proj"] @ (latent * np.sqrt(config.hidden_size / 12) if config.mla_scale_kv_lora else latent)
        k_pe = norm(down[c:], weights["k_rope_only_layernorm"]) if config.k_pe_norm else down[c:]
        k_pe = rotated(k_pe, position)
        q_heads, kv_heads = q.reshape(-1, n + r), up.reshape(-1, n + v)
        queries.append([np.concatenate([q[:n], rotated(q[n:], position)]) for q in q_heads])
        keys.append([np.concatenate([kv[:n], k_pe]) for kv in kv_heads])
        values.append([kv[n:] for kv in kv_heads])
    rows = []
    for i in range(len(hidden)):
        heads = []
        for h in range(config.num_heads):
            scores = np.array([config.scale * (queries[i][h] @ keys[j][h]) for j in range(i + 1)])
            p = np.exp(scores - scores.max())
            heads.append(sum(p[j] * values[j][h] for j in range(i + 1)) / p.sum())
        rows.append(weights["o_proj"] @ np.concatenate(heads))
    return np.array(rows)


@pytest.mark.parametrize("attend", [explicit, absorbed])
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_the_papers_equations(name: str, attend: Attend) -> None:
    config = CONFIGS[name]
    weights, hidden, positions = random_weights(config), hidden_states(config, 6), np.arange(6) + 30
    out, cache = layer(hidden, positions, weights, config, attend=attend)
    _, bound = layer_with_bound(hidden, positions, weights, config, FLOAT64[attend])
    _, bound_explicit = layer_with_bound(hidden, positions, weights, config, FLOAT64[explicit])
    assert out.shape == (6, config.hidden_size)
    assert cache.latent.shape == (6, config.kv_lora_rank)
    assert cache.k_pe.shape == (6, config.qk_rope_head_dim)
    difference = np.abs(out - naive_layer(hidden, positions, weights, config))
    assert (difference <= bound.total + bound_explicit.total).all()


@pytest.mark.parametrize("attend", [explicit, absorbed])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 4], [1, 5, 1], [6, 1]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_equal_the_whole(name: str, chunks: list[int], attend: Attend) -> None:
    config = CONFIGS[name]
    weights, hidden, positions = random_weights(config), hidden_states(config, 7), np.arange(7) + 1000
    whole, whole_cache = layer(hidden, positions, weights, config, attend=attend)
    cache, parts, start = None, [], 0
    for length in chunks:
        part = slice(start, start + length)
        out, cache = layer(hidden[part], positions[part], weights, config, cache=cache, attend=attend)
        parts.append(out)
        start += length
    bound = 2 * layer_with_bound(hidden, positions, weights, config, FLOAT64[attend])[1].total
    assert (np.abs(np.concatenate(parts) - whole) <= bound).all()
    assert cache is not None
    assert cache.latent.shape == whole_cache.latent.shape
    # A row of the cache is a projection of one token: only the order of summation may differ.
    np.testing.assert_allclose(cache.latent, whole_cache.latent, atol=1e-13)
    np.testing.assert_allclose(cache.k_pe, whole_cache.k_pe, atol=1e-13)


@pytest.mark.parametrize("name", CONFIGS)
def test_forms_agree_in_a_layer(name: str) -> None:
    config = CONFIGS[name]
    weights, hidden, positions = random_weights(config), hidden_states(config, 9), np.arange(9)
    outs = [layer(hidden, positions, weights, config, attend=attend)[0] for attend in FLOAT64]
    bounds = [layer_with_bound(hidden, positions, weights, config, profile)[1].total for profile in FLOAT64.values()]
    assert (np.abs(outs[0] - outs[1]) <= sum(bounds)).all()


def core_operands(config: MLAConfig, s: int, t: int, seed: int = 2, logit_std: float = 1.0) -> list[Array]:
    """q_nope, q_pe, latent, k_pe, w_uk, w_uv as a trained layer has them: normalised latents, logits of this spread."""
    rng = np.random.default_rng(seed)
    h, c, n = config.num_heads, config.kv_lora_rank, config.qk_nope_head_dim
    r, v = config.qk_rope_head_dim, config.v_head_dim
    latent = rms_norm(rng.standard_normal((t, c)), np.ones(c), config.latent_norm_eps)
    q = rng.standard_normal((s, h, n + r)) * (logit_std / ((n + r) ** 0.5 * config.scale))
    w_uk, w_uv = absorb(rng.standard_normal((h * (n + v), c)) / c**0.5, config)
    return [q[..., :n], q[..., n:], latent, rng.standard_normal((t, r)), w_uk, w_uv]


def gauge_of(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, w_uk: Array, w_uv: Array, scale: float, inner: bool = False
) -> Array:
    """Σ_j p_j |v_j|, [s, h, v]; with ``inner``, |v_j| is Σ_c |W_UV| |c_j|."""
    k_nope = np.tensordot(latent, w_uk, axes=(1, 2))  # [t, h, n]
    value = (
        np.tensordot(np.abs(latent), np.abs(w_uv), axes=(1, 2)) if inner else np.tensordot(latent, w_uv, axes=(1, 2))
    )
    shared = np.repeat(k_pe[:, None], len(w_uk), axis=1)
    q, k = np.concatenate([q_nope, q_pe], -1), np.concatenate([k_nope, shared], -1)
    return attention(q, k, np.abs(value), softmax_scale=scale)[0]


@pytest.mark.parametrize(("logit_std", "inner"), [(1.0, False), (8.0, True)], ids=["flat", "peaked"])
def test_forms_agree_at_deepseek_v3s_dimensions(logit_std: float, inner: bool) -> None:
    config = MLAConfig.published("DeepSeek-V3")
    operands = core_operands(config, s=2, t=64, logit_std=logit_std)
    out_explicit, lse_explicit = explicit(*operands, softmax_scale=config.scale)
    out_absorbed, lse_absorbed = absorbed(*operands, softmax_scale=config.scale)
    assert out_explicit.shape == out_absorbed.shape == (2, 128, 128)
    gauge = gauge_of(*operands, config.scale, inner)
    assert (np.abs(out_explicit - out_absorbed) <= SAME_IN_FLOAT64 * gauge).all()
    # The scores are of order ten, with the same number of roundings.
    assert (np.abs(lse_explicit - lse_absorbed) <= SAME_IN_FLOAT64 * np.maximum(1, np.abs(lse_explicit))).all()


def test_forms_agree_in_a_layer_with_deepseek_v3s_heads() -> None:
    """All dimensions of a head and of the latent are real; the residual stream and the query's rank are not."""
    config = replace(MLAConfig.published("DeepSeek-V3"), hidden_size=96, q_lora_rank=48)
    weights, hidden, positions = random_weights(config), hidden_states(config, 3), np.array([4095, 4096, 163839])
    outs = [layer(hidden, positions, weights, config, attend=attend)[0] for attend in (explicit, absorbed)]
    q_nope, q_pe = project_query(hidden, positions, weights, config)
    latent, k_pe = project_latent(hidden, positions, weights, config)
    gauge = gauge_of(q_nope, q_pe, latent, k_pe, *absorb(weights["kv_b_proj"], config), config.scale)
    through_projection = gauge.reshape(3, -1) @ np.abs(weights["o_proj"]).T
    assert (np.abs(outs[0] - outs[1]) <= SAME_IN_FLOAT64 * through_projection).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend", [explicit, absorbed])
def test_forms_pass_lengths_and_mask_on(attend: Attend, causal: bool) -> None:
    operands = core_operands(BASE, s=2, t=9)
    seqlens = 5
    options: dict[str, Any] = {"softmax_scale": BASE.scale, "causal": causal}
    q_nope, q_pe, latent, k_pe, *factors = operands
    cut = attend(q_nope, q_pe, latent[:seqlens], k_pe[:seqlens], *factors, **options)
    latent, k_pe = latent.copy(), k_pe.copy()
    latent[seqlens:], k_pe[seqlens:] = np.nan, np.nan
    padded = attend(q_nope, q_pe, latent, k_pe, *factors, cache_seqlens=seqlens, **options)
    gauge = gauge_of(*operands, BASE.scale).max()
    assert (np.abs(padded[0] - cut[0]) <= SAME_IN_FLOAT64 * gauge).all()
    np.testing.assert_allclose(padded[1], cut[1], atol=SAME_IN_FLOAT64 * 10)


@pytest.mark.parametrize("attend", [explicit, absorbed])
def test_mask_can_be_left_out(attend: Attend) -> None:
    """Two equal queries see the same keys without it, and not with it."""
    q_nope, q_pe, *rest = core_operands(BASE, s=1, t=9)
    q_nope, q_pe = np.repeat(q_nope, 2, axis=0), np.repeat(q_pe, 2, axis=0)
    out, lse = attend(q_nope, q_pe, *rest, softmax_scale=BASE.scale, causal=False)
    gauge = gauge_of(q_nope, q_pe, *rest, BASE.scale)[1]
    assert (np.abs(out[0] - out[1]) <= SAME_IN_FLOAT64 * gauge).all()
    masked, masked_lse = attend(q_nope, q_pe, *rest, softmax_scale=BASE.scale)
    assert (np.abs(masked[1] - out[1]) <= SAME_IN_FLOAT64 * gauge).all()
    assert (masked[0] != out[0]).all()
    assert (masked_lse[:, 0] < lse[:, 0]).all()


@pytest.mark.parametrize("attend", [explicit, absorbed])
@pytest.mark.parametrize("g", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_multi_head_attention_is_mla_of_full_rank(g: int, attend: Attend) -> None:
    rng = np.random.default_rng(3)
    h, d, dv, s, t = 6, 5, 3, 4, 11
    q, k, v = (rng.standard_normal(x) * 3 for x in ((2, s, h, d), (2, t, g, d), (2, t, g, dv)))
    latent, w_uk, w_uv = multi_head_as_mla(k, v, h)
    assert latent.shape == (2, t, g * (d + dv))
    assert w_uk.shape == (h, d, g * (d + dv))
    assert w_uv.shape == (h, dv, g * (d + dv))
    none_q, none_k = np.zeros((2, s, h, 0)), np.zeros((2, t, 0))
    out, lse = attend(q, none_q, latent, none_k, w_uk, w_uv, softmax_scale=0.3)
    expected_out, expected_lse = attention(q, k, v, softmax_scale=0.3)
    # Identity projections copy without rounding, so that only the orders of summation differ.
    gauge = attention(q, k, np.abs(v), softmax_scale=0.3)[0]
    assert (np.abs(out - expected_out) <= SAME_IN_FLOAT64 * gauge).all()
    np.testing.assert_allclose(lse, expected_lse, atol=SAME_IN_FLOAT64 * 10)


def test_absorb_splits_rows_by_head_keys_first() -> None:
    n, v, c = BASE.qk_nope_head_dim, BASE.v_head_dim, BASE.kv_lora_rank
    kv_b_proj = np.arange(4.0 * (n + v) * c).reshape(-1, c)
    w_uk, w_uv = absorb(kv_b_proj, BASE)
    assert w_uk.shape == (4, n, c)
    assert w_uv.shape == (4, v, c)
    for h in range(4):
        first = h * (n + v)
        np.testing.assert_array_equal(w_uk[h], kv_b_proj[first : first + n])
        np.testing.assert_array_equal(w_uv[h], kv_b_proj[first + n : first + n + v])


@pytest.mark.parametrize("attend", [explicit, absorbed])
@pytest.mark.parametrize("name", CONFIGS)
def test_leading_axes_are_independent_sequences(name: str, attend: Attend) -> None:
    config = CONFIGS[name]
    weights, hidden = random_weights(config), hidden_states(config, 2, 3, 5)
    positions = np.random.default_rng(5).integers(0, 1000, (2, 3, 1)) + np.arange(5)
    out, cache = layer(hidden, positions, weights, config, attend=attend)
    assert cache.latent.shape == (2, 3, 5, config.kv_lora_rank)
    bound = layer_with_bound(hidden, positions, weights, config, FLOAT64[attend])[1].total
    for b in np.ndindex(2, 3):
        one, _ = layer(hidden[b], positions[b], weights, config, attend=attend)
        assert (np.abs(out[b] - one) <= 2 * bound[b]).all()


@pytest.mark.parametrize("attend", [explicit, absorbed])
def test_later_tokens_change_nothing(attend: Attend) -> None:
    weights, hidden, positions = random_weights(BASE), hidden_states(BASE, 6), np.arange(6)
    before, _ = layer(hidden, positions, weights, BASE, attend=attend)
    hidden[4:] = hidden_states(BASE, 2, seed=99) * 10
    after, _ = layer(hidden, positions, weights, BASE, attend=attend)
    # The same operations in the same places: no rounding differs.
    np.testing.assert_array_equal(after[:4], before[:4])
    assert (after[4:] != before[4:]).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_matter_where_and_only_where_there_is_rope(name: str) -> None:
    config = CONFIGS[name]
    weights, hidden = random_weights(config), hidden_states(config, 5)
    near, _ = layer(hidden, np.arange(5), weights, config)
    far, _ = layer(hidden, 3 * np.arange(5), weights, config)
    assert (near == far).all() == (config.rope is None)


def test_common_shift_of_positions_changes_nothing() -> None:
    config = CONFIGS["YaRN with a factor on cos and sin"]
    weights, hidden = random_weights(config), hidden_states(config, 5)
    totals, outs = [], []
    for shift in (0, 12345):
        positions = np.arange(5) + shift
        outs.append(layer(hidden, positions, weights, config)[0])
        # The reference's angles are exact at any position: take the bound at small ones.
        totals.append(layer_with_bound(hidden, np.arange(5), weights, config, FLOAT64[explicit])[1].total)
    assert (np.abs(outs[0] - outs[1]) <= sum(totals)).all()


def test_cache_rows_are_normalised_latents_and_rotated_keys() -> None:
    config = BASE
    weights, hidden = random_weights(config), hidden_states(config, 4)
    latent, k_pe = project_latent(hidden, np.arange(4), weights, config)
    _, cache = layer(hidden, np.arange(4), weights, config)
    np.testing.assert_array_equal(cache.latent, latent)
    np.testing.assert_array_equal(cache.k_pe, k_pe)
    down = accurate_product(hidden, weights["kv_a_proj_with_mqa"].T)
    np.testing.assert_array_equal(k_pe[0], down[0, 12:])  # position 0 rotates by nothing
    unit = latent / weights["kv_a_layernorm"]
    ms = np.mean(down[:, :12] ** 2, axis=-1)
    # 12 products and a few more roundings; leaving eps out moves this by 1e-3.
    np.testing.assert_allclose(np.mean(unit**2, axis=-1), ms / (ms + 1e-3), rtol=40 * 2.0**-53)


def test_cached_latent_carries_its_factor_and_the_rotated_key_does_not() -> None:
    scaled = CONFIGS["scaled latent of the keys"]
    weights, hidden = random_weights(BASE), hidden_states(BASE, 4)
    (plain_latent, plain_k_pe), (latent, k_pe) = (
        project_latent(hidden, np.arange(4), weights, config) for config in (BASE, scaled)
    )
    np.testing.assert_array_equal(latent, (20 / 12) ** 0.5 * plain_latent)
    np.testing.assert_array_equal(k_pe, plain_k_pe)


def test_temperature_begins_at_the_original_context() -> None:
    config = CONFIGS["temperature"]
    weights, hidden = random_weights(BASE), hidden_states(BASE, 4)
    positions = np.array([0, 31, 32, 95])
    plain, got = (project_query(hidden, positions, weights, c) for c in (BASE, config))
    factors = np.array([1, 1, 1 + 0.3 * np.log1p(1.0), 1 + 0.3 * np.log1p(2.0)])[:, None, None]
    for before, after in zip(plain, got, strict=True):
        np.testing.assert_array_equal(after, factors * before)


def test_append_puts_new_rows_last() -> None:
    old = LatentCache(np.zeros((2, 3, 4)), np.zeros((2, 3, 2)))
    new = old.append(np.ones((2, 1, 4)), np.ones((2, 1, 2)))
    assert new.latent[0, :, 0].tolist() == new.k_pe[0, :, 0].tolist() == [0, 0, 0, 1]
    assert old.latent.shape == (2, 3, 4)


def test_rms_norm_adds_eps_to_the_mean_of_squares() -> None:
    x = np.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # mean 25/4, eps 11/4: the root is 3. All of it is exact.
    np.testing.assert_array_equal(rms_norm(x, np.array([1.0, 3.0, 5.0, 7.0]), 2.75), [[1.0, 4.0, 0, 0], [0, 0, 0, 0]])


def test_weight_shapes_of_deepseek_v3() -> None:
    assert weight_shapes(MLAConfig.published("DeepSeek-V3")) == {
        "q_a_proj": (1536, 7168),
        "q_a_layernorm": (1536,),
        "q_b_proj": (24576, 1536),
        "kv_a_proj_with_mqa": (576, 7168),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (32768, 512),
        "o_proj": (7168, 16384),
    }
    assert weight_shapes(MLAConfig.published("DeepSeek-V2-Lite"))["q_proj"] == (3072, 2048)


@pytest.mark.parametrize("config", [BASE, CONFIGS["no query compression"]], ids=["q_lora", "q_proj"])
def test_weights_must_be_those_of_the_configuration(config: MLAConfig) -> None:
    weights = random_weights(config)
    check_weights(weights, config)
    for name in weights:
        fewer = {k: v for k, v in weights.items() if k != name}
        with pytest.raises(ValueError, match=f"^weights: missing '{name}'$"):
            check_weights(fewer, config)
        wrong = {**weights, name: weights[name][:-1]}
        shape, got = weights[name].shape, wrong[name].shape
        message = f"weights: {name} must have shape {shape}, got {got}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            layer(hidden_states(config, 2), np.arange(2), wrong, config)
    with pytest.raises(ValueError, match=r"^weights: unexpected 'kv_b_proj\.bias'$"):
        check_weights({**weights, "kv_b_proj.bias": np.zeros(1)}, config)


def test_weights_of_the_other_query_projection_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weights: unexpected 'q_a_layernorm'$"):
        check_weights(random_weights(BASE), CONFIGS["no query compression"])
    with pytest.raises(ValueError, match=r"^weights: missing 'q_a_layernorm'$"):
        check_weights(random_weights(CONFIGS["no query compression"]), BASE)
