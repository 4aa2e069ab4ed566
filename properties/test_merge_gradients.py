"""Laws of the gradients that autograd gives through ``merge``, and through parts of attention that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.merge_backward import merge_backward_with_bound
from mla_spec.bounds.prefill_backward import prefill_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.ring_backward import ring_backward_with_bound
from mla_spec.bounds.running import Bounded
from mla_spec.judging.law import Run, law
from mla_spec.operations.gradients import Gradients, PrefillBackwardInputs, Tensors
from mla_spec.operations.merge import OPERATION as MERGE
from mla_spec.operations.merge_gradients import (
    OUT_GRAD_VIEWS,
    KeyPart,
    MergeBackwardCase,
    MergeBackwardInputs,
    MergeGradientDriver,
    RingCase,
)
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.properties.hazards import Told, require_backward_unmodified
from mla_spec.properties.strategies.gradients import merge_backward_cases, ring_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import computed
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports

Expected = dict[str, Bounded]


def _needs_gradients(supports: Supports) -> str:
    return "" if supports.may_differentiate("merge") else "merge is not differentiable"


def _needs_lse(supports: Supports) -> str:
    return _needs_gradients(supports) or ("" if supports.lse_backward else "no gradient comes through the LSE")


def _needs_empty_rows(supports: Supports) -> str:
    no_rule = "no rule for rows without keys" if supports.empty_row == "unsupported" else ""
    return _needs_lse(supports) or no_rule


def _needs_parts(supports: Supports) -> str:
    if not supports.may_differentiate("prefill"):
        return "prefill is not differentiable"
    if not supports.lse:
        return "prefill returns no LSE"
    return _needs_empty_rows(supports) or ("" if False in supports.causal else "attention is causal only")


def _expected(run: Run, x: MergeBackwardInputs, *, through_lse: bool = False) -> Expected:
    gradients = merge_backward_with_bound(
        x.forward.outs, x.forward.lses, x.out_grad, run.profile, lse_grad=x.lse_grad if through_lse else None
    )
    return dict(zip(("outs", "lses"), gradients, strict=True))


def _judge(
    run: Run, case: MergeBackwardCase, got: Gradients, want: Expected, *, gated: Sequence[str] = ("outs",)
) -> None:
    """Judge gradients; the bound of those called ``gated`` must mean something, unless LSEs are so far apart that shares vanish.

    Gradients of LSEs may all be near 0 where none arrives at the merged LSE.
    """
    for name, result in got.items():
        gate = name in gated and case.lse_std <= 4
        run.within(result, want[name].value, _bound(want[name].error), gate=gate)


def _bound(error: Array) -> ErrorBound:
    return ErrorBound({"running error analysis of the backward pass": error})


@law(needs=MERGE, cases=merge_backward_cases, missing=_needs_gradients)
def test_merge_gradients_agree_with_reference(run: Run, case: MergeBackwardCase) -> None:
    """The gradients of outs and of lses are each within their worst-case bound."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    _judge(run, case, driver.gradients(driver.tensors(x)), _expected(run, x))


@law(needs=MERGE, cases=merge_backward_cases, missing=_needs_lse)
def test_merge_gradients_through_the_lse(run: Run, case: MergeBackwardCase) -> None:
    """A loss that depends on out and on the merged LSE has the gradients of both."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    got = driver.gradients(driver.tensors(x, through_lse=True))
    _judge(run, case, got, _expected(run, x, through_lse=True), gated=("outs", "lses"))


@law(needs=MERGE, cases=merge_backward_cases, missing=_needs_gradients, cost=2)
def test_merge_gradients_of_one_argument(run: Run, case: MergeBackwardCase) -> None:
    """Where only outs or only lses require a gradient, they get what they get where both do."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    name = ("outs", "lses")[case.seed % 2]
    _judge(run, case, driver.gradients(driver.tensors(x), (name,)), _expected(run, x))


@law(needs=MERGE, cases=narrowed(merge_backward_cases, min_empty=0.3), missing=_needs_empty_rows)
def test_merge_gradients_of_empty_parts(run: Run, case: MergeBackwardCase) -> None:
    """Parts without keys have gradient 0, whatever finite numbers their outputs hold, and the others their own."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    empty = np.isneginf(np.swapaxes(x.forward.lses, -1, -2))[..., None]
    left_over = -(2.0**15 if case.dtype == "float16" else 2.0**100)
    x = replace(x, forward=replace(x.forward, outs=np.where(empty, left_over, x.forward.outs)))
    got = driver.gradients(driver.tensors(x, through_lse=True))
    _judge(run, case, got, _expected(run, x, through_lse=True))


@law(needs=MERGE, cases=merge_backward_cases, missing=_needs_gradients, cost=3)
def test_merge_gradients_read_strides(run: Run, case: MergeBackwardCase) -> None:
    """Views of larger or transposed tensors are read by their strides, and so is the gradient of out, that of a sum too."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    want = _expected(run, x)
    for name, view in {**MERGE.views, **OUT_GRAD_VIEWS}.items():
        with Told(f"with {name}"):
            _judge(run, case, driver.gradients(view(driver.tensors(x))), want, gated=())
    ones = replace(x, out_grad=np.ones(x.out_grad.shape))
    with Told("with the loss out.sum(), whose gradient is one number with strides of 0"):
        _judge(run, case, driver.gradients(_of_sum(driver.tensors(ones))), _expected(run, ones), gated=())


def _of_sum(t: Tensors) -> Tensors:
    return t | {"out_grad": t["out_grad"].new_ones(()).expand(t["out_grad"].shape)}


@law(needs=MERGE, cases=merge_backward_cases, missing=_needs_gradients)
def test_merge_backward_does_not_modify_its_arguments(run: Run, case: MergeBackwardCase) -> None:
    """outs, lses, out and its gradient stay, and a branch that is added to out gets that gradient unchanged."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    tensors = driver.tensors(x)
    got = require_backward_unmodified(run, "merge", tensors, lambda: driver.beside_a_branch(tensors))
    _judge(run, case, got, _expected(run, x), gated=())


@law(needs=(PREFILL, MERGE), cases=ring_cases, missing=_needs_parts, cost=3)
def test_gradients_through_merged_parts_are_those_of_the_whole(run: Run, case: RingCase) -> None:
    """q, k and v get through parts of the keys, attended to apart and merged, what they get through all keys at once."""
    x, driver = case.with_gradients(), there(MergeGradientDriver, run.driver)
    parts = case.key_parts(x.forward)
    got = driver.through_parts(parts, x.out_grad)
    found = _of_whole([{name: result.value for name, result in part.items()} for part in got], parts, x)
    for name, want in _whole_expected(run, parts, x).items():
        run.within(computed(found[name], f"gradient of {name}"), want.value, _bound(want.error))


def _of_whole(each: Sequence[dict[str, Array]], parts: Sequence[KeyPart], x: PrefillBackwardInputs) -> dict[str, Array]:
    """From gradients, or errors, of each part those of the whole, by name: sums for q, and for k and v each its own."""
    whole = {"q": sum((part["q"] for part in each), np.zeros(()))}
    for name, like in (("k", x.forward.k), ("v", x.forward.v)):
        whole[name] = np.zeros(like.shape)
        for part, of_part in zip(parts, each, strict=True):
            whole[name][part.keys] = of_part[name]
    return whole


def _whole_expected(run: Run, parts: Sequence[KeyPart], x: PrefillBackwardInputs) -> Expected:
    """The gradients of attention to all keys, as far as the backward pass through the parts may be from them."""
    bounded = ring_backward_with_bound([part.forward.plain for part in parts], x.out_grad, profile=run.profile)
    errors = [{name: gradient.error for name, gradient in zip("qkv", part, strict=True)} for part in bounded]
    # The sum over the parts and the reference of the whole are computed in float64.
    exact = prefill_backward_with_bound(**x.forward.plain, out_grad=x.out_grad, profile=Profile.default("float64"))
    error = _of_whole(errors, parts, x)
    return {name: Bounded(whole.value, error[name] + whole.error) for name, whole in zip("qkv", exact, strict=True)}
