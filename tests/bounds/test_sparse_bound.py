"""Bounds of sparse attention: written out, honest arithmetic stays inside, and they are not wide."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.sparse import indexer_with_bound, max_logits_with_bound, selection_shortfall, sparse_attention
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.sparse import indexer_logits, select_top_k
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import (
    U64,
    UNIT_ROUNDOFF,
    assert_terms,
    gamma,
    half_ulp,
)

F32 = np.float32
DTYPES = ("float64", "float32", "bfloat16", "float16")


def operands(seed: int, dtype: str, s: int = 3, h: int = 4, t: int = 17, d: int = 24) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k = (round_to(rng.standard_normal(shape), dtype) for shape in ((s, h, d), (t, d)))
    return q, k, round_to(rng.standard_normal((s, h)), "float32")


def computed_logits(q: Array, k: Array, weights: Array, stored: str) -> Array:
    """The logits in float32, the scores of heads rounded to ``stored``."""
    scores = np.einsum("shd,td->sht", q.astype(F32), k.astype(F32))
    scores = round_to(scores.astype(float), stored).astype(F32)
    logits = np.zeros((len(q), len(k)), dtype=F32)
    for head in range(q.shape[1]):
        logits += weights[:, head, None].astype(F32) * np.maximum(scores[:, head], 0)
    return logits.astype(float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_honest_logits_stay_within_the_bound(dtype: str, stored: str) -> None:
    profile = Profile.default(dtype, score_format=stored)
    worst = 0.0
    for seed in range(40):
        q, k, weights = operands(seed, dtype)
        want, bound = indexer_with_bound(q, k, weights, profile)
        np.testing.assert_array_equal(want, indexer_logits(q, k, weights))
        worst = max(worst, float((np.abs(computed_logits(q, k, weights, stored) - want) / bound.total).max()))
    assert worst <= 1
    assert worst > (0.2 if stored == "bfloat16" else 0.01)  # and it says something


def test_inherited_errors_of_operands_are_covered_and_needed() -> None:
    profile = Profile.default("float64")
    q, k, weights = operands(1, "float64")
    rng = np.random.default_rng(2)
    q_error, k_error = (1e-3 * rng.random(x.shape) for x in (q, k))
    moved = indexer_logits(
        q + q_error * rng.choice([-1, 1], q.shape), k + k_error * rng.choice([-1, 1], k.shape), weights
    )
    error = np.abs(moved - indexer_logits(q, k, weights))
    _, bound = indexer_with_bound(q, k, weights, profile, q_error=q_error, k_error=k_error)
    _, without = indexer_with_bound(q, k, weights, profile)
    assert (error <= bound.total).all()
    assert (error > without.total).any()


def test_the_reference_is_within_its_own_float64_error() -> None:
    q, k, weights = operands(3, "float64", s=1, h=3, t=4, d=5)
    logits, bound = indexer_with_bound(q, k, weights, Profile.default("float64"))
    own = bound.terms["the reference's own float64"]
    for t in range(4):
        products = [sum(Fraction(a) * Fraction(b) for a, b in zip(q[0, h], k[t], strict=True)) for h in range(3)]
        exact = sum(Fraction(w) * max(Fraction(0), p) for w, p in zip(weights[0], products, strict=True))
        assert abs(Fraction(logits[0, t]) - exact) <= Fraction(own[0, t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_stays_within_its_bound(dtype: str) -> None:
    wide = np.float64 if dtype == "float64" else F32
    profile = Profile.default(dtype)
    indices = np.array([[4, -1, 0, 17, 4, 2**31 - 1], [-1, -1, -1, -1, 17, -1], [1, 2, 3, 5, 6, 7]])
    length = np.array([5, 6, 4])
    for seed in range(40):
        q, kv, _ = operands(seed, dtype)
        want, bound = max_logits_with_bound(q, kv, indices, softmax_scale=0.3, profile=profile, topk_length=length)
        assert np.isneginf(want[:, 1]).all()
        assert (bound.total[:, 1] == 0).all()
        for i, row in ((0, [4, 0]), (2, [1, 2, 3, 5])):
            scores = (q[i].astype(wide) @ kv[row].astype(wide).T) * wide(0.3)
            exact = (0.3 * (q[i] @ kv[row].T)).max(-1)
            assert (np.abs(want[:, i] - exact) <= 2 * bound.terms["the reference's own float64"][:, i]).all()
            assert (np.abs(scores.max(-1).astype(float) - want[:, i]) <= bound.total[:, i]).all()
            assert (bound.total[:, i] < 2.0**-15 * (1 + np.abs(want[:, i]))).all()


def test_a_largest_logit_that_misses_a_key_leaves_the_bound() -> None:
    q, kv, _ = operands(5, "bfloat16")
    profile = Profile.default("bfloat16")
    all_keys, bound = max_logits_with_bound(q, kv, np.tile(np.arange(17), (3, 1)), softmax_scale=0.3, profile=profile)
    scores = 0.3 * np.einsum("shd,td->hst", q, kv)
    second = np.sort(scores, axis=-1)[..., -2]
    assert (np.abs(second - all_keys) > bound.total).all()


def test_a_sink_of_infinity_gives_exactly_nothing() -> None:
    q, kv, _ = operands(6, "float16")
    sink = np.array([np.inf, -np.inf, 0.0, np.inf])
    got = sparse_attention(
        q,
        kv,
        np.tile(np.arange(17), (3, 1)),
        head_dim_v=4,
        softmax_scale=0.3,
        profile=Profile.default("float16"),
        attn_sink=sink,
    )
    assert not got.out[:, [0, 3]].any()
    assert not got.out_error.total[:, [0, 3]].any()
    assert got.out_error.total[:, 1:3].all()
    assert got.lse_error.total.all()


def shortfall(logits: list[float], error: float, selected: list[int], visible: int) -> float:
    values = np.array([logits])
    chosen = np.isin(np.arange(len(logits)), selected)[None]
    seen = (np.arange(len(logits)) < visible)[None]
    return float(selection_shortfall(values, np.full_like(values, error), chosen, seen)[0])


def test_errors_explain_a_swap_of_logits_that_lie_within_them() -> None:
    assert shortfall([1.0, 2.0, 3.0], 0.0, [2], 3) <= 0
    assert shortfall([1.0, 2.0, 3.0], 0.0, [1], 3) == 1.0
    assert shortfall([1.0, 2.0, 3.0], 0.5, [1], 3) == 0.0
    assert shortfall([1.0, 2.0, 3.0], 0.5, [0], 3) == 1.0
    assert shortfall([2.0, 2.0, 2.0], 0.0, [1], 3) <= 0
    assert shortfall([1.0, 2.0, 3.0], 0.0, [1], 2) <= 0  # the largest is not visible
    assert shortfall([1.0, 2.0, 3.0], 0.0, [], 0) == 0
    assert shortfall([1.0, 2.0, 3.0], 0.0, [0, 1, 2], 3) == 0


def test_the_references_selection_is_never_short() -> None:
    rng = np.random.default_rng(7)
    logits = rng.integers(-3, 4, (50, 12)).astype(float)
    visible = rng.integers(0, 13, 50)
    seen = np.arange(12) < visible[:, None]
    for k in (1, 3, 12, 20):
        selected = np.zeros_like(seen)
        for row, indices in zip(selected, select_top_k(logits, k, visible), strict=True):
            row[indices[indices >= 0]] = True
        assert (selected.sum(-1) == np.minimum(visible, k)).all()
        assert (selection_shortfall(logits, np.zeros_like(logits), selected, seen) <= 0).all()


def test_a_narrower_profile_gives_a_wider_bound() -> None:
    q, k, weights = operands(8, "bfloat16")
    profile = Profile.default("bfloat16")
    coarse = replace(profile, score_format="bfloat16", score_roundings=2)
    totals = [indexer_with_bound(q, k, weights, p)[1].total for p in (profile, coarse)]
    assert (totals[1] > totals[0]).all()
    assert np.median(totals[1] / totals[0]) > 10


FLOAT16, BFLOAT16 = Profile.default("float16"), Profile.default("bfloat16")
PROFILES = {
    "float64": Profile.default("float64"),
    "float32": Profile.default("float32"),
    "scores stored twice": replace(BFLOAT16, score_format="bfloat16", score_roundings=2, operand_roundings=4),
    "scores never stored": replace(BFLOAT16, score_roundings=0, lse="bfloat16"),
    "narrow": replace(FLOAT16, score=Accumulator(order="blocked", block=4), score_format="float16", softmax="float16"),
}


def indexer_terms(
    q: Array, k: Array, w: Array, q_error: Array, k_error: Array, profile: Profile
) -> tuple[float, dict[str, float]]:
    """The logit of one query [h, d] and one key [d], and its bound as docs/bounds.md has it."""
    h, d = q.shape
    gauge = inherited = positive = total = 0.0
    for head in range(h):
        weight = abs(float(w[head]))
        size = sum((abs(q[head, i]) + q_error[head, i]) * (abs(k[i]) + k_error[i]) for i in range(d))
        moved = sum(q_error[head, i] * (abs(k[i]) + k_error[i]) + abs(q[head, i]) * k_error[i] for i in range(d))
        relu = max(sum(q[head, i] * k[i] for i in range(d)), 0.0)
        gauge, inherited = gauge + weight * size, inherited + weight * moved
        positive, total = positive + weight * relu, total + w[head] * relu
    stored = 1 + UNIT_ROUNDOFF[profile.score_format]
    rho = stored**profile.score_roundings * (1 + gamma(h + 2, UNIT_ROUNDOFF[profile.softmax])) - 1
    rate = profile.score.relative_error(d + profile.operand_roundings)  # Γ
    underflow = FORMATS[profile.score_format].smallest_normal * sum(abs(float(x)) for x in w)
    return total, {
        "products of q and k": (1 + rho) * rate * gauge,
        "error of the operands": (1 + rho) * inherited,
        f"scores in {profile.score_format} and their weighted sum": rho * positive + underflow,
        "the reference's own float64": gamma(d + h + 2, U64) * gauge,
    }


@pytest.mark.parametrize("inherited", [True, False], ids=["operands with errors", "exact operands"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_of_logits_is_the_one_written_out(name: str, inherited: bool) -> None:
    rng = np.random.default_rng(9)
    q, k, w = (rng.standard_normal(shape) for shape in ((2, 3, 4, 6), (2, 5, 6), (2, 3, 4)))  # batch 2, s 3, h 4, t 5
    w[0, 1] = 0.0
    q_error, k_error = (rng.uniform(0, 0.1, x.shape) * inherited for x in (q, k))
    errors = {"q_error": q_error, "k_error": k_error} if inherited else {}
    logits, bound = indexer_with_bound(q, k, w, PROFILES[name], **errors)
    for b, i, j in np.ndindex(2, 3, 5):
        operand = q[b, i], k[b, j], w[b, i], q_error[b, i], k_error[b, j]
        logit, terms = indexer_terms(*operand, PROFILES[name])
        assert logits[b, i, j] == pytest.approx(logit, rel=1e-12, abs=1e-14)
        assert_terms(bound, (b, i, j), terms)


def max_logit_terms(q: Array, rows: list[Array], scale: float, profile: Profile) -> tuple[float, dict[str, float]]:
    """The largest logit of one head [d] over its rows, and its bound."""
    d, u, stored = len(q), UNIT_ROUNDOFF[profile.softmax], UNIT_ROUNDOFF[profile.score_format]
    kappa = (1 + stored) ** profile.score_roundings * (1 + u) ** 3 - 1
    rate = profile.score.relative_error(d + profile.operand_roundings)  # Γ
    scores = [scale * sum(q[i] * row[i] for i in range(d)) for row in rows]
    gauges = [abs(scale) * sum(abs(q[i] * row[i]) for i in range(d)) for row in rows]
    delta = [(1 + kappa) * rate * g + kappa * abs(x) for g, x in zip(gauges, scores, strict=True)]
    highest = max(x + e for x, e in zip(scores, delta, strict=True))
    lowest = max(x - e for x, e in zip(scores, delta, strict=True))
    moved = max(highest - max(scores), max(scores) - lowest)
    return max(scores), {
        "error of the scores": moved,
        "rounding": (2 * u + UNIT_ROUNDOFF[profile.lse]) * (abs(max(scores)) + moved),
        "the reference's own float64": gamma(d + 2, U64) * max(gauges),
    }


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_of_the_largest_logit_is_the_one_written_out(name: str, scale: float) -> None:
    rng = np.random.default_rng(10)
    q, kv = rng.standard_normal((2, 3, 4, 6)), 3 + rng.standard_normal((2, 5, 6))  # batch 2, s 3, h 4, t 5
    q[..., 1, :] = -np.abs(q[..., 1, :])  # all scores of one sign
    q[..., 2, :] *= 1e-3
    q[..., 5], kv[:, 1] = q[..., 4], kv[:, 0] + [0, 0, 0, 0, 8, -8]  # equal scores, unequal errors
    indices = rng.integers(-1, 6, (2, 3, 7))
    indices[1, 0] = -1
    length = np.array([[7, 3, 5], [7, 7, 4]])
    largest, bound = max_logits_with_bound(
        q, kv, indices, softmax_scale=scale, profile=PROFILES[name], topk_length=length
    )
    for b, i, h in np.ndindex(2, 3, 4):
        rows = [kv[b, j] for j in indices[b, i, : length[b, i]] if 0 <= j < 5]
        if not rows:
            assert np.isneginf(largest[b, h, i])
            assert bound.total[b, h, i] == 0
            continue
        logit, terms = max_logit_terms(q[b, i, h], rows, scale, PROFILES[name])
        assert largest[b, h, i] == pytest.approx(logit, rel=1e-12)
        spread = bound.terms["error of the scores"][b, h, i]  # a difference of scores
        assert spread == pytest.approx(
            terms["error of the scores"], rel=1e-12, abs=4 * terms["the reference's own float64"]
        )
        assert_terms(bound, (b, h, i), terms | {"error of the scores": spread})


@pytest.mark.parametrize("name", PROFILES)
def test_what_a_sink_leaves_of_the_bound_is_written_out(name: str) -> None:
    """Share · each contribution without a sink, and the error of the share itself."""
    profile = replace(PROFILES[name], exp_error=2.5)
    rng = np.random.default_rng(11)
    q, kv, indices = rng.standard_normal((3, 4, 6)), rng.standard_normal((5, 6)), rng.integers(-1, 5, (3, 7))
    sink, u = np.array([0.4, -np.inf, 3.0, -20.0]), UNIT_ROUNDOFF[profile.softmax]

    def bounded(attn_sink: Array | None) -> BoundedAttention:
        options: dict[str, Any] = {"head_dim_v": 2, "softmax_scale": 0.3, "profile": profile, "attn_sink": attn_sink}
        return sparse_attention(q, kv, indices, **options)

    without, got = bounded(None), bounded(sink)
    np.testing.assert_array_equal(got.lse, without.lse)
    np.testing.assert_array_equal(got.lse_error.total, without.lse_error.total)
    rounding, own = f"rounding of the output to {profile.output}", "the reference's own float64"
    for s, h, d in np.ndindex(3, 4, 2):
        lse, lse_error = float(got.lse[h, s]), float(got.lse_error.total[h, s])
        out = float(without.out[s, h, d])
        before = {key: float(term[s, h, d]) for key, term in without.out_error.terms.items()}
        share, taken = 1 / (1 + math.exp(sink[h] - lse)), 1 / (1 + math.exp(lse - sink[h]))  # their sum is 1
        size = abs(lse) + (abs(float(sink[h])) if math.isfinite(sink[h]) else 0.0)
        relative = taken * (math.expm1(lse_error + 4 * u * size) + profile.exp_error * u) + 4 * u + 4 * U64
        arithmetic = sum(before[key] for key in before.keys() - {rounding, own, "attention sink"})
        sunk = relative * (abs(out) + arithmetic)
        want = {key: share * term for key, term in (before | {"attention sink": sunk}).items()}
        want[rounding] = half_ulp(share * (abs(out) + arithmetic + sunk), profile.output)
        assert got.out[s, h, d] == pytest.approx(share * out, rel=1e-12)
        assert_terms(got.out_error, (s, h, d), want)


def test_the_shortfall_is_the_one_written_out() -> None:
    rng = np.random.default_rng(12)
    logits, error = rng.standard_normal((2, 30, 6)), rng.uniform(0, 0.3, (2, 30, 6))
    visible = rng.random(logits.shape) < 0.8
    selected = visible & (rng.random(logits.shape) < 0.5)
    got = selection_shortfall(logits, error, selected, visible)
    assert (got > 0).any() and (got < 0).any() and (got == 0).any()
    for b, s in np.ndindex(2, 30):
        chosen = [j for j in range(6) if selected[b, s, j]]
        left = [i for i in range(6) if visible[b, s, i] and not selected[b, s, i]]
        pairs = [(logits[b, s, i] - error[b, s, i]) - (logits[b, s, j] + error[b, s, j]) for j in chosen for i in left]
        assert got[b, s] == max(pairs, default=0.0)


def test_nothing_to_select_from_has_no_bound() -> None:
    """Rows without entries, and no keys at all."""
    largest, bound = max_logits_with_bound(
        np.ones((3, 4, 6)), np.ones((5, 6)), np.zeros((3, 0), dtype=int), softmax_scale=0.3, profile=FLOAT16
    )
    assert np.isneginf(largest).all()
    assert bound.total.shape == (4, 3)
    assert not bound.total.any()
    empty = np.zeros((3, 0))
    assert selection_shortfall(empty, empty, empty > 0, empty > 0).tolist() == [0, 0, 0]
