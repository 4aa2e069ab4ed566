"""The parts of an error bound: sums of contributions, and the error of one rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mla_spec.bounds.error_bound import ErrorBound, InvalidBound, half_ulp
from mla_spec.reference.formats import format_of, round_to


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_an_ulp_is_the_error_midway_between_any_two_neighbours(name: str) -> None:
    fmt = format_of(name)
    exponents = np.arange(fmt.min_exponent - fmt.precision - 1, math.frexp(fmt.max_finite)[1])
    dense = np.ldexp(1 + np.arange(0, 1, 2.0 ** -(fmt.precision + 1))[:, None], exponents)
    values = np.unique(round_to(np.ravel(dense), name))
    values = values[np.isfinite(values)]
    midpoints = (values[:-1] + values[1:]) / 2  # exact in float64
    np.testing.assert_array_equal(np.abs(round_to(midpoints, name) - midpoints), half_ulp(midpoints, name))


def test_half_an_ulp_of_the_extremes() -> None:
    assert half_ulp(np.array(0.0), "float16") == format_of("float16").smallest_subnormal / 2
    assert half_ulp(np.array(np.inf), "float16") == np.inf
    assert half_ulp(np.array(np.nan), "float16") == np.inf


def test_total_of_a_contribution_that_overflowed_is_infinite() -> None:
    bound = ErrorBound({"a": np.array([1.0, np.inf, 2.0]), "b": np.array([2.0, 1.0, np.inf])})
    np.testing.assert_array_equal(bound.total, [3.0, np.inf, np.inf])
    np.testing.assert_array_equal(bound[1:].total, [np.inf, np.inf])
    assert bound.main_term((0,)) == "b"
    assert bound.main_term((1,)) == "a"


@pytest.mark.parametrize("bad", [-1e-300, -np.inf, np.nan])
def test_a_contribution_that_is_no_magnitude_is_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match=f"'second' must be 0 or more, got {bad!r}"):
        ErrorBound({"first": np.ones(3), "second": np.array([1.0, bad, 0.0])})
    good = ErrorBound({"first": np.ones(3)})
    with pytest.raises(InvalidBound):
        good.plus("more", np.array([0.0, 0.0, bad]))
    with pytest.raises(InvalidBound):
        good.map(lambda term: bad * term)
