"""Bounds of the indexer's operands: written out, honest arithmetic stays inside, and wrong operands leave them."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.project_indexer import layer_norm_with_bound, project_indexer_with_bound
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.running import Bounded
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.indexer import IndexerConfig, indexer_weight_shapes, layer_norm, project_indexer
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import (
    U64,
    UNIT_ROUNDOFF,
    assert_terms,
    gamma,
    half_ulp,
)
from tests.bounds.emulated_rope import float32_rope

F32 = np.float32
LOW = ("float32", "bfloat16", "float16")
VARIANCES = ("two passes", "one pass", "running")


def float32_layer_norm(
    x: Array, weight: Array, bias: Array, eps: float, dtype: str, variance: str, between: str = "float32"
) -> Array:
    """LayerNorm in float32, its variance computed in one of three ways, rounded to ``between`` before weight and bias."""
    y, n = x.astype(F32), F32(x.shape[-1])
    mean = np.add.accumulate(y, axis=-1, dtype=F32)[..., -1:] / n
    if variance == "two passes":
        spread = np.add.accumulate((y - mean) ** 2, axis=-1, dtype=F32)[..., -1:] / n
    elif variance == "one pass":
        spread = np.add.accumulate(y * y, axis=-1, dtype=F32)[..., -1:] / n - mean * mean
    else:  # Welford's recurrence
        mean, total = y[..., :1], np.zeros_like(y[..., :1])
        for i in range(1, x.shape[-1]):
            delta = y[..., i : i + 1] - mean
            mean = mean + delta / F32(i + 1)
            total = total + delta * (y[..., i : i + 1] - mean)
        spread = total / n
    normalised = round_to(((y - mean) / np.sqrt(spread + F32(eps))).astype(float), between).astype(F32)
    return round_to((normalised * weight.astype(F32) + bias.astype(F32)).astype(float), dtype)


def norm_case(seed: int, dtype: str) -> tuple[Bounded, Array, Array, Array]:
    """(x and its error, a computed x within that error, weight, bias); some means are far larger than the deviation."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([2, 8, 33, 128]))
    x = rng.standard_normal((6, n)) + rng.choice([0.0, 3.0, 30.0])
    x = x * rng.choice([1.0, 1e-3])
    computed = round_to(x, dtype)
    weight, bias = (round_to(rng.standard_normal(n), dtype) for _ in range(2))
    return Bounded(x, np.abs(computed - x)), computed, weight, bias


@pytest.mark.parametrize("once", [True, False], ids=["rounded once", "rounded before the weight too"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dtype", LOW)
def test_honest_layer_norms_stay_within_the_bound(dtype: str, variance: str, once: bool) -> None:
    between = "float32" if once else dtype
    profile, worst = Profile.default(dtype), 0.0
    for seed in range(200):
        x, computed, weight, bias = norm_case(seed, dtype)
        bounded = layer_norm_with_bound(x, weight, bias, 1e-6, profile)
        with np.errstate(invalid="ignore"):  # a variance below 0, where the bound is infinite
            got = float32_layer_norm(computed, weight, bias, 1e-6, dtype, variance, between)
        finite = np.isfinite(bounded.error)
        assert (np.abs(got - bounded.value)[finite] <= bounded.error[finite]).all()
        worst = max(worst, float((np.abs(got - bounded.value) / bounded.error)[finite].max(initial=0.0)))
    assert worst > (0.3 if dtype != "float32" else 0.02)  # and it says something


def test_the_carried_error_of_a_layer_norm_is_needed() -> None:
    profile = Profile.default("float64")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 16))
    error = 1e-3 * rng.random(x.shape)
    ones, zeros = np.ones(16), np.zeros(16)
    bounded = layer_norm_with_bound(Bounded(x, error), ones, zeros, 1e-6, profile)
    without = layer_norm_with_bound(Bounded(x, 0 * x), ones, zeros, 1e-6, profile)
    worst = 0.0
    for _ in range(20):
        moved = layer_norm(x + error * rng.choice([-1, 1], x.shape), ones, zeros, 1e-6)
        assert (np.abs(moved - bounded.value) <= bounded.error).all()
        assert (np.abs(moved - bounded.value) > without.error).any()
        worst = max(worst, float((np.abs(moved - bounded.value) / bounded.error).max()))
    assert worst > 0.5


def test_a_variance_that_may_vanish_makes_the_bound_infinite() -> None:
    x = np.full((1, 8), 1000.0)
    with np.errstate(divide="raise"):
        bounded = layer_norm_with_bound(Bounded(x, 0 * x), np.ones(8), np.zeros(8), 1e-6, Profile.default("float32"))
    assert np.isinf(bounded.error).all()
    wide = layer_norm_with_bound(Bounded(x, 0 * x), np.ones(8), np.zeros(8), 1e-6, Profile.default("float64"))
    assert (wide.error < 1e-3).all()


def case(seed: int, dtype: str) -> ProjectIndexerCase:
    rng = np.random.default_rng(seed)
    d = int(rng.choice([8, 16, 128]))
    return ProjectIndexerCase(
        dtype=dtype,
        seed=seed,
        seqlens=(3, 2),
        hidden_size=int(rng.integers(2, 20)),
        q_lora_rank=int(rng.integers(1, 20)),
        index_n_heads=3,
        index_head_dim=d,
        rope_dim=d // 2,
        layout=str(rng.choice(["half", "interleaved"])),
        yarn=str(rng.choice(["none", "short", "ratio"])),
        start=int(rng.choice([0, 4095])),
        hidden_scale=float(rng.choice([1.0, 2.0**-10])),
    )


def honest(made: ProjectIndexerCase) -> tuple[Array, Array, Array]:
    """q, k and weights with every product in float32 and every intermediate rounded to the dtype."""
    inputs, config, dtype = made.build(), made.config, made.dtype
    weights = {name: w.astype(F32) for name, w in inputs.weights.items()}
    assert config.rope is not None

    def rotated(x: Array) -> Array:
        heads = x.reshape(len(x), -1, config.index_head_dim)
        part = float32_rope(heads[..., : config.rope_dim].astype(F32), inputs.positions, config.rope, dtype)
        return np.concatenate([part, heads[..., config.rope_dim :]], axis=-1).reshape(x.shape)

    q = round_to((inputs.q_latent.astype(F32) @ weights["wq_b"].T).astype(float), dtype)
    q = q.reshape(-1, config.index_n_heads, config.index_head_dim)
    k = round_to((inputs.hidden.astype(F32) @ weights["wk"].T).astype(float), dtype)
    norm = (weights["k_norm.weight"].astype(float), weights["k_norm.bias"].astype(float))
    k = float32_layer_norm(k, *norm, config.k_norm_eps, dtype, VARIANCES[made.seed % 3])
    w = inputs.hidden.astype(F32) @ weights["weights_proj"].T
    w = w * F32(config.index_n_heads**-0.5) * F32(config.index_head_dim**-0.5)
    return rotated(q), rotated(k), w.astype(float)


@pytest.mark.parametrize("dtype", LOW)
def test_honest_operands_stay_within_the_bound(dtype: str) -> None:
    worst = dict.fromkeys(("q", "k", "weights"), 0.0)
    for seed in range(60):
        made = case(seed, dtype)
        bounded = project_indexer_with_bound(**vars(made.build()), profile=Profile.default(dtype))
        for name, got in zip(worst, honest(made), strict=True):
            ratio = np.abs(got - getattr(bounded, name)) / getattr(bounded, f"{name}_error").total
            worst[name] = max(worst[name], float(ratio.max()))
    assert all(ratio <= 1 for ratio in worst.values()), worst
    assert worst["q"] > (0.5 if dtype != "float32" else 0.05)
    assert worst["k"] > (0.2 if dtype != "float32" else 0.01)
    assert worst["weights"] > 0.02


@pytest.mark.parametrize("dtype", LOW)
def test_the_bound_is_a_few_roundoffs(dtype: str) -> None:
    u = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for seed in range(20):
        made = replace(case(seed, dtype), start=0, index_head_dim=16, rope_dim=8)
        bounded = project_indexer_with_bound(**vars(made.build()), profile=Profile.default(dtype))
        for name in ("q", "k"):
            rms = np.sqrt(np.mean(getattr(bounded, name) ** 2))
            assert np.median(getattr(bounded, f"{name}_error").total) < (200 if dtype == "float32" else 12) * u * rms


def test_operands_rotated_at_the_wrong_end_leave_the_bound() -> None:
    made = replace(case(3, "bfloat16"), start=100)
    inputs, config = made.build(), made.config
    assert config.rope is not None
    bounded = project_indexer_with_bound(**vars(inputs), profile=Profile.default("bfloat16"))
    plain = project_indexer(**{**vars(inputs), "config": replace(config, rope=None)})
    r = config.rope_dim
    for name, x in zip(("q", "k"), plain[:2], strict=True):
        wrong = np.concatenate([x[..., :-r], apply_rope(x[..., -r:], inputs.positions, config.rope)], axis=-1)
        assert (np.abs(wrong - getattr(bounded, name)) > getattr(bounded, f"{name}_error").total).mean() > 0.5


def test_the_reference_is_within_its_own_float64_error() -> None:
    """The weights of the heads, which are rational but for their factor, and a LayerNorm of an exact deviation."""
    made = replace(case(4, "float64"), index_n_heads=2, index_head_dim=8, rope_dim=4)
    inputs = made.build()
    bounded = project_indexer_with_bound(**vars(inputs), profile=Profile.default("float64"))
    for i, x in enumerate(inputs.hidden):
        for h, row in enumerate(inputs.weights["weights_proj"]):
            exact = sum(Fraction(a) * Fraction(b) for a, b in zip(x, row, strict=True)) / 4  # (2 · 8)^-1/2
            assert abs(Fraction(bounded.weights[i, h]) - exact) <= Fraction(bounded.weights_error.total[i, h])
    x = np.array([[3.0, -3.0, 3.0, -3.0]]) + 7
    got = layer_norm_with_bound(Bounded(x, 0 * x), np.full(4, 0.1), np.full(4, 0.2), 7.0, Profile.default("float64"))
    exact_values = [Fraction(0.2) + Fraction(0.1) * sign * Fraction(3, 4) for sign in (1, -1, 1, -1)]
    for value, error, exact in zip(got.value[0], got.error[0], exact_values, strict=True):
        assert abs(Fraction(value) - exact) <= Fraction(error)


FLOAT16, BFLOAT16 = Profile.default("float16"), Profile.default("bfloat16")
PROFILES = {
    "float64": Profile.default("float64"),
    "float32": Profile.default("float32"),
    "bfloat16": replace(BFLOAT16, softmax="float16", linear=Accumulator(order="blocked", block=2)),
    "float16": replace(FLOAT16, linear=Accumulator(format="float16")),
    "norm in float16": replace(FLOAT16, norm="float16"),
}
B, S, E, RANK, HEADS, DIM = 2, 3, 7, 5, 4, 6


def both(n: int, u: float) -> float:
    """Of the computed number and of the reference's."""
    return gamma(n, u) + gamma(n, U64)


def projected(weight: Array, x: Array, profile: Profile) -> float:
    """The error of one number of a projection of exact operands [n], rounded to the dtype."""
    gauge = sum(abs(float(w * a)) for w, a in zip(weight, x, strict=True))
    error = (profile.linear.relative_error(len(x)) + gamma(len(x), U64)) * gauge
    return error + half_ulp(abs(float(weight @ x)) + error, profile.dtype)


def normalised(x: Array, x_error: Array, weight: Array, bias: Array, eps: float, profile: Profile) -> list[float]:
    """The error of the LayerNorm of one row [n], as docs/bounds.md has it."""
    n, u = len(x), UNIT_ROUNDOFF[profile.norm]
    mean = sum(x) / n
    deviation = math.sqrt(sum((a - mean) ** 2 for a in x) / n + eps)
    shift = math.sqrt(sum(e**2 for e in x_error) / n)  # of the deviation, which is 1-Lipschitz in x/√n
    least = max(deviation - shift, math.sqrt(eps))
    size = [abs(a) + e for a, e in zip(x, x_error, strict=True)]
    computed_mean = both(n + 1, u) * sum(size) / n
    variance = both(4 * n + 8, u) * sum(a**2 for a in size) / n / least**2
    growth = math.expm1(-math.log1p(-variance) / 2)
    relative = growth + (1 + growth) * (both(8, u) + UNIT_ROUNDOFF[profile.dtype])
    errors = []
    for a, e, w, b in zip(x, x_error, weight, bias, strict=True):
        exact = abs(a - mean) / deviation
        centred = e + sum(x_error) / n + computed_mean
        carried = centred / least + exact * shift / least
        stored = carried + relative * (exact + carried) + FORMATS[profile.dtype].smallest_subnormal / 2
        error = abs(w) * stored
        error += both(2, u) * (abs(w) * exact + abs(b) + error)
        value = w * (a - mean) / deviation + b
        errors.append(error + half_ulp(abs(value) + error, profile.dtype))
    return errors


@pytest.mark.parametrize("inherited", [True, False], ids=["with an error", "exact"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_of_a_layer_norm_is_the_one_written_out(name: str, inherited: bool) -> None:
    rng = np.random.default_rng(13)
    x, weight, bias = rng.standard_normal((B, S, DIM)), rng.standard_normal(DIM), rng.standard_normal(DIM)
    x[1, 1] = 0.01 * x[1, 1]  # smaller than its error, so that eps is what is left of the deviation
    error = rng.uniform(0, 0.03, x.shape) * inherited
    got = layer_norm_with_bound(Bounded(x, error), weight, bias, 0.1, PROFILES[name])
    np.testing.assert_array_equal(got.value, layer_norm(x, weight, bias, 0.1))
    for row in np.ndindex(B, S):
        want = normalised(x[row], error[row], weight, bias, 0.1, PROFILES[name])
        # fewer than 32 roundings an element, but for the difference in the smallest deviation, which is sqrt(eps) at least
        deviation = np.sqrt(x[row].var() + 0.1)
        least = max(deviation - np.sqrt((error[row] ** 2).mean()), np.sqrt(0.1))
        np.testing.assert_allclose(got.error[row], want, rtol=gamma(32 * DIM, U64) * 2 * deviation / least, atol=0)


@pytest.mark.parametrize("rope", [RopeConfig(dim=4, interleaved=False), None], ids=["rotated", "not rotated"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_of_operands_is_the_one_written_out(name: str, rope: RopeConfig | None) -> None:
    profile, rng = PROFILES[name], np.random.default_rng(14)
    config = IndexerConfig(
        hidden_size=E,
        q_lora_rank=RANK,
        index_n_heads=HEADS,
        index_head_dim=DIM,
        index_topk=1,
        rope=rope,
        k_norm_eps=0.1,
    )
    weights = {name: rng.standard_normal(shape) for name, shape in indexer_weight_shapes(config).items()}
    hidden, latent = rng.standard_normal((B, S, E)), rng.standard_normal((B, S, RANK))
    positions = rng.integers(0, 100, (B, S))
    got = project_indexer_with_bound(hidden, latent, positions, weights, config, profile)
    for have, want in zip(
        (got.q, got.k, got.weights), project_indexer(hidden, latent, positions, weights, config), strict=True
    ):
        np.testing.assert_array_equal(have, want)

    wq_b = weights["wq_b"].reshape(HEADS, DIM, RANK)
    q_error, k_error = np.zeros((B, S, HEADS, DIM)), np.zeros((B, S, DIM))
    k = hidden @ weights["wk"].T
    for i in np.ndindex(B, S):
        for h, d in np.ndindex(HEADS, DIM):
            q_error[(*i, h, d)] = projected(wq_b[h, d], latent[i], profile)
        before = np.array([projected(row, hidden[i], profile) for row in weights["wk"]])
        k_error[i] = normalised(k[i], before, weights["k_norm.weight"], weights["k_norm.bias"], 0.1, profile)
        for h in range(HEADS):
            products = [abs(w * x) for w, x in zip(weights["weights_proj"][h], hidden[i], strict=True)]
            rate = profile.linear.relative_error(E) + gamma(E, U64)
            accumulated = rate * sum(products) / math.sqrt(HEADS * DIM)
            scaled = both(8, UNIT_ROUNDOFF[profile.softmax]) * (abs(got.weights[(*i, h)]) + accumulated)
            terms = {"accumulation of the projection": accumulated, f"scaling in {profile.softmax}": scaled}
            assert_terms(got.weights_error, (*i, h), terms)

    q = np.einsum("hdc,bsc->bshd", wq_b, latent)
    k = layer_norm(k, weights["k_norm.weight"], weights["k_norm.bias"], 0.1)
    for exact, error, bound in ((q, q_error, got.q_error), (k, k_error, got.k_error)):
        if rope is None:
            assert_terms(bound, ..., {"projection and norm": error})
            continue
        _, rotated = rope_with_bound(
            exact[..., :4], positions, rope, profile.rope, output=profile.dtype, x_error=error[..., :4]
        )
        assert_terms(bound[..., :4], ..., rotated.terms | {"projection and norm": np.zeros_like(error[..., :4])})
        nothing = {name: np.zeros_like(error[..., 4:]) for name in rotated.terms}
        assert_terms(bound[..., 4:], ..., nothing | {"projection and norm": error[..., 4:]})
