"""Laws of the numbers of pages in a block table: in large pools they do not fit 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Law, Run, as_test
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.extent import Most
from mla_spec.operations.operation import Operation
from mla_spec.operations.quantised_decode import OPERATION as DECODE_QUANTIZED
from mla_spec.operations.ragged import OPERATION as RAGGED_DECODE
from mla_spec.operations.rank_decode import OPERATION as RANK_DECODE
from mla_spec.properties.cases import CASES
from mla_spec.properties.far import NUMBERS, left_out_where_too_large, renumbered
from mla_spec.properties.fixed.counts import latent_dims, nearest, pages_of_a_large_pool
from mla_spec.subjects.supports import Supports


def _pages(operation: Operation) -> Callable[[Supports, Profile], list[Any]]:
    """The ordinary case with the narrowest rows, in pages of 64, or of fewer tokens where rows are wide."""

    def cases(supports: Supports, profile: Profile) -> list[Any]:
        most = Most.of(supports)
        return [
            most.cut(_in_a_large_pool(case, supports)) for case in CASES[operation.name].ordinary(supports, profile)
        ]

    return cases


def _in_a_large_pool(case: Any, supports: Supports) -> Any:
    if hasattr(case, "layout"):
        return replace(case, page_size=nearest(supports.page_sizes, 1))
    c, r = latent_dims(supports)
    return replace(case, kv_lora_rank=c, qk_rope_head_dim=r, page_size=pages_of_a_large_pool(supports, 64))


def _reads_pages_of_any_number(operation: Operation, pool: str, run: Run, case: Any) -> None:
    """Pages whose numbers exceed 2^15, and 2^16, are read as any other."""
    inputs = operation.distant(case)
    tensors = run.driver.tensors(operation, inputs)
    with left_out_where_too_large(run, pool):
        tensors[pool] = renumbered(tensors[pool])
        tensors["block_table"] = run.driver.integers(np.array(NUMBERS)[inputs.block_table], torch.int32)
        run.agrees(operation, inputs, run.call(operation, inputs, tensors))


for _operation, _pool in (
    (DECODE, "kv_cache"),
    (RAGGED_DECODE, "kv_cache"),
    (RANK_DECODE, "kv_cache"),
    (DECODE_QUANTIZED, "pages"),
):
    _check = partial(_reads_pages_of_any_number, _operation, _pool)
    _check.__doc__ = _reads_pages_of_any_number.__doc__
    _name = f"test_{_operation.name}_reads_pages_of_any_number"
    globals()[_name] = as_test(
        Law(_name, (_operation.name,), _pages(_operation), _check, _operation.missing, live="tensors"), __name__
    )
