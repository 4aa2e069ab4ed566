"""The worst-case bound of a whole layer: no honest layer exceeds it, and wrong ones do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.running import Bounded
from mla_spec.bounds.running_steps import foldable, scaled, temperature
from mla_spec.proof.emulated import EmulatedAttention, multiply_add
from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.rope import rope_cos_sin
from mla_spec.reference.typing import Array
from tests.bounds.emulated_cases import excess
from tests.bounds.emulated_rope import float32_rope

LAYER = MLAConfig(
    hidden_size=24,
    num_heads=3,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=6,
    rope=RopeConfig(dim=8, theta=1000.0),
)
LAYER_YARN = YarnScaling(factor=40, original_max_position_embeddings=64, beta_fast=4)
LAYERS = {
    "interleaved": LAYER,
    "half": replace(LAYER, rope=RopeConfig(dim=8, theta=1000.0, interleaved=False)),
    "YaRN": replace(LAYER, rope=RopeConfig(dim=8, theta=1000.0, yarn=LAYER_YARN)),
    "LongRoPE": replace(
        LAYER,
        rope=RopeConfig(
            dim=8,
            theta=1000.0,
            longrope=LongRopeScaling(
                short_factor=(1.0,) * 4, long_factor=(1.1, 2.3, 5.9, 17.0), original_max_position_embeddings=64
            ),
            max_position_embeddings=4096,
        ),
    ),
    "scaled latents": replace(LAYER, mla_scale_q_lora=True, mla_scale_kv_lora=True),
    "latents scaled by less than 1": replace(LAYER, hidden_size=7, mla_scale_q_lora=True, mla_scale_kv_lora=True),
    # Within the six positions of a case it begins, and changes.
    "temperature": replace(LAYER, llama_4_scaling=Llama4Scaling(beta=0.3, original_max_position_embeddings=2)),
    "norm on k_pe": replace(LAYER, k_pe_norm=True),
    "no query compression": replace(LAYER, q_lora_rank=None),
    "NoPE": replace(LAYER, rope=None),
}


def layer_case(config: MLAConfig, dtype: str, seed: int, latent_size: float = 1.0) -> tuple[Array, Array, Any]:
    """(hidden [s, e], positions [s], weights), exact in ``dtype``; latents before their norm are of ``latent_size``."""
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) / shape[1] ** 0.5
        for name, shape in weight_shapes(config).items()
    }
    weights["kv_a_proj_with_mqa"][: config.kv_lora_rank] *= latent_size
    weights = {name: round_to(w, dtype) for name, w in weights.items()}
    positions = int(rng.choice([0, 100, 4000])) + np.arange(6)
    return round_to(rng.standard_normal((6, config.hidden_size)), dtype), positions, weights


def emulated_layer(
    hidden: Array, positions: Array, weights: Any, config: MLAConfig, profile: Profile, *, folded: bool = False
) -> Array:
    """A layer with float32 arithmetic whose every intermediate is rounded to the profile's dtype.

    ``folded`` multiplies the factors of the latents into the weights of their norms, rounded, as vLLM does.
    """
    dtype, f32 = profile.dtype, np.float32
    h, n, v, c = config.num_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank

    def rounded(x: Array) -> Array:
        return round_to(x.astype(float), dtype)

    def linear(x: Array, weight: Array) -> Array:
        if profile.linear.operands is not None:
            return rounded(multiply_add(np.zeros((len(x), len(weight))), x, weight.T, profile.linear))
        return rounded(x.astype(f32) @ weight.astype(f32).T)

    def norm(x: Array, weight: Array) -> Array:
        x = x.astype(f32)
        ms = (x * x).sum(-1, keepdims=True, dtype=f32) / f32(x.shape[-1])
        return rounded(rounded(x / np.sqrt(ms + f32(config.latent_norm_eps))) * weight)

    def scaled(x: Array, factor: Any) -> Array:
        return rounded(x.astype(f32) * np.asarray(factor, dtype=f32))

    def rotated(x: Array) -> Array:
        return x if config.rope is None else float32_rope(x, positions, config.rope, dtype)

    def cooled(x: Array) -> Array:
        scaling = config.llama_4_scaling
        if scaling is None:
            return x
        periods = (positions // scaling.original_max_position_embeddings).astype(f32)
        return scaled(x, rounded(f32(1) + f32(scaling.beta) * np.log(f32(1) + periods))[:, None, None])

    q_factor, kv_factor = config.q_lora_scale, config.kv_lora_scale
    if folded:
        factors = {"q_a_layernorm": q_factor, "kv_a_layernorm": kv_factor}
        weights = {name: scaled(w, factors[name]) if name in factors else w for name, w in weights.items()}
        q_factor = kv_factor = 1.0

    if config.q_lora_rank is None:
        q = linear(hidden, weights["q_proj"])
    else:
        q = linear(norm(linear(hidden, weights["q_a_proj"]), weights["q_a_layernorm"]), weights["q_b_proj"])
    q = scaled(q, q_factor).reshape(len(hidden), h, -1)
    q_nope, q_pe = cooled(q[..., :n]), cooled(rotated(q[..., n:]))
    down = linear(hidden, weights["kv_a_proj_with_mqa"])
    latent, k_pe = scaled(norm(down[:, :c], weights["kv_a_layernorm"]), kv_factor), down[:, c:]
    k_pe = rotated((norm(k_pe, weights["k_rope_only_layernorm"]) if config.k_pe_norm else k_pe)[:, None])
    up = weights["kv_b_proj"].reshape(h, n + v, c)
    kernel = EmulatedAttention(profile)
    if profile.form == "explicit":
        expanded = linear(latent, weights["kv_b_proj"]).reshape(len(hidden), h, n + v)
        k = np.concatenate([expanded[..., :n], np.repeat(k_pe, h, axis=1)], axis=-1)
        out, _ = kernel.attend(np.concatenate([q_nope, q_pe], -1), k, expanded[..., n:], softmax_scale=config.scale)
    else:
        q_latent = np.stack([linear(q_nope[:, i], up[i, :n].T) for i in range(h)], axis=1)
        k = np.concatenate([latent[:, None], k_pe], axis=-1)
        out, _ = kernel.attend(np.concatenate([q_latent, q_pe], -1), k, latent[:, None], softmax_scale=config.scale)
        out = np.stack([linear(out[:, i], up[i, n:]) for i in range(h)], axis=1)
    return linear(out.reshape(len(hidden), -1), weights["o_proj"])


def layer_excess(emulated: MLAConfig, declared: MLAConfig, profile: Profile, case: tuple[Array, Array, Any]) -> float:
    """The largest error of a layer of configuration ``emulated`` as a multiple of the bound of ``declared``."""
    want, bound = layer_with_bound(*case, declared, profile)
    return excess(emulated_layer(*case, emulated, profile), want, bound)


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize(("operands", "parts"), [("tfloat32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_layers_of_rounded_operands_stay_within_the_bound_and_must_declare_them(
    operands: str, parts: int, form: Any
) -> None:
    products = Accumulator(operands=operands, operand_parts=parts)
    rough = Profile.default("float32", form=form, linear=products, score=products, value=products)
    for seed in range(3):
        case = layer_case(LAYER, "float32", seed)
        assert layer_excess(LAYER, LAYER, rough, case) <= 1
        want, bound = layer_with_bound(*case, LAYER, Profile.default("float32", form=form))
        assert parts > 1 or excess(emulated_layer(*case, LAYER, rough), want, bound) > 1


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_honest_layers_stay_within_the_bound(name: str, dtype: str, form: Any) -> None:
    config = LAYERS[name]
    variants = [{}, {"row_sum": "rounded", "tile": 2}, {"score_format": "bfloat16", "score_roundings": 2}]
    for seed, changes in itertools.product(range(3), variants):
        profile = Profile.default(dtype, form=form, **changes)
        worst = layer_excess(config, config, profile, layer_case(config, dtype, seed))
        assert worst <= 1, (seed, changes, worst)


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["scaled latents", "latents scaled by less than 1"])
def test_factors_folded_into_the_norms_stay_within_the_bound(name: str, dtype: str, form: Any) -> None:
    config, profile = LAYERS[name], Profile.default(dtype, form=form)
    for seed, latent_size in itertools.product(range(3), (1.0, 1e-3)):
        case = layer_case(config, dtype, seed, latent_size)
        want, bound = layer_with_bound(*case, config, profile)
        assert excess(emulated_layer(*case, config, profile, folded=True), want, bound) <= 1


EPS = replace(LAYER, latent_norm_eps=1e-3)
YARN_LAYER = LAYERS["YaRN"]
LAYER_FAULTS = {
    # name: (what is computed, what should be, size of the latents before their norm)
    "no eps": (replace(EPS, latent_norm_eps=1e-30), EPS, 0.03),
    "no eps of 1e-6": (replace(LAYER, latent_norm_eps=1e-30), LAYER, 1e-3),
    "no mscale²": (replace(YARN_LAYER, softmax_scale=YARN_LAYER.qk_head_dim**-0.5), YARN_LAYER, 1.0),
    "no YaRN in the angles": (replace(LAYER, softmax_scale=YARN_LAYER.scale), YARN_LAYER, 1.0),
    "other rope layout": (LAYERS["half"], LAYER, 1.0),
    "short factors of LongRoPE": (LAYER, LAYERS["LongRoPE"], 1.0),
    "latent of the query not scaled": (replace(LAYER, mla_scale_kv_lora=True), LAYERS["scaled latents"], 1.0),
    "latent of the keys not scaled": (replace(LAYER, mla_scale_q_lora=True), LAYERS["scaled latents"], 1.0),
    "no temperature": (LAYER, LAYERS["temperature"], 1.0),
}
SHOWS = [
    *itertools.product(LAYER_FAULTS, ["float32"], ["explicit", "absorbed"]),
    *itertools.product(["no eps", "no eps of 1e-6"], ["float16", "bfloat16"], ["explicit", "absorbed"]),
    *itertools.product(["no mscale²", "other rope layout"], ["float16"], ["explicit"]),
]


@pytest.mark.parametrize(("name", "dtype", "form"), SHOWS)
def test_wrong_layers_exceed_the_bound(name: str, dtype: str, form: Any) -> None:
    wrong, config, latent_size = LAYER_FAULTS[name]
    profile = Profile.default(dtype, form=form)
    for seed in range(3):
        case = layer_case(config, dtype, seed, latent_size)
        assert layer_excess(wrong, config, profile, case) > 1, seed


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
def test_layer_that_rounds_more_than_declared_exceeds_the_bound(form: Any) -> None:
    for seed in range(3):
        case = layer_case(LAYER, "bfloat16", seed)
        want, bound = layer_with_bound(*case, LAYER, Profile.default("float32", form=form))
        got = emulated_layer(*case, LAYER, Profile.default("bfloat16", form=form))
        assert excess(got, want, bound) > 1


class Rounding:
    """Errors of every intermediate, as variables of torch: 0 at first, then of half an ulp each, one sign each."""

    def __init__(self, u: float) -> None:
        self.u, self.errors, self.next = u, [], 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.next == len(self.errors):
            self.errors.append(torch.zeros_like(x, requires_grad=True))
        error = self.errors[self.next]
        self.next += 1
        _, exponent = torch.frexp(x.detach())
        return x + self.u * torch.where(x == 0, 0.0, 2.0 ** (exponent - 1).to(x.dtype)) * error


def differentiable_layer(
    hidden: Array, positions: Array, weights: Any, config: MLAConfig, form: str, rounded: Rounding
) -> torch.Tensor:
    """A layer in exact (float64) arithmetic but for ``rounded``, applied wherever a layer of 16 bits rounds."""
    w = {name: torch.from_numpy(x) for name, x in weights.items()}
    h, n, v, c = config.num_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    rope = config.rope
    assert rope is not None
    rounded.next = 0
    temperature = torch.ones(1, dtype=torch.float64)
    if config.llama_4_scaling is not None:
        temperature = rounded(torch.from_numpy(config.llama_4_scaling.factor(positions)))[:, None, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rounded(rounded(x / (x.square().mean(-1, keepdim=True) + config.latent_norm_eps).sqrt()) * weight)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        cos, sin = (torch.from_numpy(a * rope.cos_sin_factor)[:, None] for a in rope_cos_sin(positions, rope))
        a, b = x[..., 0::2], x[..., 1::2]
        return rounded(torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2))

    x = torch.from_numpy(hidden)
    q = rounded(norm(rounded(x @ w["q_a_proj"].T), w["q_a_layernorm"]) @ w["q_b_proj"].T)
    if config.q_lora_scale != 1.0:
        q = rounded(q * config.q_lora_scale)
    q = q.view(len(x), h, -1)
    down = rounded(x @ w["kv_a_proj_with_mqa"].T)
    latent, k_pe = norm(down[:, :c], w["kv_a_layernorm"]), rotated(down[:, None, c:])[:, 0]
    if config.kv_lora_scale != 1.0:
        latent = rounded(latent * config.kv_lora_scale)
    up = w["kv_b_proj"].view(h, n + v, c)
    q_nope, q_pe = q[..., :n], rotated(q[..., n:])
    if config.llama_4_scaling is not None:
        q_nope, q_pe = rounded(q_nope * temperature), rounded(q_pe * temperature)
    if form == "explicit":
        k_nope = rounded(torch.einsum("hnc,tc->htn", up[:, :n], latent))
        value = rounded(torch.einsum("hvc,tc->htv", up[:, n:], latent))
        scores = torch.einsum("shn,htn->hst", q_nope, k_nope)
    else:
        scores = torch.einsum("shc,tc->hst", rounded(torch.einsum("shn,hnc->shc", q_nope, up[:, :n])), latent)
        value = latent.expand(h, -1, -1)
    scores = (scores + torch.einsum("shr,tr->hst", q_pe, k_pe)) * config.scale
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    out = rounded((rounded(weight) @ value / weight.sum(-1, keepdim=True)).transpose(0, 1))  # [s, h, v or c]
    if form == "absorbed":
        out = rounded(torch.einsum("hvc,shc->shv", up[:, n:], out))
    return rounded(out.flatten(1) @ w["o_proj"].T)


def adverse_ratios(config: MLAConfig, form: Any, seed: int, indices: list[tuple[int, int]]) -> list[float]:
    """The error of elements of a float16 layer, all roundings conspiring against each, as multiples of the bound."""
    profile = Profile.default("float16", form=form)
    case = layer_case(config, "float16", seed)
    want, bound = layer_with_bound(*case, config, profile)
    ratios = []
    for index in indices:
        rounded = Rounding(2.0**-11)
        differentiable_layer(*case, config, form, rounded)[index].backward()
        for direction in (1, -1):
            for error in rounded.errors:
                assert error.grad is not None
                error.data = direction * error.grad.sign()
            moved = differentiable_layer(*case, config, form, rounded)[index].item()
            ratios.append(abs(moved - want[index]) / bound.total[index])
    return ratios


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("name", ["interleaved", "YaRN", "LongRoPE", "scaled latents", "temperature"])
def test_all_errors_of_a_layer_at_their_largest_stay_within_the_bound(name: str, form: Any) -> None:
    for seed in range(3):
        assert max(adverse_ratios(LAYERS[name], form, seed, [(0, 3), (2, 7), (5, 20)])) <= 1


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("softmax_scale", [0.5, 4.0, 16.0])
def test_bound_of_a_narrow_layer_is_attained_within_a_factor_of_three(
    softmax_scale: float, width: int, form: Any
) -> None:
    """With one or two dims, magnitudes are summed where signs hardly cancel, so a missing error would show.

    The factor is for row 0, which has one key; the moments of v - o in the others are looser.
    """
    narrow = replace(
        LAYER,
        hidden_size=width,
        num_heads=1,
        q_lora_rank=2,
        kv_lora_rank=2,
        qk_nope_head_dim=width,
        qk_rope_head_dim=2,
        v_head_dim=1,
        rope=RopeConfig(dim=2, theta=1000.0),
        softmax_scale=softmax_scale,
    )
    ratios = np.array([adverse_ratios(narrow, form, seed, [(0, 0), (1, 0), (5, 0)]) for seed in range(10)])
    assert (ratios <= 1).all()
    assert (3 * ratios[:, :2] >= 1).all()


def test_layer_bound_refuses_other_weights() -> None:
    hidden, positions, weights = layer_case(LAYER, "float32", 0)
    wrong = {name: w for name, w in weights.items() if not name.startswith("q_")}
    with pytest.raises(ValueError, match=r"^weights: missing 'q_proj'$"):
        layer_with_bound(hidden, positions, wrong, LAYERS["no query compression"], Profile.default("float32"))


def numbers(seed: int, dtype: str) -> Array:
    """Numbers [500, 1, 1] of many sizes, exact in ``dtype``."""
    rng = np.random.default_rng(seed)
    return round_to(rng.standard_normal((500, 1, 1)) * 2.0 ** rng.integers(-6, 6, (500, 1, 1)), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_error_of_a_scaled_number_is_its_rounding(dtype: str) -> None:
    x, factor = numbers(0, dtype), 12**0.5
    bounded = scaled(Bounded(x, np.zeros_like(x)), factor, 0.0, dtype)
    ratio = np.abs(round_to(x * factor, dtype) - x * factor) / bounded.error
    assert 0.95 < ratio.max() <= 1
    carried = scaled(Bounded(x, np.abs(x)), factor, 0.0, dtype)
    assert (carried.error >= bounded.error + factor * np.abs(x)).all()
    assert (scaled(Bounded(x, x * x), 1.0, 0.0, dtype).error == x * x).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [12**0.5, 0.3])
def test_factor_in_a_norms_weight_costs_no_more_than_a_foldable_latent_has(factor: float, dtype: str) -> None:
    """The weight is rounded with its factor, and the latent at its final size; no rounding is that of the plain latent."""
    unit, weight = numbers(1, dtype), round_to(np.random.default_rng(2).uniform(0.5, 1.5, (500, 1, 1)), dtype)
    folded = round_to(unit * round_to(weight * factor, dtype), dtype)
    plain = Bounded(unit * weight, np.zeros_like(unit))
    ratio = np.abs(folded / factor - plain.value) / foldable(plain, factor, dtype).error
    assert 0.5 < ratio.max() <= 1
    assert foldable(plain, 1.0, dtype) is plain


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_error_of_a_temperature_has_both_its_roundings(dtype: str) -> None:
    x, positions = numbers(3, dtype), np.arange(500)
    scaling = Llama4Scaling(beta=0.3, original_max_position_embeddings=4)
    bounded = temperature(Bounded(x, np.zeros_like(x)), positions, scaling, Profile.default(dtype))
    factor = scaling.factor(positions)[:, None, None]
    got = round_to(x * round_to(factor, dtype), dtype)
    np.testing.assert_array_equal(bounded.value, x * factor)
    assert (bounded.error[:4] == 0).all()
    ratio = np.abs(got - bounded.value)[4:] / bounded.error[4:]
    assert 0.6 < ratio.max() <= 1


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
def test_the_last_tokens_alone_have_the_bound_that_they_have_among_all(form: Any) -> None:
    config = replace(LAYER, llama_4_scaling=Llama4Scaling(beta=0.1, original_max_position_embeddings=2))
    hidden, positions, weights = layer_case(config, "float32", 0)
    profile = Profile.default("float32", form=form)
    whole, bound = layer_with_bound(hidden, positions, weights, config, profile)
    last, last_bound = layer_with_bound(hidden, positions, weights, config, profile, last=2)
    np.testing.assert_array_equal(last, whole[..., -2:, :])
    np.testing.assert_allclose(last_bound.total, bound.total[..., -2:, :], rtol=1e-12)
