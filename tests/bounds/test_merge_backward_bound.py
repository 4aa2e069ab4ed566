"""The bound of a merge's gradients: written out, honest backward passes stay inside, and it is not wide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.bounds.merge import merge_with_bound
from mla_spec.bounds.merge_backward import merge_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.merge import merge_backward
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import UNIT_ROUNDOFF, gamma
from tests.bounds.merge_bound_row import DV, INF, PROFILES, H, Row, S, operands
from tests.bounds.written_out import U64, Number, exact, perhaps_stored, size, stored, times, total

RNG = np.random.default_rng(11)
OUT_GRAD = RNG.standard_normal((S, H, DV))
LSE_GRAD = 3 * RNG.standard_normal((H, S))


class BackwardRow(Row):
    """The gradients of one row, from docs/bounds.md: of outs [part][dv] and of LSEs [part], by the parts with keys."""

    def __init__(self, *arguments: Any, profile: Profile, out_grad: list[float], lse_grad: float) -> None:
        super().__init__(*arguments)
        (self.own_outs, self.own_lses, self.out_errors, self.lse_errors, self.out, self.own_lse) = arguments
        self.profile, self.out_grad, self.lse_grad = profile, out_grad, lse_grad
        self.u = UNIT_ROUNDOFF[profile.softmax]
        self.lost = FORMATS[profile.softmax].smallest_normal
        self.out_terms, self.lse_terms = self.terms(replace(profile, output="float64", output_rounding="nearest"))

    def p(self) -> dict[int, Number]:
        off_lse = sum(self.lse_terms.values())
        relative = (self.profile.exp_error + 3) * (self.u + U64)
        exponents, own = self.exponents(self.u), self.exponents(U64)
        result = {}
        for i in self.parts:
            share = math.exp(self.own_lses[i] - self.own_lse)
            growth = math.expm1(exponents[i] + own[i] + self.lse_errors[i] + off_lse) * (1 + relative) + relative
            result[i] = share, share * growth + self.lost
        return result

    def products(self, outs: list[Number]) -> Number:
        """Σ_d dO_d O_d."""
        gauge = sum(abs(g) * size(x) for g, x in zip(self.out_grad, outs, strict=True))
        carried = sum(abs(g) * x[1] for g, x in zip(self.out_grad, outs, strict=True))
        value = sum(g * x[0] for g, x in zip(self.out_grad, outs, strict=True))
        return value, carried + (gamma(DV + 2, self.u) + gamma(DV + 2, U64)) * gauge

    def dp(self) -> dict[int, Number]:
        return {i: self.products(list(zip(self.own_outs[i], self.out_errors[i], strict=True))) for i in self.parts}

    def mean(self) -> Number:
        """D of the shares, or of the output, perhaps as it was stored."""
        p, dp, n = self.p(), self.dp(), self.n
        each = [times(p[i], dp[i], self.u) for i in self.parts]
        of_shares = total(each, gamma(n + 2, self.u) + gamma(n + 2, U64))  # parts without keys count as terms
        errors = [sum(term[d] for term in self.out_terms.values()) for d in range(DV)]
        stored_out = [
            perhaps_stored(x, self.profile.output, self.profile.output_rounding)
            for x in zip(self.out, errors, strict=True)
        ]
        return of_shares[0], max(of_shares[1], self.products(stored_out)[1])

    def gradients(self) -> tuple[dict[int, list[Number]], dict[int, Number]]:
        p, dp, mean = self.p(), self.dp(), self.mean()
        gauge = sum(size(p[i]) * size(dp[i]) for i in self.parts)
        sizes = {i: size(dp[i]) + gauge + mean[1] + abs(self.lse_grad) for i in self.parts}
        off = {i: self.lse_errors[i] + self.exponents(self.u)[i] for i in self.parts}
        highest = max(self.own_lses[i] - off[i] for i in self.parts)
        of_largest = gamma(2 * self.n + 12, self.u) * sum(size(p[i]) * sizes[i] for i in self.parts)
        wide = "float64" if self.profile.dtype == "float64" else "float32"
        of_outs, of_lses = {}, {}
        for i in self.parts:
            of_outs[i] = []
            for g in self.out_grad:
                value, error = times(p[i], exact(g), self.u)
                of_outs[i].append(stored((value, error + self.lost), self.profile.dtype, self.profile.output_rounding))
            error = p[i][1] * sizes[i] + p[i][0] * (dp[i][1] + mean[1])
            error += gamma(12, self.u + U64) * size(p[i]) * sizes[i] + self.lost * (1 + sizes[i])
            if self.own_lses[i] + off[i] >= highest:
                error += of_largest
            of_lses[i] = stored((p[i][0] * (dp[i][0] - mean[0] + self.lse_grad), error), wide)
        return of_outs, of_lses


@pytest.mark.parametrize("inherited", [True, False], ids=["parts with errors", "exact parts"])
@pytest.mark.parametrize("through_lse", [True, False], ids=["gradient of the LSE", "none"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_bound_is_the_one_written_out(name: str, through_lse: bool, inherited: bool) -> None:
    profile = PROFILES[name]
    outs, lses, out_errors, lse_errors = operands()
    errors = {"out_errors": out_errors, "lse_errors": lse_errors} if inherited else {}
    lse_grad = LSE_GRAD if through_lse else None
    of_outs, of_lses = merge_backward_with_bound(outs, lses, OUT_GRAD, profile, lse_grad=lse_grad, **errors)
    for have, want in zip((of_outs, of_lses), merge_backward(outs, lses, OUT_GRAD, lse_grad), strict=True):
        np.testing.assert_array_equal(have.value, want)
    merged = merge_with_bound(outs, lses, profile)
    for s, h in np.ndindex(S, H):
        row, column = (slice(None), s, h), (slice(None), h, s)
        empty = np.isneginf(lses[column])
        for unseen in (of_outs[row][empty], of_lses[column][empty]):
            assert not unseen.value.any()
            assert not unseen.error.any()
        if empty.all():
            continue
        written = BackwardRow(
            outs[row].tolist(),
            lses[column].tolist(),
            (out_errors[row] * inherited).tolist(),
            (lse_errors[column] * inherited).tolist(),
            merged.out[s, h].tolist(),
            float(merged.lse[h, s]),
            profile=profile,
            out_grad=OUT_GRAD[s, h].tolist(),
            lse_grad=float(LSE_GRAD[h, s]) if through_lse else 0.0,
        )
        want_outs, want_lses = written.gradients()
        for i in written.parts:
            # An interval that ends beside a rounding boundary may end beyond it where float64 sums in another order.
            rtol = 1e-9 if profile.dtype == "float64" else 1e-6
            np.testing.assert_allclose(of_outs.error[i, s, h], [e for _, e in want_outs[i]], rtol=rtol)
            np.testing.assert_allclose(of_lses.error[i, h, s], want_lses[i][1], rtol=rtol)


def excess(got: Any, want: Any) -> float:
    """The largest error as a multiple of the bound."""
    error = np.abs(np.asarray(got, dtype=float) - want.value)
    return float((error / np.maximum(want.error, 5e-324)).max())


def by_autograd(subject: Any, outs: Array, lses: Array, out_grad: Array, lse_grad: Array) -> tuple[Array, Array]:
    """In float32, from outs of bfloat16 where they are."""
    o, x = torch.tensor(outs, dtype=torch.float32), torch.tensor(lses, dtype=torch.float32)
    o.requires_grad_()
    x.requires_grad_()
    out, lse = subject.merge(o, x)
    torch.autograd.backward(
        [out, lse], [torch.tensor(out_grad, dtype=out.dtype), torch.tensor(lse_grad, dtype=lse.dtype)]
    )
    assert o.grad is not None
    assert x.grad is not None
    return o.grad.numpy(), x.grad.numpy()


def fused(outs: Array, lses: Array, out_grad: Array, lse_grad: Array, output: str) -> tuple[Array, Array]:
    """In float32, D from the output as it was stored in ``output``, shares from the stored LSE."""
    o, x, do, dlse = (a.astype(np.float32) for a in (outs, lses, out_grad, lse_grad))
    m = x.max(axis=0)
    lse = m + np.log(np.exp(x - m).sum(axis=0))
    p = np.exp(x - lse)
    share = np.swapaxes(p, -1, -2)[..., None]
    out = round_to((share * o).sum(axis=0).astype(float), output).astype(np.float32)
    dp, mean = ((do * a).sum(axis=-1).swapaxes(-1, -2) for a in (o, out))
    return share * do, p * (dp - mean + dlse)


def many(mean: float, std: float, count: int, dtype: str) -> tuple[Array, Array, Array, Array]:
    lses = (mean + std * RNG.standard_normal((count, 40, 4, 5))).astype(np.float32).astype(float)
    outs, out_grad = (round_to(RNG.standard_normal(shape), dtype) for shape in ((count, 40, 5, 4, 6), (40, 5, 4, 6)))
    return outs, lses, out_grad, RNG.standard_normal((40, 4, 5)).astype(np.float32).astype(float)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.0), (-300.0, 30.0), (5e4, 3.0), (-5e4, 0.1)])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("subject", [TorchExplicit(), TorchAbsorbed(), TorchSDPA()], ids=lambda x: x.name)
def test_autograd_in_float32_is_within_the_bound(subject: Any, count: int, mean: float, std: float) -> None:
    arguments = many(mean, std, count, "float32")
    want = merge_backward_with_bound(*arguments[:3], Profile.default("float32"), lse_grad=arguments[3])
    for got, bounded in zip(by_autograd(subject, *arguments), want, strict=True):
        assert excess(got, bounded) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_fused_backward_pass_is_within_the_bound(count: int, dtype: str) -> None:
    arguments = many(0.0, 1.0, count, dtype)
    want = merge_backward_with_bound(*arguments[:3], Profile.default(dtype), lse_grad=arguments[3])
    of_outs, of_lses = fused(*arguments, output=dtype)
    assert excess(round_to(of_outs.astype(float), dtype), want[0]) <= 1
    assert excess(of_lses, want[1]) <= 1
    if dtype != "float32" and count > 1:  # a bound for float32 outputs would not do
        unrounded = replace(Profile.default(dtype), output="float32")
        assert excess(of_lses, merge_backward_with_bound(*arguments[:3], unrounded, lse_grad=arguments[3])[1]) > 1


def test_the_bound_is_near_what_is_reached() -> None:
    """Float32 merges of many rows reach a twentieth of the bound somewhere, in both gradients."""
    arguments = many(0.0, 1.0, 4, "float32")
    want = merge_backward_with_bound(*arguments[:3], Profile.default("float32"), lse_grad=arguments[3])
    for subject in (TorchExplicit(), TorchAbsorbed(), TorchSDPA()):
        for got, bounded in zip(by_autograd(subject, *arguments), want, strict=True):
            assert excess(got, bounded) > 1 / 20


def test_inherited_errors_move_the_gradients_no_further_than_the_bound() -> None:
    outs, lses = RNG.standard_normal((3, 50, 5, 4, 6)), RNG.standard_normal((3, 50, 4, 5))
    lses[0, :10] = -INF
    out_grad, lse_grad = RNG.standard_normal((50, 5, 4, 6)), RNG.standard_normal((50, 4, 5))
    want = merge_backward_with_bound(
        outs,
        lses,
        out_grad,
        Profile.default("float64"),
        lse_grad=lse_grad,
        out_errors=np.full(outs.shape, 0.01),
        lse_errors=np.full(lses.shape, 0.1),
    )
    reached = [0.0, 0.0]
    for signs in RNG.choice([-1.0, 1.0], (20, 3)):
        moved = merge_backward(outs + 0.01 * signs[0], lses + 0.1 * signs.reshape(3, 1, 1, 1), out_grad, lse_grad)
        for i, (got, bounded) in enumerate(zip(moved, want, strict=True)):
            reached[i] = max(reached[i], excess(got, bounded))
    assert 0.3 < reached[0] <= 1
    assert 0.1 < reached[1] <= 1


def test_rows_without_keys_are_exact() -> None:
    want = merge_backward_with_bound(
        np.ones((2, 3, 2, 1, 4)), np.full((2, 3, 1, 2), -INF), np.ones((3, 2, 1, 4)), Profile.default("bfloat16")
    )
    for bounded in want:
        assert not bounded.value.any()
        assert not bounded.error.any()


def test_errors_of_lses_that_overflow_make_the_bound_infinite() -> None:
    outs, lses, _, _ = operands()
    with np.errstate(over="raise", invalid="raise"):
        want = merge_backward_with_bound(outs, lses, OUT_GRAD, PROFILES["float32"], lse_errors=np.full(lses.shape, 1e3))
    present = np.isfinite(lses)
    assert np.isinf(want[0].error[np.swapaxes(present, -1, -2)]).all()
    assert np.isinf(want[1].error[present]).all()
    assert not want[1].error[~present].any()
