"""The worst-case bound of the rotary embedding: model code in float32 stays within it, and wrong code does not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mla_spec.reference.config import LongRopeScaling, RopeConfig, YarnScaling
from mla_spec.reference.formats import round_to
from mla_spec.reference.profile import Profile, RopeProfile
from mla_spec.reference.rope import apply_rope, rope_cos_sin, rope_frequencies
from mla_spec.reference.rope_bound import angle_error, rope_with_bound
from tests.reference.emulated_rope import float32_frequencies, float32_rope

V3_YARN = YarnScaling(factor=40, original_max_position_embeddings=4096)
ROPES = {
    "plain": RopeConfig(dim=64),
    "plain, half": RopeConfig(dim=64, interleaved=False),
    "theta 5e5": RopeConfig(dim=64, theta=5e5),
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
