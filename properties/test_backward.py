"""Laws of the gradients that autograd gives through ``prefill`` and ``sparse_prefill``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.prefill_backward import prefill_backward_with_bound, sparse_prefill_backward_with_bound
from mla_spec.bounds.running import Bounded
from mla_spec.judging.law import Run, law
from mla_spec.operations.gradients import (
    OUT_GRAD_VIEWS,
    BackwardDriver,
    Gradients,
    PrefillBackwardCase,
    PrefillBackwardInputs,
    SparseBackwardCase,
    SparseBackwardInputs,
    Tensors,
)
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.sparse import SPARSE_PREFILL as SPARSE
from mla_spec.properties.attention import needs_several_sequences
from mla_spec.properties.hazards import require_unmodified
from mla_spec.properties.strategies.gradients import (
    exact_backward_cases,
    exact_many_backward,
    many_backward,
    many_sparse_backward,
    prefill_backward_cases,
    sparse_backward_cases,
)
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import Array
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

Expected = dict[str, Bounded]


def _needs_prefill(supports: Supports) -> str:
    return "" if supports.may_differentiate("prefill") else "prefill is not differentiable"


def _needs_several(supports: Supports) -> str:
    return _needs_prefill(supports) or needs_several_sequences(supports)


def _needs_sparse(supports: Supports) -> str:
    return "" if supports.may_differentiate("sparse_prefill") else "sparse_prefill is not differentiable"


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse and supports.lse_backward else "no gradient comes through the LSE"


def _needs_prefill_lse(supports: Supports) -> str:
    return _needs_prefill(supports) or _needs_lse(supports)


def _needs_sparse_lse(supports: Supports) -> str:
    return _needs_sparse(supports) or _needs_lse(supports)


def _expected(run: Run, x: PrefillBackwardInputs, lse_grad: Array | None = None) -> Expected:
    gradients = prefill_backward_with_bound(
        **x.forward.plain, out_grad=x.out_grad, profile=run.profile, lse_grad=lse_grad
    )
    return dict(zip("qkv", gradients, strict=True))


def _tensors(driver: BackwardDriver, x: PrefillBackwardInputs) -> Tensors:
    return driver.tensors(PREFILL, x.forward) | {"out_grad": driver.tensor(x.out_grad)}


def _judge(run: Run, got: Gradients, want: Expected, *, gate: bool = True) -> None:
    for name, result in got.items():
        run.within(result, want[name].value, _bound(want[name]), gate=gate)


def _bound(x: Bounded) -> ErrorBound:
    return ErrorBound({"running error analysis of the backward pass": x.error})


@law(needs=PREFILL, cases=prefill_backward_cases, missing=_needs_prefill, first=many_backward)
def test_prefill_gradients_agree_with_reference(run: Run, case: PrefillBackwardCase) -> None:
    """The gradients of q, k and v are each within their worst-case bound."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    _judge(run, driver.prefill_gradients(x.forward, _tensors(driver, x)), _expected(run, x))


@law(needs=PREFILL, cases=prefill_backward_cases, missing=_needs_prefill_lse)
def test_prefill_gradients_through_the_lse(run: Run, case: PrefillBackwardCase) -> None:
    """A loss that depends on out and on the LSE has the gradients of both."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    tensors = _tensors(driver, x) | {"lse_grad": driver.lse_grad(x.lse_grad)}
    want = _expected(run, x, x.lse_grad)
    _judge(run, driver.prefill_gradients(x.forward, tensors), want)


@law(needs=PREFILL, cases=prefill_backward_cases, missing=_needs_prefill, cost=2)
def test_prefill_gradients_of_some_arguments(run: Run, case: PrefillBackwardCase) -> None:
    """Where one or two of q, k and v require a gradient, they get what they get where all do."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    names = ("q", "k", "v", "qk", "qv", "kv")[case.seed % 6]
    _judge(run, driver.prefill_gradients(x.forward, _tensors(driver, x), names), _expected(run, x))


@law(needs=PREFILL, cases=exact_backward_cases, missing=_needs_prefill, first=exact_many_backward)
def test_prefill_gradients_of_exact_steps(run: Run, case: PrefillBackwardCase) -> None:
    """Where O, P, dP, D and dS have few bits, gradients have no error but that of float32 arithmetic and of storing them."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    _judge(run, driver.prefill_gradients(x.forward, _tensors(driver, x)), _expected(run, x))


@law(needs=PREFILL, cases=narrowed(prefill_backward_cases, few_keys=True), missing=_needs_prefill)
def test_prefill_gradients_where_nothing_is_seen(run: Run, case: PrefillBackwardCase) -> None:
    """Queries without keys and keys without queries have gradients exactly 0, and change nothing elsewhere."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    _judge(run, driver.prefill_gradients(x.forward, _tensors(driver, x)), _expected(run, x))


@law(needs=PREFILL, cases=narrowed(prefill_backward_cases, min_batch=2), missing=_needs_several, cost=2)
def test_prefill_gradients_of_sequences_are_independent(run: Run, case: PrefillBackwardCase) -> None:
    """A sequence has the same gradients packed with others as alone: the same bits where the profile claims it."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    packed, want = driver.prefill_gradients(x.forward, _tensors(driver, x)), _expected(run, x)
    offsets_q, offsets_k = x.forward.cu_seqlens_q, x.forward.cu_seqlens_k
    for i in range(len(case.seqlens_q)):
        queries, keys = slice(*offsets_q[i : i + 2]), slice(*offsets_k[i : i + 2])
        if not case.seqlens_q[i] or not case.seqlens_k[i]:  # autograd may find no way from nothing to nothing
            continue
        forward = replace(
            x.forward,
            q=x.forward.q[queries],
            k=x.forward.k[keys],
            v=x.forward.v[keys],
            cu_seqlens_q=offsets_q[i : i + 2] - offsets_q[i],
            cu_seqlens_k=offsets_k[i : i + 2] - offsets_k[i],
        )
        alone = replace(x, forward=forward, out_grad=x.out_grad[queries])
        got = driver.prefill_gradients(forward, _tensors(driver, alone))
        why = f"sequence {i} of {len(case.seqlens_q)} alone differs from itself packed with the others"
        for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
            if run.profile.batch_invariant:
                run.same_bits(got[name], packed[name][tokens], why)
            else:
                run.same_function(got[name], packed[name][tokens], _bound(want[name][tokens]), why)


@law(needs=PREFILL, cases=prefill_backward_cases, missing=_needs_prefill, cost=3)
def test_prefill_gradients_read_strides(run: Run, case: PrefillBackwardCase) -> None:
    """Views of larger or transposed tensors are read by their strides, and so is the gradient of out, that of a sum too."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    names = [*_VIEWS, OF_SUM]
    name = names[case.seed % len(names)]
    if name == OF_SUM:
        x = replace(x, out_grad=np.ones(x.out_grad.shape))
    tensors, want = _VIEWS.get(name, _of_sum)(_tensors(driver, x)), _expected(run, x)
    _judge_view(name, lambda: _judge(run, driver.prefill_gradients(x.forward, tensors), want, gate=name != OF_SUM))


OF_SUM = "the loss out.sum(), whose gradient is one number with strides of 0"
_VIEWS = {**PREFILL.views, **OUT_GRAD_VIEWS}


def _of_sum(t: Tensors) -> Tensors:
    return t | {"out_grad": t["out_grad"].new_ones(()).expand(t["out_grad"].shape)}


def _judge_view(name: str, judge: Callable[[], None]) -> None:
    try:
        judge()
    except Violation as violation:
        raise Violation(f"with {name}:\n{violation}") from None


@law(needs=PREFILL, cases=prefill_backward_cases, missing=_needs_prefill)
def test_prefill_backward_does_not_modify_its_arguments(run: Run, case: PrefillBackwardCase) -> None:
    """Neither the arguments nor the gradient of out have changed when the backward pass is over."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    tensors = _tensors(driver, x)
    require_unmodified(run, "the backward pass", tensors, lambda: driver.prefill_gradients(x.forward, tensors))


def _sparse_expected(run: Run, x: SparseBackwardInputs, lse_grad: Array | None = None) -> Expected:
    q, kv = sparse_prefill_backward_with_bound(
        x.forward.q,
        x.forward.rows,
        x.forward.entries,
        x.out_grad,
        head_dim_v=x.forward.head_dim_v,
        softmax_scale=x.forward.softmax_scale,
        profile=run.profile,
        attn_sink=x.forward.attn_sink,
        topk_length=x.forward.topk_length,
        lse_grad=None if lse_grad is None else lse_grad.T,
    )
    return {"q": q, "kv": Bounded(kv.value[:, None], kv.error[:, None])}


def _sparse_tensors(driver: BackwardDriver, x: SparseBackwardInputs) -> Tensors:
    return driver.tensors(SPARSE, x.forward) | {"out_grad": driver.tensor(x.out_grad)}


@law(needs=SPARSE, cases=sparse_backward_cases, missing=_needs_sparse, first=many_sparse_backward)
def test_sparse_prefill_gradients_agree_with_reference(run: Run, case: SparseBackwardCase) -> None:
    """The gradients of q and kv are within their bounds: sums over all entries that select a row, exactly 0 without any."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    _judge(run, driver.sparse_gradients(x.forward, _sparse_tensors(driver, x)), _sparse_expected(run, x))


@law(needs=SPARSE, cases=sparse_backward_cases, missing=_needs_sparse, cost=2)
def test_sparse_prefill_gradients_of_one_argument(run: Run, case: SparseBackwardCase) -> None:
    """Where only q or only kv requires a gradient, it gets what it gets where both do."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    name = ("q", "kv")[case.seed % 2]
    _judge(run, driver.sparse_gradients(x.forward, _sparse_tensors(driver, x), (name,)), _sparse_expected(run, x))


@law(needs=SPARSE, cases=sparse_backward_cases, missing=_needs_sparse_lse)
def test_sparse_prefill_gradients_through_the_lse(run: Run, case: SparseBackwardCase) -> None:
    """A loss that depends on out and on the LSE, which does not count the sink, has the gradients of both."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    tensors = _sparse_tensors(driver, x) | {"lse_grad": driver.lse_grad(x.lse_grad)}
    _judge(run, driver.sparse_gradients(x.forward, tensors), _sparse_expected(run, x, x.lse_grad))


@law(needs=SPARSE, cases=sparse_backward_cases, missing=_needs_sparse, cost=3)
def test_sparse_prefill_gradients_read_strides(run: Run, case: SparseBackwardCase) -> None:
    """Views of larger or transposed tensors are read by their strides, and so is the gradient of out."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    views = {**SPARSE.views, **OUT_GRAD_VIEWS}
    name = list(views)[case.seed % len(views)]
    tensors, want = views[name](_sparse_tensors(driver, x)), _sparse_expected(run, x)
    _judge_view(name, lambda: _judge(run, driver.sparse_gradients(x.forward, tensors), want))


@law(needs=SPARSE, cases=sparse_backward_cases, missing=_needs_sparse)
def test_sparse_prefill_backward_does_not_modify_its_arguments(run: Run, case: SparseBackwardCase) -> None:
    """Neither the arguments, indices among them, nor the gradient of out have changed when the backward pass is over."""
    x, driver = case.with_gradients(), there(BackwardDriver.of, run.driver)
    tensors = _sparse_tensors(driver, x)
    require_unmodified(run, "the backward pass", tensors, lambda: driver.sparse_gradients(x.forward, tensors))
