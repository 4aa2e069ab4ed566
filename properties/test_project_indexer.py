"""Laws of ``project_indexer``: the operands of the lightning indexer, from a layer's hidden states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import gamma
from mla_spec.bounds.project_indexer import BoundedIndexer, project_indexer_with_bound
from mla_spec.bounds.sparse import indexer_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.indexer import OPERATION as INDEXER
from mla_spec.operations.indexer import IndexerInputs, indexer_expected
from mla_spec.operations.project_indexer import OPERATION as PROJECT
from mla_spec.operations.project_indexer import ProjectIndexerCase, ProjectIndexerInputs
from mla_spec.properties.strategies.project_indexer import project_indexer_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.formats import format_of
from mla_spec.reference.sparse import indexer_logits
from mla_spec.reference.typing import Array
from mla_spec.subjects.supports import Supports


def _expected(run: Run, inputs: ProjectIndexerInputs) -> BoundedIndexer:
    return project_indexer_with_bound(**vars(inputs), profile=run.profile)


def _needs_partial_rope(supports: Supports) -> str:
    dims = supports.indexer_dims
    return "" if dims is None or any(d > 3 for _, d in dims) else "indexer has no dims that are not rotated"


@law(needs=PROJECT, cases=project_indexer_cases)
def test_indexer_queries_agree_with_reference(run: Run, case: ProjectIndexerCase) -> None:
    """Queries are wq_b applied to the query latent, its first dims rotated, within the worst-case bound of the profile."""
    inputs = case.build()
    want = _expected(run, inputs)
    run.within(run.call(PROJECT, inputs).q, want.q, want.q_error)


@law(needs=PROJECT, cases=project_indexer_cases)
def test_indexer_keys_agree_with_reference(run: Run, case: ProjectIndexerCase) -> None:
    """Keys are the LayerNorm of wk applied to the hidden state, its first dims rotated, within the worst-case bound."""
    inputs = case.build()
    want = _expected(run, inputs)
    run.within(run.call(PROJECT, inputs).k, want.k, want.k_error)


@law(needs=PROJECT, cases=project_indexer_cases)
def test_indexer_head_weights_agree_with_reference(run: Run, case: ProjectIndexerCase) -> None:
    """The weights of the heads are weights_proj applied to the hidden state, times (h d)^-1/2, in float32 or better."""
    inputs = case.build()
    want = _expected(run, inputs)
    run.within(run.call(PROJECT, inputs).weights, want.weights, want.weights_error)


@law(needs=PROJECT, cases=narrowed(project_indexer_cases, rotated=True), missing=_needs_partial_rope)
def test_indexer_rotates_only_its_first_dims(run: Run, case: ProjectIndexerCase) -> None:
    """Other positions change no bit of the dims after the rotated ones, nor of the weights; and they change the rotated."""
    inputs = case.build()
    r = case.rope_dim
    want, got = run.call(PROJECT, inputs), run.call(PROJECT, replace(inputs, positions=inputs.positions + 1))
    why = "only the positions were changed, on which these do not depend"
    run.same_bits(got.q[..., r:], want.q[..., r:], why)
    run.same_bits(got.k[..., r:], want.k[..., r:], why)
    run.same_bits(got.weights, want.weights, why)
    first_pair = [0, 1 if case.layout == "interleaved" else r // 2]  # turns by the largest angle
    for name, x, y in (("q", got.q, want.q), ("k", got.k, want.k)):
        same = (x.bits[..., :r] == y.bits[..., :r]).all(axis=-1)
        large = np.abs(y.value[..., first_pair]).max(axis=-1) > format_of(case.dtype).smallest_normal
        run.require(not (same & large).any(), f"the first {r} dims of {name} do not depend on the position")


@law(needs=PROJECT, cases=narrowed(project_indexer_cases, max_start=64), cost=2)
def test_indexer_scores_depend_on_relative_position_only(run: Run, case: ProjectIndexerCase) -> None:
    """q·k of any two tokens is the same at positions that are all shifted alike, within the bounds of both."""
    inputs = case.build()
    shifted = replace(inputs, positions=inputs.positions + 1 + case.seed % 64)
    products, errors = [], []
    for each in (inputs, shifted):
        got, bound = run.call(PROJECT, each), _expected(run, each)
        q_error, k_error = bound.q_error.total, bound.k_error.total
        products.append(np.einsum("shd,td->sht", got.q.value, got.k.value))
        q_size, k_size = np.abs(bound.q) + q_error, np.abs(bound.k) + k_error
        own = gamma(case.index_head_dim, format_of("float64").unit_roundoff)  # of the products here
        q_error = q_error + own * q_size
        errors.append(np.einsum("shd,td->sht", q_error, k_size) + np.einsum("shd,td->sht", q_size, k_error))
    difference, allowed = np.abs(products[1] - products[0]), errors[0] + errors[1]
    run.bounded(np.zeros_like(allowed), allowed)
    worst = np.unravel_index(np.argmax(difference - allowed), difference.shape)
    s, h, t = (int(i) for i in worst)
    run.require(
        bool(difference[worst] <= allowed[worst]),
        f"q[{s}, {h}]·k[{t}] changed from {products[0][worst]:.6g} to {products[1][worst]:.6g}, by more than the bounds of "
        f"both allow ({allowed[worst]:.3g}), when all positions were shifted by {1 + case.seed % 64}",
    )


@law(needs=(PROJECT, INDEXER), cases=project_indexer_cases)
def test_indexer_of_projected_operands(run: Run, case: ProjectIndexerCase) -> None:
    """Indexer given the very tensors of project_indexer: logits and selection are those of the hidden states."""
    inputs = case.build()
    want, driver = _expected(run, inputs), run.driver
    operands = driver.raw(PROJECT, inputs, driver.tensors(PROJECT, inputs))
    named = dict(zip(("q", "k", "weights"), operands, strict=True))
    offsets = np.cumsum([0, *case.seqlens]).astype(np.int32)
    top_k = (run.supports.indexer_top_k or (1 + case.seed % max(case.seqlens),))[0]
    exact = IndexerInputs(want.q, want.k, want.weights, offsets, offsets, top_k)
    got = run.call(INDEXER, exact, driver.tensors(INDEXER, exact) | named)
    logits, selection = indexer_expected(exact, *_logits_with_bound(run, want))
    if got.logits is not None:
        logits.judge(run, got.logits)
    selection.judge(run, got.indices)


def _logits_with_bound(run: Run, operands: BoundedIndexer) -> tuple[Array, ErrorBound]:
    """Exact logits, and the error of those of computed operands."""
    q_error, k_error, w_error = operands.q_error.total, operands.k_error.total, operands.weights_error.total
    largest = np.abs(operands.weights) + w_error
    _, bound = indexer_with_bound(operands.q, operands.k, largest, run.profile, q_error=q_error, k_error=k_error)
    moved = indexer_logits(np.abs(operands.q), np.abs(operands.k), w_error)
    return indexer_logits(operands.q, operands.k, operands.weights), bound.plus("error of the weights", moved)
