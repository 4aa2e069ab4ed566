"""Rotary embedding, against ball arithmetic."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from mla_spec.reference.config import LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.rope import (
    MAX_POSITION,
    apply_rope,
    half_from_interleaved,
    join_pairs,
    rope_cos_sin,
    rope_frequencies,
    split_pairs,
)

flint = pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

YARN = YarnScaling(factor=40, original_max_position_embeddings=4096)
LONGROPE = LongRopeScaling(
    short_factor=(1.0, 1.1, 1.3), long_factor=(1.2, 3.0, 31.7), original_max_position_embeddings=4096
)
ROPES = {
    "plain": RopeConfig(dim=64),
    "theta 8e7": RopeConfig(dim=64, theta=8e7),
    "theta not an integer": RopeConfig(dim=6, theta=1.7),
    "DeepSeek-V3": RopeConfig(dim=64, yarn=YARN),
    "Kimi-K2": RopeConfig(
        dim=64,
        theta=50000,
        yarn=YarnScaling(factor=32, original_max_position_embeddings=4096, beta_fast=1.0),
    ),
    "fractional range": RopeConfig(
        dim=64, yarn=YarnScaling(factor=36, original_max_position_embeddings=8192, truncate=False)
    ),
    "guarded": RopeConfig(dim=8, yarn=YarnScaling(factor=4, original_max_position_embeddings=4, ramp_guard=0.001)),
    "LongRoPE, short": RopeConfig(dim=6, longrope=LONGROPE, max_position_embeddings=4096),
    "LongRoPE, long": RopeConfig(dim=6, longrope=LONGROPE, max_position_embeddings=4097),
    "inactive YaRN": RopeConfig(
        dim=64,
        max_position_embeddings=4096,
        yarn=YarnScaling(factor=40, original_max_position_embeddings=4096, applies="beyond_original"),
    ),
}

# Powers of two and their neighbours, DeepSeek-V3's last position, and large ones without structure.
POSITIONS = np.array(
    [
        *(0, 1, 2, 7, 4095, 4096, 65537, 163839, 777777, 2**20 - 1, 2**20, 12345678, 2**25 + 1, 2**26 - 1),
        *np.random.default_rng(0).integers(2**25, 2**26, 50),
    ]
)

COS_SIN_ERROR = 1.2e-16
"""What ``rope_cos_sin`` promises: one rounding, 2^-53, and 8 % of margin.

The angle carries twice the precision and costs nothing. A cos of magnitude at most 1 from a good libm errs by little more
than 2^-54, the product with the low part of the angle is below 2^-53 before its own rounding, and adding it rounds once
more by 2^-54. One double for the angle would cost 2^-27 at position 2^26.
"""


@pytest.fixture(autouse=True)
def _precise():
    kept = flint.ctx.prec
    flint.ctx.prec = 200
    yield
    flint.ctx.prec = kept


def exact_frequencies(rope: RopeConfig) -> list:
    """theta^(-2i/r) and YaRN's blend (DeepSeek-V3 inference/model.py), in ball arithmetic."""
    arb = flint.arb
    plain = [arb(rope.theta) ** (arb(-2 * i) / rope.dim) for i in range(rope.dim // 2)]
    if rope.longrope is not None:
        beyond = rope.max_position_embeddings > rope.longrope.original_max_position_embeddings
        divisors = rope.longrope.long_factor if beyond else rope.longrope.short_factor
        return [frequency / arb(divisor) for frequency, divisor in zip(plain, divisors, strict=True)]
    yarn = rope.active_yarn
    if yarn is None:
        return plain

    def pair_index(rotations: float) -> flint.arb:
        wavelength = yarn.original_max_position_embeddings / (2 * arb.pi() * rotations)
        return rope.dim * wavelength.log() / (2 * arb(rope.theta).log())

    low, high = pair_index(yarn.beta_fast), pair_index(yarn.beta_slow)
    if yarn.truncate:
        low, high = low.floor(), high.ceil()
    low, high = max(low, arb(0)), min(high, arb(rope.dim - 1))
    if yarn.truncate and low == high:
        high += arb(yarn.ramp_guard)
    blended = []
    for i, frequency in enumerate(plain):
        ramp = (i - low) / (high - low)
        ramp = arb(0) if ramp < 0 else arb(1) if ramp > 1 else ramp
        blended.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return blended


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_correctly_rounded(name: str) -> None:
    rope = ROPES[name]
    for got, exact in zip(rope_frequencies(rope), exact_frequencies(rope), strict=True):
        error = abs(flint.arb(float(got)) - exact)
        assert error < flint.arb(math.ulp(float(got))) * 0.5000001  # half an ulp, and the radius of the ball


@pytest.mark.parametrize("name", ROPES)
def test_cos_and_sin_carry_one_rounding_at_any_position(name: str) -> None:
    rope = ROPES[name]
    cos, sin = rope_cos_sin(POSITIONS, rope)
    worst = 0.0
    for i, frequency in enumerate(exact_frequencies(rope)):
        for j, position in enumerate(POSITIONS):
            s, c = (frequency * int(position)).sin_cos()
            worst = max(worst, float(abs(c - float(cos[j, i])).mid()), float(abs(s - float(sin[j, i])).mid()))
    assert worst <= COS_SIN_ERROR


def test_cos_and_sin_of_negative_positions() -> None:
    cos, sin = rope_cos_sin(POSITIONS, ROPES["DeepSeek-V3"])
    cos_back, sin_back = rope_cos_sin(-POSITIONS, ROPES["DeepSeek-V3"])
    assert np.abs(cos - cos_back).max() <= 2 * COS_SIN_ERROR
    assert np.abs(sin + sin_back).max() <= 2 * COS_SIN_ERROR


def test_cos_and_sin_at_position_0_are_exact() -> None:
    cos, sin = rope_cos_sin(np.zeros((2, 3), dtype=np.int32), ROPES["plain"])
    assert cos.shape == sin.shape == (2, 3, 32)
    assert (cos == 1).all()
    assert (sin == 0).all()


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones() -> None:
    plain, scaled = rope_frequencies(ROPES["plain"]), rope_frequencies(ROPES["DeepSeek-V3"])
    np.testing.assert_array_equal(scaled[:11], plain[:11])
    # Both sides are roundings of one exact number or of 40 times it.
    np.testing.assert_allclose(scaled[23:] * 40, plain[23:], rtol=2**-51)
    assert (scaled[11:23] < plain[11:23]).all()
    assert (scaled[11:23] > plain[11:23] / 40).all()
    np.testing.assert_array_equal(rope_frequencies(ROPES["inactive YaRN"]), plain)


@pytest.mark.parametrize("interleaved", [True, False])
def test_split_and_join_are_inverse(interleaved: bool) -> None:
    x = np.arange(24.0).reshape(2, 12)
    first, second = split_pairs(x, interleaved)
    np.testing.assert_array_equal(join_pairs(first, second, interleaved), x)
    assert (second - first == (1 if interleaved else 6)).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_unit_vectors(interleaved: bool) -> None:
    """The first member of a pair goes to (cos, sin), the second to (-sin, cos): counter-clockwise."""
    rope = RopeConfig(dim=6, interleaved=interleaved)
    cos, sin = rope_cos_sin(np.array(5), rope)
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for i, (first, second) in enumerate(pairs):
        rotated = apply_rope(np.eye(6), np.full(6, 5), rope)
        expected = np.zeros((2, 6))
        expected[0, [first, second]] = cos[i], sin[i]
        expected[1, [first, second]] = -sin[i], cos[i]
        np.testing.assert_array_equal(rotated[[first, second]], expected)


def test_rotation_commutes_with_the_change_of_layout() -> None:
    rng = np.random.default_rng(1)
    x, positions = rng.standard_normal((5, 64)), rng.integers(0, 2**20, 5)
    to_half = half_from_interleaved(64)
    assert to_half[:3].tolist() == [0, 2, 4]
    assert to_half[32:35].tolist() == [1, 3, 5]
    half = apply_rope(x[:, to_half], positions, RopeConfig(dim=64, yarn=YARN, interleaved=False))
    interleaved = apply_rope(x, positions, RopeConfig(dim=64, yarn=YARN, interleaved=True))
    # The same operations on the same numbers, in other places: no rounding differs.
    np.testing.assert_array_equal(half, interleaved[:, to_half])
    np.testing.assert_array_equal(half[:, np.argsort(to_half)], interleaved)


def test_products_depend_on_relative_position_only() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 50, 64))
    m = rng.integers(0, 2**20, 50)
    n = rng.integers(0, 2**20, 50)
    shift = rng.integers(-(2**20), 2**24, 50)
    rope = ROPES["DeepSeek-V3"]

    def product(by: np.ndarray) -> np.ndarray:
        return (apply_rope(q, m + by, rope) * apply_rope(k, n + by, rope)).sum(-1)

    # Per element of a rotated vector 4 roundings of |first| + |second| (as rope_bound states it), and 64 of the sum.
    pair_sums = [np.add(*split_pairs(np.abs(x), True)) for x in (q, k)]
    gauge = 2 * (pair_sums[0] * pair_sums[1]).sum(-1)
    bound = 2 * (4 + 4 + 64) * 2.0**-53 * gauge
    assert (np.abs(product(shift) - product(0 * shift)) <= bound).all()


@pytest.mark.parametrize("name", ROPES)
def test_rotation_keeps_the_length_times_the_factor(name: str) -> None:
    rope = ROPES[name]
    x = np.random.default_rng(3).standard_normal((len(POSITIONS), rope.dim))
    first, second = split_pairs(x, True)
    out_first, out_second = split_pairs(apply_rope(x, POSITIONS, rope), True)
    expected = np.hypot(first, second) * rope.cos_sin_factor
    # 4 roundings of |first| + |second| ≤ √2 of the length in each element, and those of hypot.
    assert (np.abs(np.hypot(out_first, out_second) - expected) <= 10 * 2.0**-53 * expected).all()


def test_factor_on_cos_and_sin_multiplies_the_result() -> None:
    x = np.random.default_rng(4).standard_normal((3, 64))
    positions = np.array([1, 100, 10000])
    with_factor = RopeConfig(
        dim=64, yarn=YarnScaling(factor=40, original_max_position_embeddings=4096, attention_factor=0.5)
    )
    # Powers of two multiply without rounding.
    np.testing.assert_array_equal(
        apply_rope(x, positions, with_factor), apply_rope(x, positions, ROPES["DeepSeek-V3"]) * 0.5
    )


def test_heads_share_the_position() -> None:
    rng = np.random.default_rng(5)
    x, positions = rng.standard_normal((2, 3, 5, 64)), rng.integers(0, 1000, (2, 3))
    rope = ROPES["DeepSeek-V3"]
    per_head = np.stack([apply_rope(x[:, :, head], positions, rope) for head in range(5)], axis=2)
    np.testing.assert_array_equal(apply_rope(x, positions, rope), per_head)


def test_one_position_for_one_row_and_for_its_heads() -> None:
    x = np.random.default_rng(6).standard_normal((4, 64))
    rope = ROPES["plain"]
    row = apply_rope(x[0], np.array(9), rope)
    assert row.shape == (64,)
    np.testing.assert_array_equal(apply_rope(x, np.array(9), rope)[0], row)
    np.testing.assert_array_equal(apply_rope(x, np.full(4, 9), rope)[0], row)


def test_no_positions_give_no_rows() -> None:
    assert apply_rope(np.zeros((0, 64)), np.zeros(0, dtype=int), ROPES["plain"]).shape == (0, 64)


def test_float32_inputs_are_rotated_in_float64() -> None:
    x = np.random.default_rng(7).standard_normal((3, 64)).astype(np.float32)
    positions = np.array([3, 1000, 163839])
    got = apply_rope(x, positions, ROPES["plain"])
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, apply_rope(x.astype(np.float64), positions, ROPES["plain"]))


def test_positions_must_be_integers() -> None:
    with pytest.raises(ValueError, match=r"^positions must be integers, got dtype float64$"):
        rope_cos_sin(np.array([1.0]), ROPES["plain"])
    with pytest.raises(ValueError, match=r"^positions must be integers, got dtype bool$"):
        apply_rope(np.zeros((1, 64)), np.array([True]), ROPES["plain"])


@pytest.mark.parametrize("position", [2**26, -(2**26), 2**40])
def test_positions_too_large_are_refused(position: int) -> None:
    message = f"positions must be below {2**26}, got {abs(position)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rope_cos_sin(np.array([0, position]), ROPES["plain"])
    assert MAX_POSITION == 2**26


@pytest.mark.parametrize(
    ("shape", "positions"), [((3, 62), (3,)), ((3, 64), (4,)), ((3, 2, 2, 64), (3,)), ((64,), (1,)), ((), ())]
)
def test_shapes_must_match(shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    message = (
        "x must have shape positions.shape + (64,) or positions.shape + (heads, 64) "
        f"with positions.shape {positions}, got {shape}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_rope(np.zeros(shape), np.zeros(positions, dtype=int), ROPES["plain"])


def test_frequencies_of_published_models_fall_from_1() -> None:
    for name in ("DeepSeek-V3", "Kimi-K2 (0711)", "GLM-5.2 / 5.3"):
        rope = MLAConfig.published(name).rope
        assert rope is not None
        frequencies = rope_frequencies(rope)
        assert frequencies[0] == 1.0
        assert (np.diff(frequencies) < 0).all()
