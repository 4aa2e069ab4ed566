"""Block-quantised weights: which scale is whose, and the reference quantiser."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.reference.block_scales import CODE, block_of, dequantise_weight, quantise_weight, scales_shape
from mla_spec.reference.formats import format_of, round_to


def test_each_block_has_its_scale_and_the_last_blocks_are_smaller() -> None:
    codes = np.ones((5, 4))
    scales = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    want = [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4], [3, 3, 3, 4], [5, 5, 5, 6]]
    np.testing.assert_array_equal(dequantise_weight(codes, scales, (2, 3)), want)


def test_kv_a_proj_has_five_blocks_of_rows_and_the_fifth_is_half() -> None:
    assert scales_shape((576, 7168), (128, 128)) == (5, 56)
    weight = dequantise_weight(np.ones((576, 1)), np.arange(5.0)[:, None], (128, 128))
    assert np.bincount(weight[:, 0].astype(int)).tolist() == [128, 128, 128, 128, 64]


@pytest.mark.parametrize("block_size", [(1, 1), (1, 6), (6, 1), (4, 4), (128, 128)])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantised_weights_are_near_and_no_code_saturates(block_size: tuple[int, int], power_of_two: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 9)) * 2.0 ** rng.integers(-20, 20, (6, 1))
    codes, scales = quantise_weight(weight, block_size, power_of_two=power_of_two)
    assert scales.shape == scales_shape((6, 9), block_size)
    np.testing.assert_array_equal(round_to(codes, CODE), codes)
    np.testing.assert_array_equal(round_to(scales, "float32"), scales)
    assert not power_of_two or (np.frexp(scales)[0] == 0.5).all()
    # the least scale of the kind: the largest code of each block is 448, or at least half of it
    largest = np.zeros(scales.shape)
    np.maximum.at(largest, block_of((6, 9), block_size), np.abs(codes))
    assert (largest >= 224).all() if power_of_two else (largest == 448).all()
    got = dequantise_weight(codes, scales, block_size)
    fmt = format_of(CODE)
    own = dequantise_weight(np.ones_like(codes), scales, block_size)
    # half an ulp of the code, and what rounding the scale to float32 may have taken from the largest
    lost = np.maximum(fmt.unit_roundoff * np.abs(weight), own * fmt.smallest_subnormal / 2)
    assert (np.abs(got - weight) <= lost * (1 + 2.0**-20)).all()


def test_a_block_of_zeros_is_zeros() -> None:
    codes, scales = quantise_weight(np.zeros((3, 3)), (2, 2))
    assert not codes.any()
    assert (scales == 1).all()


def test_scales_are_powers_of_two_only_where_asked_for() -> None:
    assert quantise_weight(np.full((1, 1), 672.0), (1, 1))[1] == 1.5
    assert quantise_weight(np.full((1, 1), 672.0), (1, 1), power_of_two=True)[1] == 2.0


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a weight \[576, 4\] in blocks of \(128, 128\) has scales \[5, 1\], got \[4, 1\]"
    ):
        dequantise_weight(np.ones((576, 4)), np.ones((4, 1)), (128, 128))
