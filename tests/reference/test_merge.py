"""The merge of parts, against attention over all keys and in extreme cases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mla_spec.reference.attention import attention
from mla_spec.reference.merge import merge
from mla_spec.reference.merge_bound import merge_with_bound
from mla_spec.reference.profile import Profile
from mla_spec.reference.typing import Array

RNG = np.random.default_rng(7)
EPS = np.finfo(np.float64).eps


def parts(lses: list[float], width: int = 3) -> tuple[Array, Array]:
    """One row per part: outs [parts, 1, 1, width] and lses [parts, 1, 1]."""
    lse = np.array(lses).reshape(-1, 1, 1)
    return RNG.standard_normal((len(lses), 1, 1, width)), lse


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 0, 3, 3, 8, 9)])
def test_parts_of_the_keys_merge_to_attention_over_all(cuts: tuple[int, ...]) -> None:
    q, k, v = (RNG.standard_normal((2, t, 4, d)) for t, d in ((5, 6), (9, 6), (9, 3)))
    pieces = [attention(q, k[:, i:j], v[:, i:j], softmax_scale=2.0, causal=False) for i, j in pairwise(cuts)]
    out, lse = merge(np.stack([o for o, _ in pieces]), np.stack([x for _, x in pieces]))
    want, want_lse = attention(q, k, v, softmax_scale=2.0, causal=False)
    assert np.abs(out - want).max() < 64 * EPS
    assert np.abs(lse - want_lse).max() < 64 * EPS * np.abs(want_lse).max()


def test_empty_parts_have_no_weight_and_are_not_read() -> None:
    outs, lses = parts([-np.inf, 1.5, -np.inf])
    outs[[0, 2]] = np.nan
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, lses[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_keys_the_row_is_empty(count: int) -> None:
    out, lse = merge(np.full((count, 1, 1, 2), np.nan), np.full((count, 1, 1), -np.inf))
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("mean", [1e300, -1e300, 5e4, 0.0])
def test_equal_lses_average_at_any_magnitude(mean: float) -> None:
    outs, lses = parts([mean, mean])
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs.mean(axis=0))
    assert lse == mean + np.log(2)


def test_a_part_of_far_greater_mass_is_the_result() -> None:
    outs, lses = parts([-800.0, 1.0, -1e5])
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    assert lse == 1.0


def test_heads_and_queries_are_not_confused() -> None:
    outs, lses = RNG.standard_normal((2, 3, 5, 4, 6)), RNG.standard_normal((2, 3, 4, 5))
    out, lse = merge(outs, lses)
    for b, s, h in ((0, 0, 0), (2, 4, 1), (1, 2, 3)):
        weights = np.exp(lses[:, b, h, s])
        want = weights @ outs[:, b, s, h] / weights.sum()
        assert np.abs(out[b, s, h] - want).max() < 8 * EPS
        assert abs(lse[b, h, s] - np.log(weights.sum())) < 8 * EPS


@pytest.mark.parametrize(
    ("outs", "lses"),
    [((2, 5, 4, 3), (2, 5, 4)), ((2, 5, 4, 3), (1, 4, 5)), ((5, 4, 3), (4, 5))],
)
def test_shapes_must_fit(outs: tuple[int, ...], lses: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fit, got"):
        merge(np.zeros(outs), np.zeros(lses))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_lses_must_be_numbers_or_minus_infinity(bad: float) -> None:
    outs, lses = parts([0.0, bad])
    with pytest.raises(ValueError, match=r"^lses must be finite or -inf"):
        merge(outs, lses)


def exp2_merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """In base 2 and with the LSE as divisor, in float32."""
    binary = lses.astype(np.float32) * np.float32(1 / np.log(2))
    top = binary.max(axis=0)
    lse = top + np.log2(np.exp2(binary - top).sum(axis=0))
    shares = np.swapaxes(np.exp2(binary - lse), -1, -2)[..., None]
    return (shares * outs.astype(np.float32)).sum(axis=0), lse * np.float32(np.log(2))


def divided_merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """In base e and with a division at the end, in float32, one part after the other."""
    m = lses[0].astype(np.float32)
    total, sums = np.ones_like(m), outs[0].astype(np.float32)
    for lse, out in zip(lses[1:].astype(np.float32), outs[1:].astype(np.float32), strict=True):
        new = np.maximum(m, lse)
        old, weight = np.exp(m - new), np.exp(lse - new)
        sums = sums * np.swapaxes(old, -1, -2)[..., None] + out * np.swapaxes(weight, -1, -2)[..., None]
        total, m = total * old + weight, new
    return sums / np.swapaxes(total, -1, -2)[..., None], m + np.log(total)


@pytest.mark.parametrize("how", [exp2_merge, divided_merge])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.0), (-300.0, 30.0), (5e4, 3.0), (-5e4, 0.1)])
@pytest.mark.parametrize("count", [2, 7])
def test_float32_merges_are_within_the_bound(how: object, mean: float, std: float, count: int) -> None:
    assert callable(how)
    lses = (mean + std * RNG.standard_normal((count, 8, 4, 5))).astype(np.float32).astype(float)
    outs = RNG.standard_normal((count, 8, 5, 4, 6)).astype(np.float32).astype(float)
    out, lse = how(outs, lses)
    want = merge_with_bound(outs, lses, Profile.default("float32"))
    assert (np.abs(out - want.out) <= want.out_error.total).all()
    assert (np.abs(lse - want.lse) <= want.lse_error.total).all()


def test_the_bound_is_near_what_is_reached() -> None:
    """Float32 merges of many rows reach a twentieth of the bound somewhere: it is no bound by size alone."""
    lses = RNG.standard_normal((4, 400, 4, 5)).astype(np.float32).astype(float)
    outs = RNG.standard_normal((4, 400, 5, 4, 6)).astype(np.float32).astype(float)
    want = merge_with_bound(outs, lses, Profile.default("float32"))
    ratios = [
        (np.abs(out - want.out) / want.out_error.total).max()
        for out, _ in (exp2_merge(outs, lses), divided_merge(outs, lses))
    ]
    assert min(ratios) > 1 / 20


@pytest.mark.parametrize("mean", [5e4, -5e4])
def test_products_with_log2_e_may_all_round_the_same_way(mean: float) -> None:
    """Each of L_i, M and lse is off by a roundoff, and exp2(L_i − lse) is not divided again."""
    u = 2.0**-24
    outs, lses = np.abs(RNG.standard_normal((2, 50, 5, 4, 6))), mean + RNG.standard_normal((2, 50, 4, 5))
    want = merge_with_bound(outs, lses, Profile.default("float32"))
    lse = want.lse - u * np.abs(want.lse) - u * np.abs(lses.max(axis=0))
    shares = np.exp(lses + u * np.abs(lses) - lse)
    out = (np.swapaxes(shares, -1, -2)[..., None] * outs).sum(axis=0)
    ratio = np.abs(out - want.out) / want.out_error.total
    assert ratio.min() > 0.4
    assert ratio.max() <= 1


def test_inherited_errors_move_the_merge_no_further_than_the_bound() -> None:
    lses, outs = RNG.standard_normal((3, 50, 4, 5)), RNG.standard_normal((3, 50, 5, 4, 6))
    lses[0, :10] = -np.inf
    profile = Profile.default("float64")
    want = merge_with_bound(
        outs, lses, profile, out_errors=np.full(outs.shape, 0.01), lse_errors=np.full(lses.shape, 0.1)
    )
    reached = 0.0
    for signs in RNG.choice([-1.0, 1.0], (20, 3)):
        out, lse = merge(outs + 0.01 * signs[0], lses + 0.1 * signs.reshape(3, 1, 1, 1))
        reached = max(reached, float((np.abs(out - want.out) / want.out_error.total).max()))
        assert (np.abs(lse - want.lse) <= want.lse_error.total).all()
    assert 0.3 < reached <= 1


def test_rows_without_keys_are_exact() -> None:
    outs, lses = np.zeros((2, 3, 2, 1, 4)), np.full((2, 3, 1, 2), -np.inf)
    want = merge_with_bound(outs, lses, Profile.default("bfloat16"))
    assert (want.out_error.total == 0).all()
    assert (want.lse_error.total == 0).all()
