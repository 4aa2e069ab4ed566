"""Fixed cases of ``dequantize_weight``."""

from __future__ import annotations

from mla_spec.bounds.profile import Profile
from mla_spec.operations.dequantize_weight import WeightCase
from mla_spec.properties.fixed.counts import first_of
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[WeightCase]:
    """Several blocks, the last ones smaller."""
    height, width = first_of(supports.weight_block_sizes, (8, 4))
    rows, columns = 2 * height + max(1, height // 2), 2 * width + max(1, width // 2)
    return [WeightCase(dtype=profile.dtype, rows=rows, columns=columns, block_rows=height, block_columns=width)]


SHAPES = ((32_768, 24), (576, 72), (24, 7168), (24, 16_384))
"""Rows of kv_b_proj and kv_a_proj_with_mqa, and columns of q_a_proj and o_proj, as published; the other side is narrow."""


def counts(supports: Supports, profile: Profile) -> list[WeightCase]:
    """As many blocks of rows, or of columns, as published weights have."""
    height, width = _block_size(supports)
    return [
        WeightCase(
            dtype=profile.dtype,
            seed=seed,
            rows=rows,
            columns=columns,
            block_rows=height,
            block_columns=width,
            small=rows == 576,
        )
        for seed, (rows, columns) in enumerate(SHAPES)
    ]


def _block_size(supports: Supports) -> tuple[int, int]:
    """The published size of blocks, or the first that the subject takes."""
    sizes = supports.weight_block_sizes
    return (128, 128) if sizes is None or (128, 128) in sizes else sizes[0]
