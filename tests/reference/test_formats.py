"""Rounding to a format, against exact rational arithmetic and against torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mla_spec.reference.formats import FORMATS, Format, format_of, round_to
from mla_spec.reference.typing import Array

NARROW = ("float32", "float16", "bfloat16")
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def exactly_rounded(x: float, fmt: Format) -> float:
    """Nearest, ties to even, in rational arithmetic: a search for the exponent, and integers."""
    if x == 0 or not math.isfinite(x):
        return x
    size = abs(Fraction(x))
    exponent = fmt.min_exponent
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - fmt.precision + 1)
    count, rest = divmod(size, quantum)
    if 2 * rest > quantum or (2 * rest == quantum and count % 2 == 1):
        count += 1
    result = count * quantum
    return math.copysign(math.inf if result > Fraction(fmt.max_finite) else float(result), x)


def hard_cases(fmt: Format) -> list[float]:
    """Both sides of every edge of a format: ties, binades, subnormals and overflow."""
    ulp = 2 * fmt.unit_roundoff
    sub = fmt.smallest_subnormal
    top_ulp = 2.0 ** (math.frexp(fmt.max_finite)[1] - fmt.precision)
    centres = [
        1 + ulp / 2,  # tie, even below
        1 + 3 * ulp / 2,  # tie, even above
        1 - ulp / 4,  # tie across a binade
        2 - ulp / 2,  # rounds into the next binade
        fmt.smallest_normal,
        fmt.smallest_normal - sub / 2,
        fmt.smallest_normal - sub,
        sub / 2,  # tie between 0 and the smallest subnormal
        sub,
        3 * sub / 2,
        5 * sub / 2,
        fmt.max_finite,
        fmt.max_finite + top_ulp / 2,  # the first number that rounds to infinity
        1 / 3,
        math.pi * 2.0 ** (fmt.min_exponent + 3),
    ]
    around = [n for c in centres for n in (c, math.nextafter(c, 0), math.nextafter(c, math.inf))]
    return [sign * x for x in around if math.isfinite(x) for sign in (1.0, -1.0)]


@pytest.mark.parametrize("name", NARROW)
def test_rounding_is_exact_on_hard_cases(name: str) -> None:
    fmt = FORMATS[name]
    cases = np.array(hard_cases(fmt))
    expected = np.array([exactly_rounded(float(x), fmt) for x in cases])
    np.testing.assert_array_equal(round_to(cases, name), expected)
    assert (np.abs(expected) == np.inf).any()
    assert (expected == 0).any()


@pytest.mark.parametrize("name", NARROW)
def test_rounding_is_exact_on_random_cases(name: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(20)
    exponents = rng.uniform(fmt.min_exponent - fmt.precision - 2, math.log2(fmt.max_finite) + 1, 600)
    cases = rng.choice([-1, 1], 600) * 2.0**exponents
    expected = np.array([exactly_rounded(float(x), fmt) for x in cases])
    np.testing.assert_array_equal(round_to(cases, name), expected)


def test_overflow_of_float16_begins_at_65520() -> None:
    below = math.nextafter(65520.0, 0)
    assert round_to(np.array([65504.0, 65519.999, below]), "float16").tolist() == [65504.0] * 3
    assert round_to(np.array([65520.0, -65520.0, 1e300]), "float16").tolist() == [math.inf, -math.inf, math.inf]


def test_overflow_of_bfloat16() -> None:
    largest = float(torch.finfo(torch.bfloat16).max)
    assert FORMATS["bfloat16"].max_finite == largest == float.fromhex("0x1.fep127")
    edge = float.fromhex("0x1.ffp127")
    assert round_to(np.array([math.nextafter(edge, 0), edge]), "bfloat16").tolist() == [largest, math.inf]
    # Every float32 above the edge is finite there and infinite here.
    assert round_to(np.array([float(np.finfo(np.float32).max)]), "bfloat16").tolist() == [math.inf]


@pytest.mark.parametrize("name", FORMATS)
def test_special_values_pass(name: str) -> None:
    special = np.array([math.nan, math.inf, -math.inf, 0.0, -0.0])
    got = round_to(special, name)
    np.testing.assert_array_equal(got, special)
    assert np.signbit(got).tolist() == np.signbit(special).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_negative_numbers_keep_their_sign_when_they_round_to_zero(name: str) -> None:
    got = round_to(np.array([-FORMATS[name].smallest_subnormal / 4]), name)
    assert got[0] == 0
    assert np.signbit(got[0])


def patterns(name: str) -> Array:
    """Every number of a 16-bit format, in float64."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(TORCH[name]).to(torch.float64).numpy()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_pattern_is_a_fixed_point(name: str) -> None:
    every = patterns(name)
    np.testing.assert_array_equal(round_to(every, name), every)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_midpoints_of_neighbours_agree_with_torch(name: str) -> None:
    every = np.unique(patterns(name)[np.isfinite(patterns(name))])  # sorted, zeros merged
    midpoints = (every[1:] + every[:-1]) / 2
    # A midpoint of two 16-bit numbers is a float32, so that torch rounds it once.
    assert (midpoints.astype(np.float32) == midpoints).all()
    expected = torch.from_numpy(midpoints).to(torch.float32).to(TORCH[name]).to(torch.float64).numpy()
    np.testing.assert_array_equal(round_to(midpoints, name), expected)
    low, high = np.nextafter(midpoints, -np.inf), np.nextafter(midpoints, np.inf)
    np.testing.assert_array_equal(round_to(low, name), every[:-1])
    np.testing.assert_array_equal(round_to(high, name), every[1:])


def test_float32_agrees_with_numpy() -> None:
    rng = np.random.default_rng(21)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(-160, 130, 20000)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_to(x, "float32"), x.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounds_once_where_a_cast_through_float32_rounds_twice(name: str) -> None:
    ulp = 2 * FORMATS[name].unit_roundoff
    # Just above a tie whose even neighbour is below: float32 rounds it onto the tie, and then it falls.
    x = np.array([1 + ulp / 2 + 2.0**-40, -(1 + ulp / 2 + 2.0**-40), 1 + 3 * ulp / 2 - 2.0**-40])
    once = np.array([1 + ulp, -(1 + ulp), 1 + ulp])
    twice = torch.from_numpy(x).to(torch.float32).to(TORCH[name]).to(torch.float64).numpy()
    np.testing.assert_array_equal(round_to(x, name), once)
    assert (twice != once).all()


def test_float64_is_copied() -> None:
    x = np.array([1 / 3, 5e-324])
    got = round_to(x, "float64")
    np.testing.assert_array_equal(got, x)
    got[0] = 0
    assert x[0] == 1 / 3


@pytest.mark.parametrize("name", FORMATS)
def test_constants_of_a_format(name: str) -> None:
    fmt, info = FORMATS[name], torch.finfo(getattr(torch, name))
    assert fmt.bits == info.bits
    assert fmt.itemsize == info.bits // 8
    assert fmt.unit_roundoff == info.eps / 2
    assert fmt.smallest_normal == info.tiny
    assert fmt.max_finite == info.max
    assert fmt.smallest_subnormal == info.tiny * info.eps


@pytest.mark.parametrize("name", FORMATS)
def test_unit_roundoff_is_the_largest_relative_error(name: str) -> None:
    u = FORMATS[name].unit_roundoff
    x = np.random.default_rng(22).uniform(1, 2, 4000)
    assert (np.abs(round_to(x, name) - x) <= u * x).all()
    if name != "float64":
        tie = np.array([1 + u])
        assert tie - round_to(tie, name) == u


def test_unknown_format_is_refused() -> None:
    message = r"^unknown number format 'fp8'; known formats are float64, float32, float16, bfloat16$"
    with pytest.raises(ValueError, match=message):
        format_of("fp8")
    with pytest.raises(ValueError, match=message):
        round_to(np.zeros(1), "fp8")
