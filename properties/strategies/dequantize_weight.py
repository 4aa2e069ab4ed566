"""Hypothesis strategies of block-quantised weights."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase
from mla_spec.properties.strategies.layer import draw_layer
from mla_spec.properties.strategies.sizes import FLAGS, SEEDS, between, choice, near
from mla_spec.subjects.supports import Supports

BLOCK_SIZES = ((128, 128), (4, 4), (3, 5), (8, 2), (1, 16), (16, 1), (1, 1))
"""The published one, unequal ones, and scales per group of a row or a column, or per element."""

SMALL_BLOCK_SIZES = ((4, 4), (3, 5), (2, 1), (1, 4))


def _length(draw: DrawFn, block: int) -> int:
    """Around whole blocks, or less than one."""
    length: int = near(draw, block, 1, 3) if draw(between(0, 1)) else draw(between(1, min(2 * block, 40)))
    return max(1, length)


@st.composite
def weight_cases(draw: DrawFn, supports: Supports, profile: Profile) -> WeightCase:
    """Weights whose last blocks are whole or not; the shape of kv_a_proj_with_mqa's 576 rows among them."""
    height, width = draw(choice(*supports.weight_block_sizes or BLOCK_SIZES))
    rows, columns = _length(draw, height), _length(draw, width)
    if height == 128 and draw(FLAGS):
        rows = 576
    elif width == 128 and draw(FLAGS):
        columns = 640
    return WeightCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        rows=rows,
        columns=columns,
        block_rows=height,
        block_columns=width,
        power_of_two=draw(FLAGS),
        small=draw(FLAGS),
    )


@st.composite
def quantised_layer_cases(draw: DrawFn, supports: Supports, profile: Profile) -> QuantisedLayerCase:
    """Layers as ``draw_layer`` draws them, most of whose matrices have several blocks."""
    case = draw_layer(draw, supports, profile, max_steps=0)
    height, width = draw(choice(*supports.weight_block_sizes or SMALL_BLOCK_SIZES))
    drawn = {f.name: getattr(case, f.name) for f in fields(case)}
    return QuantisedLayerCase(block_rows=height, block_columns=width, **drawn)
