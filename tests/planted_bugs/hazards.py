"""Faults of any call, whatever it computes: one behavior each, planted in every operation that had none."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.behaviors import OPERATIONS, Behavior
from mla_spec.planted_bugs.behaviors_of_memory import (
    alternates_between_buffers,
    clobbers_its_first_argument,
    ignores_strides,
    leaves_the_last_tile_unwritten,
    reads_beyond_its_first_argument,
    reads_from_the_start_of_memory,
    returns_one_buffer,
    takes_memory_from_a_ring,
    wraps_offsets_at_2_32,
)
from mla_spec.planted_bugs.behaviors_of_state import (
    LENGTHS,
    keeps_a_plan_by_address,
    keeps_a_plan_by_shape,
    keeps_a_plan_by_summary,
    keeps_the_angles,
    keeps_the_mask,
    keeps_the_scale,
    sums_in_another_order,
)
from mla_spec.planted_bugs.registry import planted

NAMES = tuple(OPERATIONS)
RETURNING = tuple(name for name in NAMES if name != "write_cache")

CELLS: Sequence[tuple[str, Behavior, str, str, str, Sequence[str]]] = (
    (
        "X-clobbers",
        clobbers_its_first_argument,
        "does_not_modify_its_inputs",
        "the next step sees other inputs",
        "always",
        ("ragged_decode", "rank_decode", "quantize_cache", "dequantize_cache"),
    ),
    (
        "X-one-buffer",
        returns_one_buffer,
        "output_is_not_aliased",
        "results change when the next call is made",
        "a second call with the same shapes",
        tuple(name for name in NAMES if name not in ("write_cache", "absorb")),
    ),
    (
        "X-two-buffers",
        alternates_between_buffers,
        "output_is_not_aliased",
        "results change when the call after the next is made",
        "a third call with the same shapes",
        ("absorb", "decode", "prefill"),
    ),
    (
        "X-ring",
        takes_memory_from_a_ring,
        "output_is_not_aliased",
        "results change when the call after the next is made",
        "a third call with the same shapes",
        RETURNING,
    ),
    (
        "X-scale-by-shape",
        keeps_the_scale,
        "calls_are_independent",
        "the second call uses the scale of the first",
        "an equal shape with another scale than before",
        ("decode_quantized", "sparse_prefill", "sparse_decode"),
    ),
    (
        "X-mask-by-shape",
        keeps_the_mask,
        "calls_are_independent",
        "tokens of a prompt see what follows them, or drafted tokens miss keys",
        "an equal shape without the mask",
        ("prefill", "decode", "ragged_decode", "rank_decode", "decode_quantized"),
    ),
    (
        "X-angles-by-shape",
        keeps_the_angles,
        "calls_are_independent",
        "a second model in the process is rotated as the first",
        "equal shapes with another theta",
        ("rope",),
    ),
    (
        "X-plan-by-shape",
        keeps_a_plan_by_shape,
        "calls_are_independent",
        "results are those of an earlier request",
        "a second call with the same shapes",
        ("rope", "quantize_cache", "dequantize_cache", "project_indexer"),
    ),
    (
        "X-plan-by-summary",
        keeps_a_plan_by_summary,
        "calls_are_independent",
        "sequences are cut off or read beyond their ends, in some batches",
        "lengths of one batch in another order",
        tuple(LENGTHS),
    ),
    (
        "X-plan-by-address",
        keeps_a_plan_by_address,
        "reads_its_tensors_anew",
        "results are those of an earlier step where buffers are used again",
        "contents overwritten by a kernel, which autograd's version counter does not see",
        NAMES,
    ),
    (
        "X-no-strides",
        ignores_strides,
        "reads_strides",
        "wrong values for weights that are slices of a fused one",
        "a first argument that is a view of a larger tensor",
        ("absorb", "rope"),
    ),
    (
        "X-start-of-memory",
        reads_from_the_start_of_memory,
        "reads_strides",
        "every layer but the first reads what belongs to the first one",
        "arguments that do not begin where their memory does",
        NAMES,
    ),
    (
        "X-offsets-of-32-bits",
        wraps_offsets_at_2_32,
        "reaches_beyond_2_31_elements",
        "rows far into a large tensor are read from its beginning",
        "offsets of 2^32 elements and more",
        NAMES,
    ),
    (
        "X-last-tile",
        leaves_the_last_tile_unwritten,
        "writes_all_of_its_outputs",
        "garbage in the last rows",
        "a number of rows that is no multiple of 16",
        RETURNING,
    ),
    (
        "X-order-of-sums",
        sums_in_another_order,
        "gives_the_same_bits_again",
        "the same request gives other tokens on another day",
        "always",
        NAMES,
    ),
    (
        "X-one-element-beyond",
        reads_beyond_its_first_argument,
        "stays_within_memory",
        "NaN now and then, or an illegal memory access",
        "a tensor at the end of mapped memory, or before NaN",
        NAMES,
    ),
)
"""Id, behavior, hazard, symptom and trigger, and the operations in which it is planted."""


def _plant(bug_id: str, behavior: Behavior, hazard: str, symptom: str, shows_when: str, operation: str) -> None:
    method = getattr(TorchAbsorbed, operation)
    call = functools.wraps(method)(behavior(operation, method))
    words = f"{bug_id}-{operation}".replace("_", "-").split("-")
    name = "".join(word.capitalize() for word in words)
    body: Mapping[str, Any] = {operation: call, "__doc__": behavior.__doc__, "__module__": __name__}
    made = type(name, (TorchAbsorbed,), dict(body))
    made.__qualname__ = name
    globals()[name] = planted(
        f"{bug_id}-{operation}", symptom=symptom, shows_when=shows_when, killed_by=(f"test_{operation}_{hazard}",)
    )(made)


for _id, _behavior, _hazard, _symptom, _trigger, _operations in CELLS:
    for _operation in _operations:
        _plant(_id, _behavior, _hazard, _symptom, _trigger, _operation)
