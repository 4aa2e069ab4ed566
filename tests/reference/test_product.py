"""Accurate products against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from mla_spec.reference.product import accurate_product
from mla_spec.reference.typing import Array


def worst_ulps(got: Array, a: Array, b: Array) -> float:
    """The largest error of ``got`` = a @ b in ulps of Σ |a| |b|."""
    ulps = []
    for i, j in np.ndindex(got.shape):
        terms = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]
        gauge = float(sum(map(abs, terms), Fraction(0)))
        ulps.append(abs(Fraction(float(got[i, j])) - sum(terms, Fraction(0))) / Fraction(float(np.spacing(gauge))))
    return float(max(ulps, default=0.0))


@pytest.mark.parametrize("n", [1, 2, 17, 576])
@pytest.mark.parametrize("kind", ["same sign", "signed", "first leads", "growing", "wide"])
@pytest.mark.parametrize("prefixes", [False, True])
def test_the_error_does_not_grow_with_the_length(n: int, kind: str, prefixes: bool) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.uniform(0.5, 1, (3, n)), rng.uniform(0.5, 1, (n, 2))
    if kind == "signed":
        a, b = a * rng.choice([-1.0, 1.0], a.shape), b * rng.choice([-1.0, 1.0], b.shape)
    if kind == "first leads":
        a[:, 1:] *= 1e-6
    if kind == "growing":
        b *= np.geomspace(1, 8, n)[:, None]
    if kind == "wide":
        a, b = a * 10.0 ** rng.integers(-8, 8, a.shape), b * 10.0 ** rng.integers(-8, 8, b.shape)
    # The sum of the heads, that of the tails and their sum are each rounded by half an ulp of the gauge at most.
    assert worst_ulps(accurate_product(a, b, prefixes=prefixes), a, b) <= 1.5


def test_a_plain_product_is_worse() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 1, (3, 1024)), rng.uniform(0.5, 1, (1024, 2))
    assert worst_ulps(np.add.accumulate(a[:, :, None] * b, axis=1)[:, -1], a, b) > 1.5


def test_long_sums_of_operands_of_any_size() -> None:
    """2^18 equal products, whose plain sum drifts; rows of a, and the matrices of a stack, differ in size."""
    n, third = 2**18, 1 / 3
    a = np.broadcast_to(np.array([[third], [2.0**-40 * third]]), (2, 2, n))
    b = np.broadcast_to(np.array([2.0**40 * third, third])[:, None, None], (2, n, 1))
    exact = n * Fraction(third) ** 2
    for got, size in zip(accurate_product(a, b).ravel().tolist(), (2.0**40, 1.0, 1.0, 2.0**-40), strict=True):
        assert abs(Fraction(got / size) - exact) <= Fraction(1.5 * math.ulp(exact))


def test_later_rows_of_weight_0_change_no_bit() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 9)), rng.random((9, 4))
    a[:, 6:] = 0.0
    changed = b.copy()
    changed[6:] *= -1e12
    np.testing.assert_array_equal(accurate_product(a, changed, prefixes=True), accurate_product(a, b, prefixes=True))


@pytest.mark.parametrize("size", [1e-300, 1e-160, 2.0**-1074, 1e150, 1.7e308])
def test_extreme_sizes(size: float) -> None:
    a = np.array([[1.0, 0.5, 0.0]])
    b = np.array([[0.75], [-0.5], [1.0]]) * size
    assert worst_ulps(accurate_product(a, b), a, b) <= 1.5


def test_shapes() -> None:
    rng = np.random.default_rng(2)
    for left, right in (((2, 1, 3, 4), (5, 4, 2)), ((3, 0), (0, 2)), ((0, 4), (4, 2)), ((3, 4), (4, 0))):
        a, b = rng.standard_normal(left), rng.standard_normal(right)
        assert accurate_product(a, b).shape == (a @ b).shape


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_stays_visible() -> None:
    for bad in (np.nan, np.inf):
        assert not np.isfinite(accurate_product(np.array([[1.0, bad]]), np.ones((2, 1)))).any()
        assert not np.isfinite(accurate_product(np.ones((1, 2)), np.array([[1.0], [bad]]))).any()
