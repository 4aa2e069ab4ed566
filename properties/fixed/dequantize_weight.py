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
