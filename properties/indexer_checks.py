"""What must hold of the indexer's logits and selection, whatever its operands come from."""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.sparse import selection_shortfall
from mla_spec.judging.law import Run
from mla_spec.operations.sparse import IndexerInputs
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.driver import Result


def visible_keys(inputs: IndexerInputs) -> BoolArray:
    """Which keys each query sees, [tokens, key tokens]."""
    key = np.arange(len(inputs.k))
    return (key >= inputs.first_key[:, None]) & (key < inputs.end_key[:, None])


def judge_logits(run: Run, got: Result | None, want: Array, bound: ErrorBound, visible: BoolArray) -> None:
    """Judge the logits of visible keys."""
    if got is not None:
        shown = Result(np.where(visible, got.value, want), got.bits, got.what)
        run.within(shown, want, bound, gate=False)


def judge_selection(run: Run, indices: IntArray, inputs: IndexerInputs, logits: Array, error: Array) -> BoolArray:
    """Raise Violation unless each row names, once, keys that may be the largest; which ones, [tokens, key tokens]."""
    visible = visible_keys(inputs)
    count = np.minimum(visible.sum(axis=-1), inputs.top_k)
    named = np.zeros_like(visible)
    for i, row in enumerate(indices):
        chosen = row[: count[i]]
        at = (
            f"indices[{i}] = {row.tolist()}, of a query that sees keys {inputs.first_key[i]} .. {inputs.end_key[i] - 1}"
        )
        run.require(bool((row[count[i] :] == -1).all()), f"{at}: must be -1 from entry {count[i]} on")
        inside = (chosen >= inputs.first_key[i]) & (chosen < inputs.end_key[i])
        run.require(bool(inside.all()), f"{at}: entry {chosen[~inside].tolist()} is no key that it sees")
        run.require(len(np.unique(chosen)) == len(chosen), f"{at}: a key is named twice")
        named[i, chosen] = True
    shortfall = selection_shortfall(logits, error, named, visible)
    worst = int(np.argmax(shortfall))
    run.require(
        bool(shortfall[worst] <= 0),
        f"indices[{worst}] leaves out a larger logit than one that it names, by {shortfall[worst]:.3g} more than the "
        f"errors of both explain",
    )
    return named
