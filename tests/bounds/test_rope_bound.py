"""The worst-case bound of the rotary embedding: written out, model code in float32 stays within it, wrong code does not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mla_spec.bounds.profile import Profile, RopeProfile
from mla_spec.bounds.rope import angle_error, rope_backward_with_bound, rope_with_bound
from mla_spec.reference.config import LongRopeScaling, RopeConfig, YarnScaling
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.rope import apply_rope, rope_backward, rope_cos_sin, rope_frequencies
from tests.bounds.bound_terms import (
    U64,
    UNIT_ROUNDOFF,
    assert_terms,
    gamma,
    half_ulp,
)
from tests.bounds.emulated_rope import float32_frequencies, float32_rope

V3_YARN = YarnScaling(factor=40, original_max_position_embeddings=4096)
ROPES = {
    "plain": RopeConfig(dim=64),
    "plain, half": RopeConfig(dim=64, interleaved=False),
    "theta 5e5": RopeConfig(dim=64, theta=5e5),
    "theta 8e7": RopeConfig(dim=64, theta=8e7),
    "YaRN": RopeConfig(dim=64, yarn=V3_YARN),
    "YaRN, half, with a factor": RopeConfig(
        dim=64, interleaved=False, yarn=replace(V3_YARN, mscale=1.0, mscale_all_dim=0.0)
    ),
    # A long ramp and a large factor: near its end, all but the rounding of the fast frequency cancels.
    "YaRN, wide": RopeConfig(
        dim=512, yarn=YarnScaling(factor=2048, original_max_position_embeddings=32768, beta_fast=4096)
    ),
    # Factors that float32 does not hold.
    "LongRoPE": RopeConfig(
        dim=64,
        longrope=LongRopeScaling(
            short_factor=(1.0,) * 32,
            long_factor=tuple(1.1 + 1.7 * i for i in range(32)),
            original_max_position_embeddings=4096,
        ),
        max_position_embeddings=163840,
    ),
    "YaRN, fractional range": RopeConfig(dim=64, yarn=replace(V3_YARN, truncate=False)),
}
ROPE_POSITIONS = np.array([0, 1, 5, 100, 4095, 4096, 65537, 131071, 163839, 163840])


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ROPES)
def test_float32_rope_stays_within_the_bound(name: str, output: str) -> None:
    rope = ROPES[name]
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((len(ROPE_POSITIONS), 3, rope.dim))
        x = round_to(x * np.exp(np.random.default_rng(seed).standard_normal(x.shape) * 2), output)
        for table in ("float32", output):
            expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(table=table), output=output)
            np.testing.assert_array_equal(expected, apply_rope(x, ROPE_POSITIONS, rope))
            error = np.abs(float32_rope(x, ROPE_POSITIONS, rope, output, table) - expected)
            assert (error <= bound.total).all(), (seed, table, float((error / bound.total).max()))


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("name", ROPES)
def test_position_off_by_one_exceeds_the_bound(name: str, shift: int) -> None:
    """In every row, up to the last position of DeepSeek-V3: slow pairs have small errors at any position."""
    rope = ROPES[name]
    x = round_to(np.random.default_rng(1).standard_normal((len(ROPE_POSITIONS), 3, rope.dim)), "float32")
    expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(), output="float32")
    error = np.abs(float32_rope(x, ROPE_POSITIONS + shift, rope, "float32") - expected)
    assert (error > bound.total).any(axis=(1, 2)).all()


def test_rope_in_the_other_layout_or_without_its_factor_exceeds_the_bound() -> None:
    rope = ROPES["YaRN, half, with a factor"]
    x = round_to(np.random.default_rng(2).standard_normal((len(ROPE_POSITIONS), 3, 64)), "bfloat16")
    expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(), output="bfloat16")
    assert rope.yarn is not None
    other_layout, no_factor = (
        replace(rope, interleaved=True),
        replace(rope, yarn=replace(rope.yarn, attention_factor=1.0)),
    )
    for wrong in (other_layout, no_factor, replace(rope, yarn=None)):
        error = np.abs(float32_rope(x, ROPE_POSITIONS, wrong, "bfloat16") - expected)
        assert (error > bound.total).any(), wrong


def test_table_in_bfloat16_must_be_declared() -> None:
    rope = ROPES["plain"]
    x = round_to(np.random.default_rng(3).standard_normal((len(ROPE_POSITIONS), 3, 64)), "float32")
    got = float32_rope(x, ROPE_POSITIONS, rope, "float32", table="bfloat16")
    within = []
    for table in ("float32", "bfloat16"):
        expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(table=table), output="float32")
        within.append((np.abs(got - expected) <= bound.total).all())
    assert within == [False, True]


def test_rotation_in_bfloat16_must_be_declared() -> None:
    rope = ROPES["plain"]
    x = round_to(np.random.default_rng(3).standard_normal((len(ROPE_POSITIONS), 50, 64)), "bfloat16")
    got = float32_rope(x, ROPE_POSITIONS, rope, "bfloat16", rotation="bfloat16")
    within = []
    for rotation in ("float32", "bfloat16"):
        expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(rotation=rotation), output="bfloat16")
        within.append((np.abs(got - expected) <= bound.total).all())
    assert within == [False, True]


def test_error_of_the_rotated_operand_is_carried() -> None:
    """Moved by its whole error, in the direction that moves each element most."""
    rope = replace(ROPES["YaRN, half, with a factor"], interleaved=True)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((len(ROPE_POSITIONS), 64))
    x_error = np.abs(x) * rng.uniform(0, 1e-3, x.shape)
    profile = Profile.default("float64").rope
    expected, bound = rope_with_bound(x, ROPE_POSITIONS, rope, profile, output="float64", x_error=x_error)
    worst = np.zeros_like(x)
    for element in range(64):
        partner = element ^ 1
        for signs in itertools.product((1, -1), repeat=2):
            moved = x.copy()
            moved[:, element] += signs[0] * x_error[:, element]
            moved[:, partner] += signs[1] * x_error[:, partner]
            error = np.abs(apply_rope(moved, ROPE_POSITIONS, rope) - expected)[:, element]
            worst[:, element] = np.maximum(worst[:, element], error)
    assert (worst <= bound.total).all()
    assert (worst >= bound.total / 2).all()  # one rotation and its factor, nothing more


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_in_float32_stay_within_the_bound(name: str) -> None:
    """The angle at position 1, where nothing else is rounded."""
    rope = ROPES[name]
    error = np.abs(float32_frequencies(rope).astype(float) - rope_frequencies(rope))
    assert (error <= angle_error(np.array(1), rope, RopeProfile())).all()


@pytest.mark.parametrize("dim", [2, 4, 24, 64, 192])
def test_frequencies_as_exponentials_stay_within_the_bound(dim: int) -> None:
    """exp(-ln(theta) · 2i/r) in float32, every step of it rounded; one rounding of the exponent would not cover it."""
    rope = RopeConfig(dim=dim, theta=8e7)
    pair, exact = np.arange(dim // 2, dtype=np.float32), rope_frequencies(rope)
    exponent = -np.float32(math.log(8e7)) * (pair * np.float32(2) / np.float32(dim))
    error = np.abs(np.exp(exponent).astype(float) - exact)
    assert (error <= angle_error(np.array(1), rope, RopeProfile())).all()
    if dim == 192:
        once = 2.0**-24 * (math.log(8e7) * np.arange(dim // 2) * 2 / dim + 1) * exact
        assert (error > once).any()


@pytest.mark.parametrize("name", ROPES)
def test_angles_at_their_largest_error_stay_within_the_bound(name: str) -> None:
    """Unit vectors turned too far: the bound is attained within a factor of two where the result moves fastest."""
    rope = ROPES[name]
    delta = angle_error(ROPE_POSITIONS, rope, RopeProfile())  # [s, r/2]
    far = ROPE_POSITIONS > 4000  # where the angle dominates
    cos, sin = rope_cos_sin(ROPE_POSITIONS, rope)
    x = np.zeros((len(ROPE_POSITIONS), 2, rope.dim))
    first = np.arange(0, rope.dim, 2) if rope.interleaved else np.arange(rope.dim // 2)
    second = first + (1 if rope.interleaved else rope.dim // 2)
    x[:, 0, first], x[:, 1, second] = 1.0, 1.0
    _, bound = rope_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(), output="float32")
    total = bound.total
    for direction in (1, -1):
        turn_cos, turn_sin = np.cos(delta), direction * np.sin(delta)
        moved_cos = np.abs(cos * turn_cos - sin * turn_sin - cos) * rope.cos_sin_factor
        moved_sin = np.abs(sin * turn_cos + cos * turn_sin - sin) * rope.cos_sin_factor
        for row, (of_first, of_second) in enumerate([(moved_cos, moved_sin), (moved_sin, moved_cos)]):
            assert (of_first <= total[:, row, first]).all()
            assert (of_second <= total[:, row, second]).all()
            largest = np.maximum(of_first, of_second)[far]
            assert (2 * largest >= total[far, row][:, first]).any(axis=-1).all()


def test_angle_of_frequency_one_is_exact_where_the_position_is() -> None:
    error = angle_error(np.array([0, 1, 2**24, 2**24 + 1]), ROPES["plain"], RopeProfile())
    assert (error[0] == 0).all()
    assert (error[:3, 0] == 0).all()
    assert error[3, 0] == 2.0**-24 * (2**24 + 1)
    assert (error[1, 1:] > 0).all()


WRITTEN_OUT = {
    "plain": RopeConfig(dim=6, interleaved=False),
    # A ramp from pair 2 to pair 5 of 8, and a factor on cos and sin.
    "YaRN": RopeConfig(
        dim=16, theta=100.0, yarn=YarnScaling(factor=4, original_max_position_embeddings=100, beta_fast=5, mscale=2.0)
    ),
    "LongRoPE": RopeConfig(
        dim=6,
        longrope=LongRopeScaling(
            short_factor=(1.0, 1.0, 1.0), long_factor=(1.0, 1.3, 7.0), original_max_position_embeddings=64
        ),
        max_position_embeddings=1024,
    ),
}
ROPE_PROFILES = {
    "float32": RopeProfile(),
    "float64": Profile.default("float64").rope,
    "table in bfloat16": RopeProfile(table="bfloat16"),
    "all different": RopeProfile(frequency="float16", angle="bfloat16", table="float32", rotation="float16"),
}


def written_angle_error(position: int, pair: int, rope: RopeConfig, profile: RopeProfile) -> float:
    """Of one angle, from docs/bounds.md."""
    frequency, fast = float(rope_frequencies(rope)[pair]), rope.theta ** (-2 * pair / rope.dim)
    u, u_angle = UNIT_ROUNDOFF[profile.frequency], UNIT_ROUNDOFF[profile.angle]
    error = 0.0
    if frequency != 1:
        exponent = Fraction(2 * pair, rope.dim)
        power_of_two = exponent.denominator & (exponent.denominator - 1) == 0
        stored = power_of_two and exponent.numerator.bit_length() <= FORMATS[profile.frequency].precision
        amplified = math.log(rope.theta) * 2 * pair / rope.dim * (2 if stored else 3)
        error = u * (amplified + (8 if rope.longrope is None else 10)) * frequency
    if rope.yarn is not None:
        low, high = rope.yarn_correction_range()
        error += 4 * u * fast if low < pair < high else 0.0
    held = position.bit_length() - (position & -position).bit_length() < FORMATS[profile.angle].precision
    product, rounded_position = 0 if frequency == 1 else u_angle, 0 if held else u_angle
    relative = product + rounded_position + product * rounded_position
    return position * (error + relative * (frequency + error))


@pytest.mark.parametrize("profile", ROPE_PROFILES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_error_of_an_angle_is_the_one_written_out(name: str, profile: str) -> None:
    rope, formats = WRITTEN_OUT[name], ROPE_PROFILES[profile]
    if rope.yarn is not None:
        assert rope.yarn_correction_range() == (2.0, 5.0)
    positions = np.array([[0, 1, 256], [257, 2**24, 2**24 + 1]])
    got = angle_error(positions, rope, formats)
    for i in np.ndindex(2, 3):
        want = [written_angle_error(int(positions[i]), pair, rope, formats) for pair in range(rope.dim // 2)]
        # sums and products of numbers of one sign, with fewer than 32 roundings on either side
        np.testing.assert_allclose(got[i], want, rtol=gamma(32, U64), atol=0)


def written_rotation(
    x: tuple[float, float],
    e: tuple[float, float],
    cos_sin: tuple[float, float],
    delta: float,
    factor: float,
    profile: RopeProfile,
    output: str,
) -> dict[str, tuple[float, float]]:
    """The contributions to the error of both numbers of one rotated pair x, whose own errors are e."""
    u, u_angle = UNIT_ROUNDOFF[profile.rotation], UNIT_ROUNDOFF[profile.angle]
    cos, sin = cos_sin
    turned = min(delta, 2.0) * factor  # what an angle that is off by delta does to a cos or sin
    of_cos, of_sin = (abs(c) * factor + turned for c in cos_sin)
    table_cos, table_sin = (3 * u_angle * c + half_ulp(c, profile.table) for c in (of_cos, of_sin))
    a, b = abs(x[0]) + e[0], abs(x[1]) + e[1]

    def rotated(first: float, second: float, of_cos: float, of_sin: float) -> tuple[float, float]:
        return first * of_cos + second * of_sin, first * of_sin + second * of_cos

    most_cos, most_sin = of_cos + table_cos, of_sin + table_sin
    angle, table = rotated(a, b, turned, turned), rotated(a, b, table_cos, table_sin)
    carried, size = rotated(*e, most_cos, most_sin), rotated(a, b, most_cos, most_sin)
    exact = (x[0] * cos - x[1] * sin) * factor, (x[0] * sin + x[1] * cos) * factor
    roundings = size[0] * (2 * u + u**2), size[1] * (2 * u + u**2)  # a product and a sum
    stored = []
    for i in range(2):
        error = angle[i] + table[i] + carried[i] + roundings[i]
        least = max(FORMATS[output].smallest_subnormal, FORMATS[profile.rotation].smallest_subnormal)
        stored.append(least + (half_ulp(abs(exact[i]) + error, output) if output != profile.rotation else 0.0))
    own = 4 * U64 * (abs(x[0]) + abs(x[1])) * factor
    return {
        f"frequency and angle in {profile.frequency} and {profile.angle}": angle,
        f"cos and sin table in {profile.table}": table,
        "error of the operand": carried,
        f"rotation in {profile.rotation}": roundings,
        f"rounding to {output}": (stored[0], stored[1]),
        "the reference's own float64": (own, own),
    }


@pytest.mark.parametrize("output", ["float16", "float32"])
@pytest.mark.parametrize("inherited", [True, False], ids=["operand with an error", "exact operand"])
@pytest.mark.parametrize("profile", ROPE_PROFILES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_bound_is_the_one_written_out(name: str, profile: str, inherited: bool, output: str) -> None:
    rope, formats = WRITTEN_OUT[name], ROPE_PROFILES[profile]
    rng, positions = np.random.default_rng(6), np.array([0, 700, 70001])
    x = rng.standard_normal((3, 2, rope.dim))  # two heads
    x_error = rng.uniform(0, 0.1, x.shape) * inherited
    out, bound = rope_with_bound(x, positions, rope, formats, output=output, x_error=x_error if inherited else None)
    np.testing.assert_array_equal(out, apply_rope(x, positions, rope))
    for head in range(2):  # shared by heads, or with heads of their own
        _, alone = rope_with_bound(x[:, head], positions, rope, formats, output=output, x_error=x_error[:, head])
        assert_terms(alone, ..., bound[:, head].terms)
    cos, sin = rope_cos_sin(positions, rope)
    for i, head, pair in np.ndindex(3, 2, rope.dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.dim // 2)
        at = (i, head, [first, second])
        terms = written_rotation(
            (x[i, head, first], x[i, head, second]),
            (x_error[i, head, first], x_error[i, head, second]),
            (float(cos[i, pair]), float(sin[i, pair])),
            written_angle_error(int(positions[i]), pair, rope, formats),
            rope.cos_sin_factor,
            formats,
            output,
        )
        assert_terms(bound, at, terms)


def test_the_output_is_rounded_at_the_largest_size_that_it_may_have() -> None:
    """Just below 1, beyond which the rounding of the rotation may take it."""
    x, profile = np.zeros((1, 6)), RopeProfile(rotation="float16")
    x[0, 0] = 1 - 2.0**-12
    _, bound = rope_with_bound(x, np.array([0]), WRITTEN_OUT["plain"], profile, output="bfloat16")
    assert bound.terms["rounding to bfloat16"][0, 0] == 2.0**-8 + FORMATS["float16"].smallest_subnormal


@pytest.mark.parametrize("output", ["float16", "float32"])
@pytest.mark.parametrize("profile", ROPE_PROFILES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_bound_of_the_gradient_is_the_one_written_out(name: str, profile: str, output: str) -> None:
    """A pair of the gradient is g_1 cos + g_2 sin and g_2 cos − g_1 sin, with the table of the rotation."""
    rope, formats = WRITTEN_OUT[name], ROPE_PROFILES[profile]
    positions = np.array([0, 700, 70001])
    out_grad = np.random.default_rng(8).standard_normal((3, 2, rope.dim))
    gradient, bound = rope_backward_with_bound(out_grad, positions, rope, formats, output=output)
    np.testing.assert_array_equal(gradient, rope_backward(out_grad, positions, rope))
    cos, sin = rope_cos_sin(positions, rope)
    for i, head, pair in np.ndindex(3, 2, rope.dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.dim // 2)
        terms = written_rotation(
            (out_grad[i, head, first], out_grad[i, head, second]),
            (0.0, 0.0),
            (float(cos[i, pair]), -float(sin[i, pair])),
            written_angle_error(int(positions[i]), pair, rope, formats),
            rope.cos_sin_factor,
            formats,
            output,
        )
        assert_terms(bound, (i, head, [first, second]), terms)


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ROPES)
def test_the_gradient_of_float32_rope_stays_within_the_bound(name: str, output: str) -> None:
    """Rotated by the table of negative positions; turned forward again, or by other positions, it does not."""
    rope = ROPES[name]
    x = round_to(np.random.default_rng(9).standard_normal((len(ROPE_POSITIONS), 3, rope.dim)), output)
    expected, bound = rope_backward_with_bound(x, ROPE_POSITIONS, rope, RopeProfile(), output=output)
    assert (np.abs(float32_rope(x, -ROPE_POSITIONS, rope, output) - expected) <= bound.total).all()
    wrong = np.abs(float32_rope(x, ROPE_POSITIONS, rope, output) - expected) > bound.total
    assert wrong[1:].any(axis=(1, 2)).all()
