"""Hypothesis strategies of block-quantised weights."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase
from mla_spec.properties.strategies.layer import layer_cases
from mla_spec.properties.strategies.sizes import SEEDS
from mla_spec.subjects.supports import Supports

BLOCK_SIZES = ((128, 128), (4, 4), (3, 5), (8, 2), (1, 16), (16, 1), (1, 1))
"""The published one, unequal ones, and scales per group of a row or a column, or per element."""

SMALL_BLOCK_SIZES = ((4, 4), (3, 5), (2, 1), (1, 4))


def _lengths(block: int) -> SearchStrategy[int]:
    """Around whole blocks, and less than one."""
    around = st.builds(lambda blocks, off: max(1, blocks * block + off), st.integers(1, 3), st.integers(-1, 1))
    return around | st.integers(1, min(2 * block, 40))


@st.composite
def weight_cases(draw: DrawFn, supports: Supports, profile: Profile) -> WeightCase:
    """Weights whose last blocks are whole or not; the shape of kv_a_proj_with_mqa's 576 rows among them."""
    height, width = draw(st.sampled_from(supports.weight_block_sizes or BLOCK_SIZES))
    rows, columns = draw(_lengths(height)), draw(_lengths(width))
    if height == 128 and draw(st.booleans()):
        rows = 576
    elif width == 128 and draw(st.booleans()):
        columns = 640
    return WeightCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        rows=rows,
        columns=columns,
        block_rows=height,
        block_columns=width,
        power_of_two=draw(st.booleans()),
    )


@st.composite
def quantised_layer_cases(draw: DrawFn, supports: Supports, profile: Profile) -> QuantisedLayerCase:
    """Layers as ``layer_cases`` draws them, most of whose matrices have several blocks."""
    case = draw(layer_cases(supports, profile, max_steps=0))
    height, width = draw(st.sampled_from(supports.weight_block_sizes or SMALL_BLOCK_SIZES))
    drawn = {f.name: getattr(case, f.name) for f in fields(case)}
    return QuantisedLayerCase(block_rows=height, block_columns=width, **drawn)
