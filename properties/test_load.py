"""Laws of production loads; they run where ``--production`` asks for them. See ``mla_spec.properties.load``.

Every row of a load is judged where inputs are planted whose exact answer is known, a sample of them where they are ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.judging.law import Law, Options, Run, as_test
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.load import Load
from mla_spec.properties.loads import DECODE, DECODE_QUANTIZED, LOADS, PREFILL, SPARSE_DECODE
from mla_spec.properties.test_exact_at_length import test_decode_is_exact_at_length as decode_is_exact
from mla_spec.properties.test_exact_at_length import test_decode_quantized_is_exact_at_length as quantized_is_exact
from mla_spec.properties.test_exact_at_length import test_prefill_is_exact_at_length as prefill_is_exact
from mla_spec.properties.test_exact_at_length import test_sparse_decode_is_exact_at_length as sparse_is_exact
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.driver import Results
from mla_spec.subjects.violation import SubjectCrashed

COMPARED = 12
"""Rows of which the law of order needs the bound, where a subject's bits may depend on the batch."""


def asked_for(options: Options) -> str:
    """For ``law(unavailable=...)``: real loads take minutes."""
    return "" if options.production is not None else "not asked for: --production"


def sampled_rows_agree(load: Load, run: Run, case: Any) -> None:
    """At whole published widths and a real load, a sample of rows and those at corners agree with the reference."""
    run.note = load.describe(case)
    inputs = load.operation.build(case)
    got = run.call(load.operation, inputs)
    for row in load.rows(case):
        load.judge(run, case, inputs, got, row)


def _check(made: Any) -> Callable[[Run, Any], None]:
    law: Law = made.law
    return law.check


PLANTED: dict[str, Callable[[Run, Any], None]] = {
    PREFILL.operation.name: _check(prefill_is_exact),
    DECODE.operation.name: _check(decode_is_exact),
    DECODE_QUANTIZED.operation.name: _check(quantized_is_exact),
    SPARSE_DECODE.operation.name: _check(sparse_is_exact),
}
"""By operation, the law that plants keys of equal weight, and judges every row."""


def every_row_of_planted_inputs_is_exact(load: Load, run: Run, case: Any) -> None:
    """At whole published widths and a real load, every row gives exactly the mean of the few keys that have weight."""
    PLANTED[load.operation.name](run, _with_keys(case))
    run.note = ""


def _with_keys(case: Any) -> Any:
    """A case of which every query sees a key."""
    if isinstance(case, PrefillCase):
        return replace(case, seqlens_k=tuple(max(n, 1) for n in case.seqlens_k))
    if hasattr(case, "seqlens"):
        return replace(case, seqlens=tuple(max(n, case.s) for n in case.seqlens))
    return case


def within_memory(check: Callable[[Run, Any], None], run: Run, case: Any) -> None:
    """A check of which a case that does not fit into memory says nothing: loads grow no further then."""
    try:
        check(run, case)
    except SubjectCrashed as error:
        if not error.exhausted:
            raise
        run.exhausted = True
        run.trivial("it did not fit into the memory there is")


def production_laws(load: Load) -> tuple[Law, ...]:
    """The laws of one operation."""
    made = []
    for check, name in ((sampled_rows_agree, "agrees"), (every_row_of_planted_inputs_is_exact, "is_exact")):
        bound = partial(check, load)
        bound.__doc__ = check.__doc__
        made.append(_law(f"test_{load.operation.name}_{name}_under_load", load, bound))
    return tuple(made)


def _law(name: str, load: Load, check: Callable[[Run, Any], None]) -> Law:
    operation, fitting = load.operation, partial(within_memory, check)
    fitting.__doc__ = check.__doc__
    return Law(name, (operation.name,), lambda *_: [], fitting, operation.missing, asked_for, grown=load.grown)


def batches_in_another_order(run: Run, case: DecodeCase) -> None:
    """A load decoded in another order of sequences, the longest with few others, and pages renamed: each sequence's result stays.

    Renamed pages leave every bit. So does the order where the profile declares it; else two results of a row may be twice its
    bound apart, and a sample of rows is looked at.
    """
    inputs = case.build()
    whole = run.call(DECODE.operation, inputs)
    rng = np.random.default_rng([case.seed, 43])
    order = _another_order(rng, len(inputs.q))
    alone = np.unique([int(inputs.cache_seqlens.argmax()), *order[: len(order) // 16]])
    bounds = _bounds(run, case, inputs)
    for chosen, why in ((order, "the sequences came in another order"), (alone, "the sequence came with few others")):
        got = run.call(DECODE.operation, _chosen(inputs, chosen))
        _same_sequences(run, got, whole, chosen, why, bounds)
    if run.profile.deterministic:
        run.same(run.call(DECODE.operation, _renamed(inputs, rng)), whole, "the pages of the pool were renamed")


def _another_order(rng: np.random.Generator, count: int) -> IntArray:
    """A permutation that moves something, where there are two to move."""
    order: IntArray = rng.permutation(count)
    return np.roll(order, 1) if (order == np.arange(count)).all() else order


def _bounds(run: Run, case: DecodeCase, inputs: DecodeInputs) -> dict[Any, Any]:
    """What is expected of some rows, where bits may differ."""
    if run.profile.batch_invariant:
        run.note = ""
        return {}
    rows = DECODE.rows(case, COMPARED)
    run.note = (
        f"of {whole_rows(case)} rows, {len(rows)} are compared between orders of the batch, all between names of pages"
    )
    return {row: DECODE.expected(run, inputs, row) for row in rows}


def whole_rows(case: DecodeCase) -> int:
    """Rows of a case."""
    return len(case.seqlens) * case.s * case.num_heads


def _chosen(inputs: DecodeInputs, chosen: IntArray) -> DecodeInputs:
    return replace(
        inputs,
        q=inputs.q[chosen],
        block_table=inputs.block_table[chosen],
        cache_seqlens=inputs.cache_seqlens[chosen],
    )


def _renamed(inputs: DecodeInputs, rng: np.random.Generator) -> DecodeInputs:
    """The pages in another order in the pool."""
    names = rng.permutation(len(inputs.kv_cache))
    cache = np.empty_like(inputs.kv_cache)
    cache[names] = inputs.kv_cache
    return replace(inputs, kv_cache=cache, block_table=names[inputs.block_table].astype(np.int32))


def _same_sequences(
    run: Run, got: Results, whole: Results, chosen: IntArray, why: str, bounds: dict[Any, tuple[Any, ...]]
) -> None:
    if run.profile.batch_invariant:
        run.same(got, whole.leading(chosen), why)
        return
    place = {int(sequence): i for i, sequence in enumerate(chosen)}
    for row, wants in bounds.items():
        if row[0] not in place:
            continue
        here, there = DECODE.places((place[row[0]], *row[1:])), DECODE.places(row)
        for new, old, want, at, was in zip(got, whole, wants, here, there, strict=True):
            if new is not None and old is not None:
                run.same_function(new[at], old[was], want.bound, why)


LAWS = (
    *(made for load in LOADS for made in production_laws(load)),
    _law("test_decode_in_any_order_under_load", DECODE, batches_in_another_order),
)

globals().update({made.name: as_test(made, __name__) for made in LAWS})
