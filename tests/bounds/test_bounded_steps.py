"""The steps of a layer with their errors, against the same written out for one number at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.profile import Profile, RopeProfile, gamma
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.running import Bounded
from mla_spec.bounds.running_steps import (
    BoundedRms,
    bounded_rms_norm,
    foldable,
    norm_error,
    rotated,
    scaled,
    scaled_by_config,
    temperature,
)
from mla_spec.reference.config import Llama4Scaling, RopeConfig
from mla_spec.reference.formats import FORMATS
from tests.bounds.test_bounded import bounded, integers
from tests.bounds.written_out import (
    U64,
    Number,
    assert_same,
    numbers,
    rounded,
    size,
)

EPS = 1e-2
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def rms_of(row: list[Number], eps: float) -> tuple[float, float, float]:
    """(rms, how far a computed one may be from it, the smallest that it may be)."""
    rms = math.sqrt(sum(v * v for v, _ in row) / len(row) + eps)
    shift = min(math.sqrt(sum(e * e for _, e in row) / len(row)), rms)
    return rms, shift, max(rms - shift, math.sqrt(eps))


def divided(x: Number, rms: tuple[float, float, float]) -> float:
    """The error of x/rms: that of x, and that of 1/rms times x."""
    exact, shift, least = rms
    return x[1] / least + abs(x[0]) * shift / (exact * least)


@pytest.mark.parametrize("known", [1.0, 5.0, 1000.0], ids=["well", "hardly", "not at all"])
def test_rms_and_what_is_divided_by_it(known: float) -> None:
    x, other = bounded(0, 2, 3, 5), bounded(1, 2, 3, 5)
    x = Bounded(x.value, known * x.error)
    rms, each, others = BoundedRms.of(x, EPS), numbers(x), numbers(other)
    for i, s in np.ndindex(2, 3):
        want = rms_of(each[i][s], EPS)
        got = rms.rms[i, s, 0], rms.shift[i, s, 0], rms.least[i, s, 0]
        assert got == pytest.approx(want, rel=1e-12, abs=1e-12)
        # fewer than 32 roundings, but for the difference in the smallest rms
        rtol = gamma(32, U64) * (1 + (want[0] + want[1]) / want[2])
        np.testing.assert_allclose(rms.divide(other)[i, s], [divided(y, want) for y in others[i][s]], rtol=rtol)


def test_rms_of_what_may_be_nothing_is_that_of_eps_at_least() -> None:
    """However small eps is beside x."""
    x = Bounded(np.full((1, 2), 3e12), np.full((1, 2), 4e12))
    assert BoundedRms.of(x, 1e-6).least.tolist() == [[1e-3]]


@pytest.mark.parametrize("norm", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rms_norm(dtype: str, norm: str) -> None:
    """Rounded after normalising, relatively and where that underflows, and after the weight."""
    profile = Profile.default(dtype, norm=norm)
    x, weight = bounded(2, 2, 3, 5), -bounded(3, 5).value
    relative = gamma(5 + 8, ROUNDOFF[norm]) + gamma(5 + 8, U64) + ROUNDOFF[dtype]
    assert norm_error(5, profile) == pytest.approx(relative, rel=1e-14, abs=0)

    def normalised(row: list[Number], i: int) -> Number:
        rms, w = rms_of(row, EPS), float(weight[i])
        value, carried = w * row[i][0] / rms[0], abs(w) * divided(row[i], rms)
        error = carried + relative * (abs(value) + carried) + abs(w) * FORMATS[dtype].smallest_subnormal / 2
        return rounded((value, error), dtype)

    want = [[[normalised(row, i) for i in range(5)] for row in rows] for rows in numbers(x)]
    assert_same(bounded_rms_norm(x, weight, EPS, profile), want)


def test_numbers_that_underflow_when_normalised() -> None:
    """Half the smallest subnormal times the weight, before the weighted number is rounded."""
    x, weight = Bounded(np.array([[0.0, 1.0]]), np.zeros((1, 2))), np.array([64.0, 1.0])
    subnormal = FORMATS["float16"].smallest_subnormal
    got = bounded_rms_norm(x, weight, EPS, Profile.default("float16"))
    assert got.error[0, 0] == 64 * subnormal / 2 + subnormal / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [12**0.5, 0.3])
def test_foldable_latents(factor: float, dtype: str) -> None:
    """Two roundoffs of x, and half the smallest subnormal at either size."""
    x = bounded(4, 3, 4)
    x.value[0, 0], x.error[0, 0] = 0.0, 0.0
    least = FORMATS[dtype].smallest_subnormal / 2 * max(1, 1 / factor)

    def folded(n: Number) -> Number:
        return n[0], n[1] + 2 * ROUNDOFF[dtype] * size(n) + least

    assert_same(foldable(x, factor, dtype), [[folded(n) for n in row] for row in numbers(x)])
    assert foldable(x, 1.0, dtype) is x


def times(x: Number, factor: float, relative: float, dtype: str) -> Number:
    """x times a factor that is known, and multiplies, to ``relative``; a factor of 1 rounds nothing."""
    if factor == 1:
        return x
    scaled = factor * x[0], factor * x[1]
    return rounded((scaled[0], scaled[1] + relative * size(scaled)), dtype)


@pytest.mark.parametrize("factor", [12**0.5, 0.3, 1.0])
def test_factors(factor: float) -> None:
    x = bounded(5, 3, 4)
    each = numbers(x)
    for relative in (0.0, 0.01):
        assert_same(
            scaled(x, factor, relative, "float16"),
            [[times(n, factor, relative, "float16") for n in row] for row in each],
        )
    for norm in ("float32", "float64"):
        profile = Profile.default("bfloat16", norm=norm)
        # as it is stated and as it multiplies; its root, quotient and product in the reference
        relative = 2 * ROUNDOFF[norm] + 3 * U64
        assert_same(
            scaled_by_config(x, factor, profile),
            [[times(n, factor, relative, "bfloat16") for n in row] for row in each],
        )
    wide = Profile.default("float64", norm="float64")
    np.testing.assert_array_equal(scaled_by_config(x, factor, wide).error, scaled(x, factor, 5 * U64, "float64").error)


@pytest.mark.parametrize(
    ("operands", "angle", "dtype"), [(bounded, "float32", "bfloat16"), (integers, "float64", "float64")]
)
def test_temperatures(operands: Any, angle: str, dtype: str) -> None:
    """Of each position, the same for all heads; rounded to the dtype, after a product, a sum and a logarithm."""
    x, positions = operands(6, 3, 2, 4), np.array([7, 9, 40])
    scaling = Llama4Scaling(beta=0.3, original_max_position_embeddings=8)
    profile = Profile.default(dtype, rope=RopeProfile(angle=angle))
    relative = 8 * (ROUNDOFF[angle] + U64) + ROUNDOFF[dtype]
    factors = [1 + 0.3 * math.log(1 + position // 8) for position in positions]
    want = [
        [[times(n, factor, relative, dtype) for n in head] for head in row]
        for row, factor in zip(numbers(x), factors, strict=True)
    ]
    assert_same(temperature(x, positions, scaling, profile), want)
    assert want[0] == numbers(x)[0]
    assert temperature(x, positions, None, profile) is x


@pytest.mark.parametrize("operands", [bounded, integers])
def test_rotations(operands: Any) -> None:
    x, positions, rope = operands(7, 3, 2, 4), np.array([0, 5, 90]), RopeConfig(dim=4, theta=50.0)
    profile = Profile.default("bfloat16", rope=RopeProfile(table="bfloat16"))
    value, bound = rope_with_bound(x.value, positions, rope, profile.rope, output="bfloat16", x_error=x.error)
    got = rotated(x, positions, rope, profile)
    np.testing.assert_array_equal(got.value, value)
    np.testing.assert_array_equal(got.error, bound.total)
    assert rotated(x, positions, None, profile) is x
