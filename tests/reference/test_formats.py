"""Rounding and bit patterns: against tables of the formats, exact rational arithmetic, and torch."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from mla_spec.reference import formats
from mla_spec.reference.formats import (
    FORMATS,
    Format,
    decode_bits,
    encode,
    format_of,
    from_bytes,
    holds,
    round_to,
    to_bytes,
)
from mla_spec.reference.typing import Array

IEEE = ("float64", "float32", "float16", "bfloat16", "float8_e5m2")
NARROW = tuple(name for name in FORMATS if name != "float64")
SIGNED = tuple(name for name in NARROW if name != "float8_e8m0fnu")
SMALL = tuple(name for name, fmt in FORMATS.items() if fmt.bits <= 16)
TORCH = {name: getattr(torch, name) for name in FORMATS if name != "float4_e2m1fn"}
# Exponent bits, fraction bits, bias, and the first pattern that is no finite number: OCP OFP8 1.0, table 1; MX 1.0,
# tables 5 and 7; IEEE 754-2019, table 3.5.
TABLES = {
    "float16": (5, 10, 15, 0x7C00),
    "bfloat16": (8, 7, 127, 0x7F80),
    "float8_e4m3fn": (4, 3, 7, 0x7F),
    "float8_e5m2": (5, 2, 15, 0x7C),
    "float8_e8m0fnu": (8, 0, 127, 0xFF),
    "float4_e2m1fn": (2, 1, 1, 0x8),
}


def every_pattern(name: str) -> np.ndarray:
    return np.arange(2 ** FORMATS[name].bits, dtype=np.uint16)


def values_of_patterns(name: str) -> list[float]:
    """Every pattern's value from the table of its format, in integers and rationals."""
    exponent_bits, fraction_bits, bias, first_special = TABLES[name]
    positive = name == "float8_e8m0fnu"
    size_bits = exponent_bits + fraction_bits
    values = []
    for pattern in range(2 ** (size_bits + (not positive))):
        negative, size = divmod(pattern, 2**size_bits)
        exponent, fraction = divmod(size, 2**fraction_bits)
        if size >= first_special:
            infinite = name in IEEE and fraction == 0
            value = math.inf if infinite else math.nan
        elif exponent == 0 and not positive:
            value = float(Fraction(fraction) * Fraction(2) ** (1 - bias - fraction_bits))
        else:
            value = float((1 + Fraction(fraction, 2**fraction_bits)) * Fraction(2) ** (exponent - bias))
        values.append(-value if negative else value)
    return values


def finite_numbers(name: str) -> Array:
    """All finite numbers of a small format in order, the zeros merged."""
    every = np.array(values_of_patterns(name))
    return np.unique(every[np.isfinite(every)])


def same(got: Array, want: Array) -> None:
    """Equal values, signs of zero and NaNs."""
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


def by_torch(x: Array, name: str) -> Array:
    """The cast of float32 numbers by torch."""
    narrow = x.astype(np.float32)
    np.testing.assert_array_equal(narrow.astype(np.float64), x)
    return torch.from_numpy(narrow).to(TORCH[name]).to(torch.float64).numpy()


def exactly_rounded(x: float, fmt: Format, rounding: str) -> float:
    """In rational arithmetic: a search for the exponent, and integers."""
    if x == 0 or not math.isfinite(x):
        return x
    size = abs(Fraction(x))
    exponent = fmt.min_exponent
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - fmt.precision + 1)
    count, rest = divmod(size, quantum)
    if rounding == "nearest" and (2 * rest > quantum or (2 * rest == quantum and count % 2 == 1)):
        count += 1
    result = count * quantum
    beyond = fmt.max_finite if rounding == "truncate" else math.inf
    return math.copysign(beyond if result > Fraction(fmt.max_finite) else float(result), x)


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
        fmt.max_finite + top_ulp / 2,  # the first number that rounds beyond, where the significand of max_finite is odd
        1 / 3,
        math.pi * 2.0 ** (fmt.min_exponent + 3),
    ]
    around = [n for c in centres for n in (c, math.nextafter(c, 0), math.nextafter(c, math.inf))]
    return [sign * x for x in around if math.isfinite(x) for sign in (1.0, -1.0)]


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e5m2"])
def test_rounding_is_exact_on_hard_and_random_cases(name: str, rounding: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(20)
    exponents = rng.uniform(fmt.min_exponent - fmt.precision - 2, math.log2(fmt.max_finite) + 1, 600)
    cases = np.concatenate([hard_cases(fmt), rng.choice([-1, 1], 600) * 2.0**exponents])
    expected = np.array([exactly_rounded(float(x), fmt, rounding) for x in cases])
    same(round_to(cases, name, rounding=rounding), expected)
    assert (np.abs(expected) >= fmt.max_finite).any()
    assert (expected == 0).any()


@pytest.mark.parametrize("name", SMALL)
def test_every_midpoint_and_its_neighbours(name: str) -> None:
    """All pairs of adjacent finite numbers: at the midpoint, and at the float64 just below and just above it."""
    every = finite_numbers(name)
    even = {value: pattern % 2 == 0 for pattern, value in enumerate(values_of_patterns(name))}
    if name == "float8_e8m0fnu":  # its one significand bit is always 1: a tie goes to the power of two above
        even = {value: i % 2 == 0 for i, value in enumerate(every)}
    cases, nearest, truncated = [], [], []
    for low, high in itertools.pairwise(every.tolist()):
        middle = (low + high) / 2
        for x in (math.nextafter(middle, -math.inf), middle, math.nextafter(middle, math.inf)):
            below, above = Fraction(x) - Fraction(low), Fraction(high) - Fraction(x)
            tie = high if name == "float8_e8m0fnu" or even[high] else low
            cases.append(x)
            nearest.append(tie if below == above else low if below < above else high)
            truncated.append(low if x > 0 else high)
        assert Fraction(middle) * 2 == Fraction(low) + Fraction(high)
    x = np.array(cases)
    same(round_to(x, name), np.copysign(nearest, x))
    same(round_to(x, name, rounding="truncate"), np.copysign(truncated, x))


@pytest.mark.parametrize("name", SMALL)
def test_rounds_once_where_a_cast_through_float32_rounds_twice(name: str) -> None:
    """A float64 just off a midpoint becomes that midpoint in float32, and then goes to the neighbour that ties prefer."""
    every = finite_numbers(name)
    middle = (every[1:] + every[:-1]) / 2
    x = np.concatenate([np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    once = round_to(x, name)
    np.testing.assert_array_equal(once, np.concatenate([every[:-1], every[1:]]))
    twice = round_to(round_to(x, "float32"), name)
    assert (twice != once).mean() == 0.5
    if name in TORCH:  # whose cast of float64 passes through float32
        usual = x >= 2.0**-126
        np.testing.assert_array_equal(torch.from_numpy(x[usual]).to(TORCH[name]).to(torch.float64), twice[usual])


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_decodes_to_its_value_and_encodes_back(name: str) -> None:
    patterns = every_pattern(name)
    values = decode_bits(patterns, name)
    same(values, np.array(values_of_patterns(name)))
    numbers = ~np.isnan(values)
    assert encode(values[numbers], name).tolist() == patterns[numbers].tolist()
    same(round_to(values[np.isfinite(values)], name), values[np.isfinite(values)])
    assert encode(values[numbers], name).dtype == (np.uint16 if FORMATS[name].bits == 16 else np.uint8)


@pytest.mark.parametrize("name", [n for n in SMALL if n in TORCH])
def test_every_pattern_is_torch_s(name: str) -> None:
    patterns = every_pattern(name)
    integers = torch.from_numpy(patterns.astype(f"i{FORMATS[name].itemsize}"))
    same(decode_bits(patterns, name), integers.view(TORCH[name]).to(torch.float32).to(torch.float64).numpy())


@pytest.mark.parametrize(("name", "integer"), [("float64", np.uint64), ("float32", np.uint32)])
def test_patterns_of_wide_formats_are_numpy_s(name: str, integer: type[np.unsignedinteger]) -> None:
    rng = np.random.default_rng(30)
    bits = rng.integers(0, 2 ** FORMATS[name].bits, 20000, dtype=np.uint64)
    edges = np.array([0, 1, FORMATS[name].largest_pattern], dtype=np.uint64)
    bits = np.concatenate([bits, edges, edges | np.uint64(1 << (FORMATS[name].bits - 1))]).astype(integer)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = bits.view(name).astype(np.float64)
    same(decode_bits(bits, name), numbers)
    assert np.isnan(numbers).any()
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(encode(numbers[finite], name), bits[finite])
    special = np.array([np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(encode(special, name), special.astype(name).view(integer))


def test_four_bit_numbers() -> None:
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    same(decode_bits(np.arange(16), "float4_e2m1fn"), np.array(sizes + [-s for s in sizes]))


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("float16", [0x7C00, 0xFC00, 0x7E00]),
        ("bfloat16", [0x7F80, 0xFF80, 0x7FC0]),
        ("float8_e5m2", [0x7C, 0xFC, 0x7E]),
    ],
)
def test_patterns_of_infinities_and_nan(name: str, patterns: list[int]) -> None:
    assert encode(np.array([math.inf, -math.inf, -math.nan]), name).tolist() == patterns


def test_formats_without_infinities_have_one_nan() -> None:
    assert encode(np.array([math.nan, -math.nan]), "float8_e4m3fn").tolist() == [0x7F, 0x7F]
    assert encode(np.array([math.nan]), "float8_e8m0fnu").tolist() == [0xFF]
    assert np.isnan(decode_bits(np.array([0x7F, 0xFF]), "float8_e4m3fn")).all()


# Overflow.


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


# The largest number, and the last float64 that still rounds to it: a tie with the number that would come next goes to
# the even of the two, which is 448 in e4m3 and the absent one in the others.
EDGES = [
    ("float16", 65504.0, math.nextafter(65520.0, 0)),
    ("bfloat16", float.fromhex("0x1.fep127"), math.nextafter(float.fromhex("0x1.ffp127"), 0)),
    ("float8_e4m3fn", 448.0, 464.0),
    ("float8_e5m2", 57344.0, math.nextafter(61440.0, 0)),
    ("float4_e2m1fn", 6.0, math.nextafter(7.0, 0)),
]


@pytest.mark.parametrize(("name", "largest", "last"), EDGES)
def test_overflow(name: str, largest: float, last: float) -> None:
    fmt = FORMATS[name]
    x = np.array([last, math.nextafter(last, math.inf), 1e300, math.inf])
    x = np.concatenate([x, -x])
    sign = np.copysign(1.0, x)
    offered = {"saturate": largest}
    offered |= {"infinity": math.inf} if fmt.infinities else {}
    offered |= {"nan": math.nan} if fmt.nans else {}
    for overflow, beyond in offered.items():
        want = np.array([largest, beyond, beyond, beyond])
        np.testing.assert_array_equal(round_to(x, name, overflow=overflow), sign * np.tile(want, 2))
        want = np.array([largest, largest, largest, beyond])
        np.testing.assert_array_equal(
            round_to(x, name, rounding="truncate", overflow=overflow), sign * np.tile(want, 2)
        )
    default = {"float8_e4m3fn": "nan", "float4_e2m1fn": "saturate"}.get(name, "infinity")
    np.testing.assert_array_equal(round_to(x, name), round_to(x, name, overflow=default))


def test_float8_e8m0fnu_has_only_positive_numbers() -> None:
    smallest, largest = 2.0**-127, 2.0**127
    got = round_to(np.array([0.0, -0.0, 1e-300, 2.0**-128, smallest, 1.5 * largest, -1.0, -math.inf]), "float8_e8m0fnu")
    np.testing.assert_array_equal(got, [smallest] * 5 + [math.nan] * 3)
    x = np.array([1.25, 1.5, 1.75]) * smallest
    assert round_to(x, "float8_e8m0fnu").tolist() == [smallest, 2 * smallest, 2 * smallest]
    x = np.array([math.nextafter(1.5 * largest, 0), 1.5 * largest, math.inf])
    np.testing.assert_array_equal(round_to(x, "float8_e8m0fnu", overflow="saturate"), [largest] * 3)
    assert round_to(np.array([1.99, 2.0**-130]), "float8_e8m0fnu", rounding="truncate").tolist() == [1.0, smallest]


# Special values.


@pytest.mark.parametrize("name", IEEE)
def test_special_values_pass(name: str) -> None:
    special = np.array([math.nan, math.inf, -math.inf, 0.0, -0.0])
    for rounding in ("nearest", "truncate"):
        same(round_to(special, name, rounding=rounding), special)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", SIGNED)
def test_negative_numbers_keep_their_sign_when_they_round_to_zero(name: str, rounding: str) -> None:
    same(round_to(np.array([-FORMATS[name].smallest_subnormal / 4]), name, rounding=rounding), np.array([-0.0]))


def test_float64_is_copied() -> None:
    x = np.array([1 / 3, 5e-324, 1.7e308])
    got = round_to(x, "float64")
    np.testing.assert_array_equal(got, x)
    got[0] = 0
    assert x[0] == 1 / 3


# Torch and numpy, which round float32 and float64 once.


def test_float32_agrees_with_numpy() -> None:
    rng = np.random.default_rng(21)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(-160, 130, 20000)
    with np.errstate(over="ignore"):
        same(round_to(x, "float32"), x.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize("name", [n for n in SMALL if n in TORCH])
def test_float32_numbers_round_as_in_torch(name: str) -> None:
    """Random float32 patterns, and the midpoints, which are float32 numbers; where torch's format has the value."""
    fmt = FORMATS[name]
    rng = np.random.default_rng(22)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = rng.integers(0, 2**32, 100000, dtype=np.uint64).astype(np.uint32).view(np.float32).astype(np.float64)
    every = finite_numbers(name)
    x = np.concatenate([x, (every[1:] + every[:-1]) / 2])
    if not fmt.infinities:
        x = x[np.abs(x) <= fmt.max_finite]
    if fmt.positive:
        x = x[x >= 2.0**-126]
    same(round_to(x, name), by_torch(x, name))


def test_where_torch_differs_on_float8_e4m3fn() -> None:
    """Beyond 448 torch saturates (2.13) or gives NaN (older versions): never infinity."""
    x = np.array([465.0, 480.0, -1e9, math.inf, -math.inf])
    got = by_torch(x, "float8_e4m3fn")
    answers = [round_to(x, "float8_e4m3fn", overflow=overflow) for overflow in ("saturate", "nan")]
    assert any(np.array_equal(got, answer, equal_nan=True) for answer in answers)


# Bytes in memory.


def test_bytes_are_little_endian_and_the_first_four_bit_number_is_low() -> None:
    x = np.array([[1.0, -2.0]])
    assert to_bytes(x, "float32").tolist() == [[0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]]
    assert to_bytes(x, "bfloat16").tolist() == [[0x80, 0x3F, 0, 0xC0]]
    assert to_bytes(x, "float8_e4m3fn").tolist() == [[0x38, 0xC0]]
    assert to_bytes(x, "float4_e2m1fn").tolist() == [[0xC2]]


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_read_back(name: str) -> None:
    x = round_to(np.abs(np.random.default_rng(23).standard_normal((3, 8))), name)
    raw = to_bytes(x, name)
    assert raw.shape == (3, FORMATS[name].bits)
    np.testing.assert_array_equal(from_bytes(raw, name), x)
    np.testing.assert_array_equal(from_bytes(np.repeat(raw, 2, axis=0)[::2], name), x)


# Constants and refusals.


@pytest.mark.parametrize("name", [n for n in TORCH if n != "float8_e8m0fnu"])
def test_constants_of_a_format(name: str) -> None:
    fmt, info = FORMATS[name], torch.finfo(TORCH[name])
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
        assert np.abs(tie - round_to(tie, name)) == u


def test_four_bit_numbers_have_no_itemsize() -> None:
    with pytest.raises(ValueError, match=r"^a float4_e2m1fn number has 4 bits, not whole bytes$"):
        _ = FORMATS["float4_e2m1fn"].itemsize


def test_unknown_format_is_refused() -> None:
    message = "^" + re.escape(f"unknown number format 'fp8'; known formats are {', '.join(formats.FORMATS)}") + "$"
    for call in (format_of, lambda name: round_to(np.zeros(1), name), lambda name: encode(np.zeros(1), name)):
        with pytest.raises(ValueError, match=message):
            call("fp8")


def test_options_that_a_format_lacks_are_refused() -> None:
    x = np.zeros(1)
    with pytest.raises(ValueError, match=r"^rounding must be one of nearest, truncate, got 'up'$"):
        round_to(x, "bfloat16", rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^overflow of float8_e4m3fn must be one of saturate, nan, got 'infinity'$"):
        round_to(x, "float8_e4m3fn", overflow="infinity")
    with pytest.raises(ValueError, match=r"^overflow of float4_e2m1fn must be one of saturate, got 'nan'$"):
        round_to(x, "float4_e2m1fn", overflow="nan")
    with pytest.raises(ValueError, match=r"^float4_e2m1fn has no NaN$"):
        round_to(np.array([math.nan]), "float4_e2m1fn")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bfloat16", 1 + 2.0**-8),
        ("float16", 65520.0),
        ("float8_e4m3fn", 480.0),
        ("float8_e4m3fn", math.inf),
        ("float8_e8m0fnu", 0.0),
        ("float8_e8m0fnu", -1.0),
        ("float4_e2m1fn", 5.0),
    ],
)
def test_only_numbers_of_the_format_are_encoded(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"is not a number of {name}")):
        encode(np.array([1.0, value]), name)


def test_patterns_and_bytes_that_do_not_fit_are_refused() -> None:
    for bits in ([-1], [16]):
        with pytest.raises(ValueError, match=r"^bit patterns of float4_e2m1fn lie in 0 \.\. 15$"):
            decode_bits(np.array(bits), "float4_e2m1fn")
    with pytest.raises(ValueError, match=r"^an odd count of float4_e2m1fn numbers does not fill whole bytes$"):
        to_bytes(np.zeros(3), "float4_e2m1fn")
    with pytest.raises(ValueError, match=r"^3 bytes do not hold whole bfloat16 numbers$"):
        from_bytes(np.zeros(3, np.uint8), "bfloat16")


@pytest.mark.parametrize("name", FORMATS)
def test_holds_knows_zeros_and_normal_numbers(name: str) -> None:
    """It says yes to no number that rounding changes, and to all normal ones that it leaves."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    x = np.ldexp(rng.uniform(-2, 2, 4000), rng.integers(fmt.min_exponent - 2, fmt.min_exponent + 40, 4000))
    edges = [0.0, -0.0, fmt.smallest_normal, fmt.max_finite, 2 * fmt.max_finite, fmt.smallest_subnormal, np.inf, np.nan]
    beyond = {"overflow": "saturate"} if fmt.nans else {}
    held = round_to(x[np.isfinite(x)], name, **beyond)  # type: ignore[arg-type]
    for each in (*x, *held, *edges):
        normal = each == 0 or fmt.smallest_normal <= abs(each) <= fmt.max_finite
        same = not np.isnan(each) and bool(round_to(np.array(min(abs(each), fmt.max_finite)), name) == abs(each))
        assert holds(np.array([each]), name) == (normal and same and not fmt.positive), each
    normal_ones = held[np.abs(held) >= fmt.smallest_normal]
    assert holds(normal_ones.reshape(-1, 1)[::2], name) == (not fmt.positive)
    assert not holds(np.append(normal_ones, fmt.max_finite * 1.001), name)
