"""What must hold of attention: results against the exact ones, and parts that a subject computed and merges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.merge import BoundedMerge, merge_with_bound
from mla_spec.judging.law import Run
from mla_spec.operations.decode import declared_lse
from mla_spec.operations.merge import OPERATION as MERGE
from mla_spec.operations.merge import MergeInputs
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports


def needs_several_sequences(supports: Supports) -> str:
    """Why sequences of one call cannot be compared, or ""."""
    return "a call takes one sequence" if supports.max_batch == 1 else ""


def judge_attention(run: Run, got: tuple[Result, Result | None], want: BoundedAttention) -> None:
    """Judge out of decode or prefill, and the LSE where the subject returns one, against the exact result."""
    run.within(got[0], want.out, want.out_error)
    if got[1] is not None:
        run.within(got[1], declared_lse(want.lse, run.supports), want.lse_error, gate=False)


Expected = BoundedMerge | BoundedAttention


def judge_merge(run: Run, got: tuple[Result, Result], want: Expected, *, gate: bool = True) -> None:
    """Judge out and LSE of a merge against the exact result."""
    run.within(got[0], want.out, want.out_error, gate=gate)
    run.within(got[1], declared_lse(want.lse, run.supports), want.lse_error, gate=False)


def judge_merged_results(run: Run, got: Sequence[tuple[Result, Result]], want: Sequence[Expected]) -> None:
    """Have the subject merge what it returned for some parts, and judge that against the merge of their exact values."""
    whole = merge_with_bound(
        np.stack([part.out for part in want]),
        np.stack([part.lse for part in want]),
        run.profile,
        out_errors=np.stack([part.out_error.total for part in want]),
        lse_errors=np.stack([part.lse_error.total + _conversion_error(run, part.lse) for part in want]),
    )
    outs, lses = (np.stack([part[i].value for part in got]) for i in (0, 1))
    lses = np.where(np.isposinf(lses), -np.inf, lses) if run.supports.empty_row == "zero/+inf" else lses
    judge_merge(run, run.call(MERGE, MergeInputs(outs=outs, lses=lses)), whole)


def _conversion_error(run: Run, lse: Array) -> Array:
    """What an LSE that was returned in float64 loses when it is passed on in float32."""
    u = format_of("float64" if run.driver.dtype == "float64" else "float32").unit_roundoff
    return np.where(np.isneginf(lse), 0.0, 2 * u * np.abs(lse))
