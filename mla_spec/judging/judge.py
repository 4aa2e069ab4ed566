"""Compares what a subject returned with what it may return. Sees data only, never a subject."""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.judging.verdict import VacuousCase
from mla_spec.reference.typing import Array, BoolArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.violation import Violation

VACUITY = 0.05
"""A case is judged only if median(bound) / rms(want) is at most this."""


def judge_within(got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> float:
    """Largest |got − want| / bound over all elements; every one must be at most 1.

    Where ``want`` is infinite or NaN, ``got`` must be the same; elsewhere it must be finite.

    Args:
        gate: whether a bound that is loose against ``want`` is refused. False where ``want`` may lie near 0.

    Raises:
        Violation: an element lies outside its bound, however loose that is.
        VacuousCase: none does, but the bound is too loose to mean anything, or no finite number for some element that has one.
    """
    total = np.broadcast_to(bound.total, want.shape)
    ratio = ratios(got, want, total)
    if ratio.size == 0:
        return 0.0
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    if not ratio[index] <= 1:
        raise Violation(_describe(got, want, total, bound, index, int((ratio > 1).sum())))
    if gate:
        require_meaningful(want, total)
    require_bounded(want, total)
    return float(ratio[index])


def ratios(got: Result, want: Array, total: Array) -> Array:
    """|got − want| / bound of each element; infinite where only one of them is a finite number."""
    same = (got.value == want) | (np.isnan(got.value) & np.isnan(want))
    finite = np.isfinite(want) & np.isfinite(got.value)
    with np.errstate(all="ignore"):  # a subject may return anything
        ratio = np.where(finite, np.abs(got.value - want) / total, np.inf)
    return np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def require_meaningful(want: Array, total: Array) -> None:
    """Raise VacuousCase unless the median bound is at most 5 % of the rms of the expected values that are not exact."""
    inexact = np.isfinite(want) & (total != 0)
    if not inexact.any():
        return
    rms = float(np.sqrt(np.mean(want[inexact] ** 2)))
    median = float(np.median(total[inexact]))
    if not median <= VACUITY * rms:
        raise VacuousCase(
            f"the bound is too loose to judge this case: median bound {median:.3g} exceeds {VACUITY} × rms of the "
            f"expected values {rms:.3g}"
        )


def require_bounded(want: Array, total: Array) -> None:
    """Raise VacuousCase unless every finite number of ``want`` has a finite bound, 0 or more; equal shapes."""
    unjudged = int((np.isfinite(want) & ~(np.isfinite(total) & (total >= 0))).sum())
    if unjudged:
        raise VacuousCase(
            f"the bound of {unjudged} of {want.size} elements is no finite number, so anything would pass"
        )


def changed(got: Result, want: Result) -> BoolArray:
    """Which elements have other bits, the sign of zeros aside; of the results' shape."""
    found: BoolArray = (got.bits != want.bits) & ~((got.value == 0) & (want.value == 0))
    return found


def judge_same_bits(got: Result, want: Result, why: str) -> None:
    """Raise Violation unless all bit patterns agree, the sign of zeros aside.

    A masked weight 0 times a negative value is -0, which is no dependence on that value. ``why`` says what must not have
    changed the bits.
    """
    different = changed(got, want)
    if not different.any():
        return
    index = tuple(int(i) for i in np.argwhere(different)[0])
    raise Violation(
        f"{got.what}{list(index)} changed from {float(want.value[index])!r} to {float(got.value[index])!r}: {why}\n"
        f"{int(different.sum())} of {different.size} elements differ; the bits must be the same"
    )


def _describe(got: Result, want: Array, total: Array, bound: ErrorBound, index: tuple[int, ...], outside: int) -> str:
    terms = bound.map(lambda term: np.broadcast_to(term, want.shape))
    main = terms.main_term(index)
    with np.errstate(all="ignore"):
        error = abs(got.value[index] - want[index])
        factor = error / total[index]
    return (
        f"{got.what}{list(index)}: got {float(got.value[index])!r}, want {float(want[index])!r}\n"
        f"error {error:.3g} exceeds the bound {total[index]:.3g} by a factor {factor:.3g}; "
        f"{outside} of {want.size} elements do\n"
        f"main term of the bound: {main} ({terms.terms[main][index]:.3g})"
        f"{_declarable(main, float(factor), float(error), abs(float(want[index])))}"
    )


FIELDS = {
    "error of the scores": "score, score_format or query",
    "rounding of P": "probabilities or probabilities_scale",
    "accumulation of P·V": "value",
    "merging of parts": "splits, merge_every, merge_shares or split_format",
    "row sum": "row_sum or softmax",
    "logarithm": "lse",
    "log-sum-exp": "merge_shares or softmax",
    "weights in": "merge_shares or softmax",
    "rounding of the output": "output or output_rounding",
    "rounding of the LSE": "lse",
    "frequency and angle": "rope.frequency or rope.angle",
    "cos and sin table": "rope.table",
    "rotation in": "rope.rotation",
    "accumulation of the projection": "linear",
    "products of q and k": "score",
}
"""Fields of a Profile by the beginning of the terms that they make larger."""

LIKE_ROUNDING = 2.0**-5
"""Error, relative to what is expected, up to which a rounding of 8 bits may have made it."""


def _declarable(term: str, factor: float, error: float, want: float) -> str:
    """Which field of a Profile allows an error that looks like a rounding; "" where there is none, or it looks like none."""
    field = next((field for start, field in FIELDS.items() if term.startswith(start)), "")
    if not field or not error <= LIKE_ROUNDING * want or not factor < 2.0**20:
        return ""
    return f"\nif the subject rounds so on purpose, Profile.{field} declares it, which makes the statement weaker"


class PlainJudge:
    """Judges as a run does, and keeps no record."""

    def within(self, got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> None:
        judge_within(got, want, bound, gate=gate)

    def bounded(self, want: Array, total: Array) -> None:
        require_bounded(want, total)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise Violation(message)
