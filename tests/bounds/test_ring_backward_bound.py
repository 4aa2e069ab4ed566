"""The bound of gradients through merged parts: what it is made of, and what errors of parts may do to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.merge_backward import merge_backward_with_bound
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.prefill_backward import prefill_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.ring_backward import ring_backward_with_bound
from mla_spec.operations.merge_gradients import RingCase
from mla_spec.reference.backward import prefill_backward
from mla_spec.reference.merge import merge_backward
from mla_spec.reference.prefill import prefill
from mla_spec.reference.typing import Array

CASE = RingCase(
    dtype="float32",
    seed=4,
    seqlens_q=(3, 2, 4),
    seqlens_k=(9, 1, 4),
    num_heads=2,
    qk_head_dim=4,
    v_head_dim=3,
    parts=3,
)
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-24, "float16": 2.0**-24}
"""Of the format in which LSEs are passed on."""


def arguments(case: RingCase) -> tuple[list[dict[str, Any]], Array]:
    x = case.with_gradients()
    return [part.forward.plain for part in case.key_parts(x.forward)], x.out_grad


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_each_part_gets_what_the_merge_gives_it_with_its_errors(dtype: str) -> None:
    profile = Profile.default(dtype)
    parts, out_grad = arguments(replace(CASE, dtype=dtype))
    forward = [prefill_with_bound(**part, profile=profile) for part in parts]
    lse_errors = []
    for x in forward:
        passed_on = np.array(
            [[2 * UNIT_ROUNDOFF[dtype] * abs(n) if n > -np.inf else 0.0 for n in row] for row in x.lse]
        )
        lse_errors.append(x.lse_error.total + passed_on)
    of_outs, of_lses = merge_backward_with_bound(
        np.array([x.out for x in forward]),
        np.array([x.lse for x in forward]),
        out_grad,
        profile,
        out_errors=np.array([x.out_error.total for x in forward]),
        lse_errors=np.array(lse_errors),
    )
    for i, (part, got) in enumerate(
        zip(parts, ring_backward_with_bound(parts, out_grad, profile=profile), strict=True)
    ):
        want = prefill_backward_with_bound(
            **part,
            out_grad=of_outs.value[i],
            out_grad_error=of_outs.error[i],
            lse_grad=of_lses.value[i],
            lse_grad_error=of_lses.error[i],
            profile=profile,
        )
        for have, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(have.value, expected.value)
            np.testing.assert_array_equal(have.error, expected.error)


def test_the_gradients_of_q_add_up_to_those_of_the_whole() -> None:
    parts, out_grad = arguments(CASE)
    bounded = ring_backward_with_bound(parts, out_grad, profile=Profile.default("float64"))
    whole = prefill_backward(**CASE.with_gradients().forward.plain, out_grad=out_grad)
    error = sum(part[0].error for part in bounded)
    assert (np.abs(sum(part[0].value for part in bounded) - whole[0]) <= error).all()
    assert error.max() < 1e-11


def test_parts_that_are_off_move_the_gradients_no_further_than_the_bound() -> None:
    """Outputs and LSEs of parts rounded to float32 and 11 bits: the bound of bfloat16 holds, that of float64 does not."""
    parts, out_grad = arguments(replace(CASE, regime="aligned", logit_std=0.25))
    forward = [prefill(**part) for part in parts]
    outs = np.stack([out for out, _ in forward]).astype(np.float16).astype(float)
    lses = np.stack([lse for _, lse in forward]).astype(np.float32).astype(float)
    of_outs, of_lses = merge_backward(outs, lses, out_grad)
    worst = {"bfloat16": 0.0, "float64": 0.0}
    for dtype in worst:
        bounded = ring_backward_with_bound(parts, out_grad, profile=Profile.default(dtype))
        for i, part in enumerate(parts):
            moved = prefill_backward(**part, out_grad=of_outs[i], lse_grad=of_lses[i])
            for got, want in zip(moved, bounded[i], strict=True):
                error = np.abs(got - want.value)
                ratio = np.where(error > 0, error / np.maximum(want.error, 5e-324), 0.0)
                worst[dtype] = max(worst[dtype], float(ratio.max(initial=0)))
    assert worst["bfloat16"] <= 1 < worst["float64"]
