"""The bound of a merge: written out, honest merges stay inside, and it is not wide."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mla_spec.bounds.merge import merge_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import FORMATS
from mla_spec.reference.merge import merge
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import (
    UNIT_ROUNDOFF,
    assert_terms,
    gamma,
    half_ulp,
)

RNG = np.random.default_rng(7)
FLOAT32, FLOAT16 = Profile.default("float32"), Profile.default("float16")
PROFILES = {
    "float64": Profile.default("float64"),
    "float32": FLOAT32,
    "bfloat16": Profile.default("bfloat16", exp_error=1.5),
    "truncated output": replace(FLOAT16, output_rounding="truncate"),
    "softmax in float16": replace(
        FLOAT16, softmax="float16", exp_error=2.0
    ),  # whose smallest weights are not negligible
    "softmax in bfloat16": replace(FLOAT32, softmax="bfloat16", exp_error=0.5),
    "LSE in bfloat16": replace(FLOAT16, lse="bfloat16"),
}
INF = math.inf
ROWS = {  # LSEs of the four parts
    "near": [0.3, -1.2, 0.9, 0.1],
    "far below": [-5e2, -5.01e2, -7e2, -5e2],
    "far above": [3e2, 2e2, 3.01e2, -1e2],
    "one": [-INF, -INF, 2.5, -INF],
    "some": [0.25, -INF, -INF, -3.0],
    "none": [-INF, -INF, -INF, -INF],
}
S, H, DV = 2, 3, 5


def operands() -> tuple[Array, Array, Array, Array]:
    """Outs [4, s, h, dv] and lses [4, h, s] of ``ROWS``, and errors of both."""
    rng = np.random.default_rng(1)
    lses = np.array(list(ROWS.values())).T.reshape(4, H, S)
    outs = rng.standard_normal((4, S, H, DV)) * np.exp(rng.standard_normal((4, S, H, DV)))
    return outs, lses, rng.uniform(0, 0.1, outs.shape), rng.uniform(0, 0.2, lses.shape)


class Row:
    """The bound of one row, from docs/bounds.md: outs and errors [parts][dv], LSEs and errors [parts]."""

    def __init__(
        self,
        outs: list[list[float]],
        lses: list[float],
        out_errors: list[list[float]],
        lse_errors: list[float],
        out: list[float],
        lse: float,
    ) -> None:
        self.n, self.out = len(lses), out
        self.parts = [i for i in range(self.n) if lses[i] > -INF]
        m = max(lses[i] for i in self.parts)
        total = sum(math.exp(lses[i] - m) for i in self.parts)
        share = {i: math.exp(lses[i] - m) / total for i in self.parts}
        # Of the parts: their outputs' weighted errors, and weight that moves between them.
        stretch = 1 + sum(share[i] * math.expm1(lse_errors[i]) for i in self.parts)
        grown = {i: share[i] * math.exp(lse_errors[i]) * stretch for i in self.parts}
        self.inherited_lse = math.log(stretch)
        self.inherited = [
            sum(
                grown[i] * out_errors[i][d] + share[i] * math.expm1(lse_errors[i]) * stretch * abs(outs[i][d] - out[d])
                for i in self.parts
            )
            for d in range(len(out))
        ]
        # The largest that anything may be when it reaches the merge.
        largest_error = max(lse_errors[i] for i in self.parts)
        self.share = grown
        self.outs = {i: [abs(x) + e for x, e in zip(outs[i], out_errors[i], strict=True)] for i in self.parts}
        self.lses = {i: abs(lses[i]) + lse_errors[i] for i in self.parts}
        self.below = {i: lse - lses[i] + lse_errors[i] + self.inherited_lse for i in self.parts}  # lse − L_i
        self.largest = abs(m) + largest_error
        self.lse = abs(lse) + self.inherited_lse
        self.log_total = math.log(total) + self.inherited_lse + largest_error  # lse − M

    def arithmetic(self, softmax: str, exp_error: float) -> tuple[list[float], list[float], float]:
        """(error of the shares, of the weighted sum, of the LSE before it is returned)."""
        u = UNIT_ROUNDOFF[softmax]
        eps = exp_error * u
        exponent = {  # 1.
            i: u * (1 + gamma(2, u)) * (self.lses[i] + max(self.largest, self.lse)) + gamma(2, u) * self.below[i]
            for i in self.parts
        }
        log = (  # 2.
            math.log1p(sum(self.share[i] * math.expm1(exponent[i]) for i in self.parts))
            - math.log1p(-eps)
            - math.log1p(-gamma(self.n, u))
            + gamma(1, u) * (self.largest + self.lse)
            + eps * self.log_total
        )
        eps += 3 * u
        zeta = {i: math.expm1(exponent[i] + log) * (1 + eps) + eps for i in self.parts}  # 3.
        moved = [sum(zeta[i] * self.share[i] * self.outs[i][d] for i in self.parts) for d in range(len(self.out))]
        summed = []  # 4.
        for d, error in enumerate(moved):
            gauge = sum(self.share[i] * self.outs[i][d] for i in self.parts)
            lost = FORMATS[softmax].smallest_normal * (self.n + sum(self.outs[i][d] for i in self.parts))
            summed.append(gamma(self.n, u) * (gauge + error) + lost)
        return moved, summed, log

    def terms(self, profile: Profile) -> tuple[dict[str, list[float]], dict[str, float]]:
        moved, summed, log = self.arithmetic(profile.softmax, profile.exp_error)
        own_moved, own_summed, own_log = self.arithmetic("float64", 4.0)
        before = [sum(x) for x in zip(self.inherited, moved, summed, strict=True)]
        factor = 2 if profile.output_rounding == "truncate" else 1
        returned = gamma(3, UNIT_ROUNDOFF[profile.softmax]) * (self.lse + log)
        out_terms = {
            "error of the parts": self.inherited,
            f"weights in {profile.softmax}": moved,
            f"weighted sum in {profile.softmax}": summed,
            f"rounding of the output to {profile.output}": [
                factor * half_ulp(abs(o) + e, profile.output) for o, e in zip(self.out, before, strict=True)
            ],
            "the reference's own float64": [a + b for a, b in zip(own_moved, own_summed, strict=True)],
        }
        lse_terms = {
            "error of the parts": self.inherited_lse,
            f"log-sum-exp in {profile.softmax}": log + returned,
            f"rounding of the LSE to {profile.lse}": UNIT_ROUNDOFF[profile.lse] * (self.lse + log + returned),
            "the reference's own float64": own_log,
        }
        return out_terms, lse_terms


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
