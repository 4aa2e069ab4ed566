"""Laws of the gradient that autograd gives through ``rope``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.rope import rope_backward_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.rope import OPERATION as ROPE
from mla_spec.operations.rope_gradients import (
    OUT_GRAD_VIEWS,
    RopeBackwardCase,
    RopeBackwardInputs,
    RopeGradientDriver,
)
from mla_spec.properties.hazards import Told, require_backward_unmodified
from mla_spec.properties.strategies.gradients import rope_backward_cases, rope_backward_fixed
from mla_spec.subjects.driver import Result, Tensors
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports


def _needs_gradients(supports: Supports) -> str:
    return "" if supports.may_differentiate("rope") else "rope is not differentiable"


def _judge(run: Run, inputs: RopeBackwardInputs, got: Result, *, gate: bool = True) -> None:
    forward = inputs.forward
    want, bound = rope_backward_with_bound(
        inputs.out_grad, forward.positions, forward.rope, run.profile.rope, output=run.profile.dtype
    )
    run.within(got, want, bound, gate=gate)


@law(needs=ROPE, cases=rope_backward_cases, missing=_needs_gradients, first=rope_backward_fixed)
def test_rope_gradient_agrees_with_reference(run: Run, case: RopeBackwardCase) -> None:
    """The gradient of x is that of out rotated back, times the factor on cos and sin."""
    inputs, driver = case.with_gradients(), there(RopeGradientDriver, run.driver)
    (got,) = driver.gradients([(inputs, driver.tensors(inputs))])
    _judge(run, inputs, got)


@law(needs=ROPE, cases=rope_backward_cases, missing=_needs_gradients, cost=2)
def test_rope_gradients_of_two_calls(run: Run, case: RopeBackwardCase) -> None:
    """Two calls before the first backward pass, as of queries and keys, at equal or other positions, leave each its own."""
    first, second = (replace(case, seed=case.seed + i).with_gradients() for i in (0, 1))
    if case.seed % 2:
        later = second.forward.positions + case.shift
        second = replace(second, forward=replace(second.forward, positions=later))
    driver = there(RopeGradientDriver, run.driver)
    calls = [(inputs, driver.tensors(inputs)) for inputs in (first, second)]
    if not case.seed % 2:
        calls[1][1]["positions"] = calls[0][1]["positions"]
    for (inputs, _), got in zip(calls, driver.gradients(calls), strict=True):
        _judge(run, inputs, got, gate=False)


@law(needs=ROPE, cases=rope_backward_cases, missing=_needs_gradients, cost=3)
def test_rope_gradient_reads_strides(run: Run, case: RopeBackwardCase) -> None:
    """Views of larger or transposed tensors are read by their strides, and so is the gradient of out, that of a sum too."""
    inputs, driver = case.with_gradients(), there(RopeGradientDriver, run.driver)
    views = {**OUT_GRAD_VIEWS, **ROPE.views}
    for name, view in views.items():
        with Told(f"with {name}"):
            (got,) = driver.gradients([(inputs, view(driver.tensors(inputs)))])
            _judge(run, inputs, got, gate=False)
    ones = replace(inputs, out_grad=np.ones(inputs.out_grad.shape))
    with Told("with the loss out.sum(), whose gradient is one number with strides of 0"):
        (got,) = driver.gradients([(ones, _of_sum(driver.tensors(ones)))])
        _judge(run, ones, got, gate=False)


def _of_sum(t: Tensors) -> Tensors:
    return t | {"out_grad": t["out_grad"].new_ones(()).expand(t["out_grad"].shape)}


@law(needs=ROPE, cases=rope_backward_cases, missing=_needs_gradients)
def test_rope_backward_does_not_modify_its_arguments(run: Run, case: RopeBackwardCase) -> None:
    """x, positions, out and its gradient stay, and a branch that is added to out gets that gradient unchanged."""
    inputs, driver = case.with_gradients(), there(RopeGradientDriver, run.driver)
    tensors = driver.tensors(inputs)
    got = require_backward_unmodified(run, "rope", tensors, lambda: driver.beside_a_branch(inputs, tensors))
    _judge(run, inputs, got["x"], gate=False)
