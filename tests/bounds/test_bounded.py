"""Products and roundings with their errors, against the same written out for one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.profile import Accumulator, Profile, gamma
from mla_spec.bounds.running import (
    Bounded,
    concatenated,
    matmul,
    multiply,
    perhaps_stored,
    product,
    product_terms,
    rounded,
    stored,
)
from mla_spec.reference.formats import FORMATS
from tests.bounds import written_out
from tests.bounds.written_out import (
    U64,
    Number,
    assert_same,
    dot,
    exact,
    half_ulp,
    numbers,
    times,
)

WIDE = Accumulator(format="float64")


def bounded(seed: int, *shape: int) -> Bounded:
    """Numbers of many sizes, known to 1e-5 to 1e-1; some of them exact."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 4, shape)
    return Bounded(value, np.abs(value) * 10.0 ** rng.uniform(-5, -1, shape) * rng.integers(0, 4, shape).clip(0, 1))


def integers(seed: int, *shape: int) -> Bounded:
    """Small integers, exact: products and sums of few are numbers of every format, so that storing them costs nothing."""
    value = np.random.default_rng(seed).integers(1, 4, shape).astype(float)
    return Bounded(value, np.zeros(shape))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_roundings(dtype: str) -> None:
    x = bounded(0, 200)
    x.value[:4], x.error[:4] = [0.0, 0.0, 2.0**-140, 1.5], [0.0, 1e-3, 0.0, 0.0]
    each: list[Number] = numbers(x)
    assert_same(rounded(x, dtype), [written_out.rounded(n, dtype) for n in each])
    for rounding in ("nearest", "truncate"):
        assert_same(stored(x, dtype, rounding), [written_out.stored(n, dtype, rounding) for n in each])
        assert_same(perhaps_stored(x, dtype, rounding), [written_out.perhaps_stored(n, dtype, rounding) for n in each])
    for default in (stored, perhaps_stored):
        np.testing.assert_array_equal(default(x, dtype).error, default(x, dtype, "nearest").error)


@pytest.mark.parametrize("operands", [bounded, integers])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_products_of_matrices(rate: float, operands: Any) -> None:
    a, b = operands(1, 2, 3, 5), operands(2, 2, 5, 4)
    x, y = numbers(a), numbers(b)
    want = [[[dot(x[i][m], [row[p] for row in y[i]], rate) for p in range(4)] for m in range(3)] for i in range(2)]
    assert_same(matmul(a, b, rate), want)


@pytest.mark.parametrize("operands", [bounded, integers])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_products_of_numbers(rate: float, operands: Any) -> None:
    a, b = operands(1, 2, 3), operands(2, 3)
    x, y = numbers(a), numbers(b)
    assert_same(multiply(a, b, rate), [[times(x[i][j], y[j], rate) for j in range(3)] for i in range(2)])


@pytest.mark.parametrize(
    ("operands", "profile"),
    [
        (bounded, Profile.default("bfloat16")),
        (bounded, Profile.default("float16", linear=Accumulator(order="blocked", block=2))),
        (integers, Profile.default("float16", linear=WIDE)),
    ],
)
def test_projections(operands: Any, profile: Profile) -> None:
    """w e of earlier stages, Γ W (x + e) of the sum, and half an ulp of the largest number that may come out."""
    w, x = operands(3, 5, 4).value, operands(4, 2, 3, 4)
    rate = profile.linear.relative_error(4) + gamma(4, U64)
    each = numbers(x)
    value, bound = product_terms("oe,...e->...o", w, x, profile)
    whole = product("oe,...e->...o", w, x, profile)
    for i, s, o in np.ndindex(2, 3, 5):
        row = each[i][s]
        carried = sum(abs(w[o, e]) * row[e][1] for e in range(4))
        accumulated = rate * sum(abs(w[o, e]) * (abs(row[e][0]) + row[e][1]) for e in range(4))
        assert value[i, s, o] == pytest.approx(sum(w[o, e] * row[e][0] for e in range(4)), rel=1e-12, abs=1e-14)
        rounding = half_ulp(abs(float(value[i, s, o])) + carried + accumulated, profile.dtype)
        terms = {
            "error of earlier stages": carried,
            "accumulation of the projection": accumulated,
            f"rounding to {profile.dtype}": rounding,
        }
        got = {name: float(term[i, s, o]) for name, term in bound.terms.items()}
        assert got == pytest.approx(terms, rel=1e-12, abs=0)
        assert whole.error[i, s, o] == pytest.approx(carried + accumulated + rounding, rel=1e-12, abs=0)
    np.testing.assert_array_equal(whole.value, value)


def test_projections_of_each_head() -> None:
    """The index that is summed is the last of x, wherever it stands in the weight."""
    profile = Profile.default("bfloat16")
    w, x = bounded(5, 3, 4, 2).value, bounded(6, 2, 5, 3, 4)
    got = product("hnc,...shn->...shc", w, x, profile)
    for head in range(3):
        one = product("ce,...e->...c", w[head].T, x[..., head, :], profile)
        # sums of four products in any order, and errors without a difference of fewer than 32 roundings
        gauge = np.einsum("ce,...e->...c", np.abs(w[head].T), np.abs(x.value[..., head, :]))
        assert (np.abs(got.value[..., head, :] - one.value) <= 2 * gamma(4, U64) * gauge).all()
        np.testing.assert_allclose(got.error[..., head, :], one.error, rtol=gamma(32, U64))


def test_values_and_errors_are_arranged_alike() -> None:
    a, b = bounded(7, 2, 3), bounded(8, 2, 4)
    x, y = numbers(a), numbers(b)
    assert_same(concatenated(a, b), [x[i] + y[i] for i in range(2)], rtol=0)
    assert_same(concatenated(a[:, None], b[:, None]), [[x[i] + y[i]] for i in range(2)], rtol=0)
    assert_same(a[1], x[1], rtol=0)
    assert_same(a.map(np.transpose), [[x[i][j] for i in range(2)] for j in range(3)], rtol=0)
    assert_same(a.reshape(6), x[0] + x[1], rtol=0)


def test_half_an_ulp_doubles_at_powers_of_two() -> None:
    for dtype, u in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        assert half_ulp(1.0, dtype) == u
        assert half_ulp(2 - u, dtype) == u
        assert half_ulp(0.0, dtype) == FORMATS[dtype].smallest_subnormal / 2
        assert rounded(Bounded(np.ones(1), np.zeros(1)), dtype).error == u == written_out.rounded(exact(1.0), dtype)[1]
