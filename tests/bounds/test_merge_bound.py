"""The bound of a merge: written out, honest merges stay inside, and it is not wide."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.bounds.merge import merge_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.merge import merge
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import assert_terms
from tests.bounds.merge_bound_row import DV, FLOAT32, PROFILES, H, Row, S, operands

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("inherited", [True, False], ids=["parts with errors", "exact parts"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_is_the_one_written_out(name: str, inherited: bool) -> None:
    profile = PROFILES[name]
    outs, lses, out_errors, lse_errors = operands()
    errors = {"out_errors": out_errors, "lse_errors": lse_errors} if inherited else {}
    got = merge_with_bound(outs, lses, profile, **errors)
    for have, want in zip((got.out, got.lse), merge(outs, lses), strict=True):
        np.testing.assert_array_equal(have, want)
    for s, h in np.ndindex(S, H):
        row, column = (slice(None), s, h), (slice(None), h, s)
        if not np.isfinite(got.lse[h, s]):
            assert not got.out_error.total[s, h].any()
            assert got.lse_error.total[h, s] == 0
            continue
        written = Row(
            outs[row].tolist(),
            lses[column].tolist(),
            (out_errors[row] * inherited).tolist(),
            (lse_errors[column] * inherited).tolist(),
            got.out[s, h].tolist(),
            float(got.lse[h, s]),
        )
        out_terms, lse_terms = written.terms(profile)
        assert_terms(got.out_error, (s, h), out_terms)
        assert_terms(got.lse_error, (h, s), lse_terms)


def test_without_parts_nothing_is_in_error() -> None:
    got = merge_with_bound(np.zeros((0, S, H, DV)), np.zeros((0, H, S)), FLOAT32)
    assert got.out_error.total.shape == (S, H, DV)
    assert not got.out_error.total.any()
    assert got.lse_error.total.shape == (H, S)
    assert not got.lse_error.total.any()


def test_errors_of_lses_that_overflow_make_the_bound_infinite() -> None:
    outs, lses, _, _ = operands()
    with np.errstate(over="raise", invalid="raise"):
        got = merge_with_bound(outs, lses, FLOAT32, lse_errors=np.full(lses.shape, 1e3))
    seen = np.isfinite(got.lse)
    assert np.isinf(got.out_error.total[seen.T]).all()
    assert np.isinf(got.lse_error.total[seen]).all()
    assert not got.out_error.total[~seen.T].any()


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


def ring_merge(outs: Array, lses: Array, shares: type = np.float32) -> tuple[Array, Array]:
    """By the sigmoid of the difference of two LSEs, in float32, one part after the other."""
    one = np.float32(1)
    out, lse = outs[0].astype(np.float32), lses[0].astype(np.float32)
    for part, part_lse in zip(outs[1:].astype(np.float32), lses[1:].astype(np.float32), strict=True):
        difference = part_lse - lse
        with np.errstate(over="ignore"):
            share = (one / (one + np.exp(-difference))).astype(shares).astype(np.float32)
        out = out - np.swapaxes(share, -1, -2)[..., None] * (out - part)
        lse = lse - (np.minimum(-difference, 0) - np.log1p(np.exp(-np.abs(difference))))
    return out, lse


RING = Profile.default("float32", merge_shares="sigmoid")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.0), (-300.0, 30.0), (5e4, 3.0), (0.0, 1e3), (0.0, 2e4)])
@pytest.mark.parametrize("count", [2, 7, 33])
def test_ring_merges_are_within_the_bound(mean: float, std: float, count: int) -> None:
    lses = (mean + std * RNG.standard_normal((count, 8, 4, 5))).astype(np.float32).astype(float)
    outs = (10 * RNG.standard_normal((count, 8, 5, 4, 6))).astype(np.float32).astype(float)
    out, lse = ring_merge(outs, lses)
    want = merge_with_bound(outs, lses, RING)
    assert (np.abs(out - want.out) <= want.out_error.total).all()
    assert (np.abs(lse - want.lse) <= want.lse_error.total).all()


def test_a_ring_merge_must_be_declared() -> None:
    """An LSE of nearly 0 after one of −5000 is off by a roundoff of their difference; a part of no weight rounds the output."""
    lses = np.array([-5000.0, 1e-3])[:, None, None, None] * np.ones((2, 8, 4, 5))
    lses = (lses + 1e-4 * RNG.standard_normal(lses.shape)).astype(np.float32).astype(float)
    outs = np.array([1000.0, 1.0])[:, None, None, None, None] * RNG.standard_normal((2, 8, 5, 4, 6))
    outs = outs.astype(np.float32).astype(float)
    out, lse = ring_merge(outs, lses)
    want = merge_with_bound(outs, lses, Profile.default("float32"))
    assert (np.abs(out - want.out) > want.out_error.total).any()
    assert (np.abs(lse - want.lse) > want.lse_error.total).any()


def test_a_ring_merge_of_float16_shares_exceeds_the_bound() -> None:
    lses = RNG.standard_normal((3, 8, 4, 5)).astype(np.float32).astype(float)
    outs = RNG.standard_normal((3, 8, 5, 4, 6)).astype(np.float32).astype(float)
    out, _ = ring_merge(outs, lses, shares=np.float16)
    want = merge_with_bound(outs, lses, RING)
    assert (np.abs(out - want.out) > want.out_error.total).any()


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
