"""Bounds of the indexer and of the largest logit: honest arithmetic stays inside, and they are not wide."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mla_spec.reference.formats import round_to
from mla_spec.reference.profile import Profile
from mla_spec.reference.sparse import indexer_logits, select_top_k, sparse_attention
from mla_spec.reference.sparse_bound import indexer_with_bound, max_logits_with_bound, selection_shortfall
from mla_spec.reference.typing import Array

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
