"""Cases of block-quantised weights are plain data, and hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.bounds.profile import Profile
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase
from mla_spec.properties.strategies.dequantize_weight import quantised_layer_cases, weight_cases
from mla_spec.reference.block_scales import CODE, dequantise_weight
from mla_spec.reference.formats import format_of, round_to
from mla_spec.subjects.supports import DTYPES, Supports

ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (weight_cases, quantised_layer_cases)
)


@given(ANY_CASE)
@settings(max_examples=60, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_stay_in_the_range_of_the_dtype(dtype: str) -> None:
    inputs = WeightCase(dtype=dtype, rows=300, columns=40, block_rows=4, block_columns=4).build()
    np.testing.assert_array_equal(round_to(inputs.codes, CODE), inputs.codes)
    np.testing.assert_array_equal(round_to(inputs.scales, "float32"), inputs.scales)
    assert np.abs(inputs.weight).max() <= format_of(dtype).max_finite
    assert len(np.unique(np.abs(inputs.codes))) == 127  # every finite code
    assert (np.signbit(inputs.codes) & (inputs.codes == 0)).any()
    assert len(np.unique(inputs.scales)) > inputs.scales.size / 2


@given(st.one_of(quantised_layer_cases(Supports(), Profile.default(dtype)) for dtype in DTYPES))
@settings(max_examples=60, deadline=None)
def test_the_dtype_holds_the_weights_of_a_quantised_layer(case: QuantisedLayerCase) -> None:
    inputs = case.build_quantised()
    assert set(inputs.layer.weights) == set(case.build().weights)
    for name, each in inputs.quantised.items():
        np.testing.assert_array_equal(dequantise_weight(each.codes, each.scales, each.block_size), each.weight)
        np.testing.assert_array_equal(inputs.layer.weights[name], each.weight)
        np.testing.assert_array_equal(round_to(each.weight, case.dtype), each.weight)
        assert each.weight.any()
    assert {name for name, w in inputs.layer.weights.items() if w.ndim == 2} == set(inputs.quantised)


def test_supported_block_sizes_are_drawn_alone() -> None:
    supports, profile = Supports(weight_block_sizes=((128, 128),)), Profile.default("bfloat16")

    @given(weight_cases(supports, profile), quantised_layer_cases(supports, profile))
    @settings(max_examples=30, deadline=None)
    def drawn(weight: WeightCase, layer: QuantisedLayerCase) -> None:
        assert weight.block_size == (128, 128) == (layer.block_rows, layer.block_columns)

    drawn()
