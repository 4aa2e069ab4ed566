"""The judge: what passes, what fails, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.judging.judge import VACUITY, judge_same_bits, judge_within, require_bounded, require_meaningful
from mla_spec.judging.verdict import VacuousCase
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result
from mla_spec.subjects.violation import Violation


def result(value: Array) -> Result:
    return Result(value, value.astype(np.float32).view(np.int32), "out")


def bound(total: Array) -> ErrorBound:
    return ErrorBound({"small": 0.25 * total, "large": 0.75 * total})


WANT = np.array([[1.0, -2.0], [3.0, 4.0]])
WIDE = np.full((2, 2), 0.01)


def test_the_largest_ratio_is_returned() -> None:
    got = WANT + np.array([[0.005, 0.0], [0.0, -0.008]])
    assert judge_within(result(got), WANT, bound(WIDE)) == pytest.approx(0.8)


def test_one_element_outside_decides() -> None:
    got = WANT.copy()
    got[1, 0] += 0.02
    with pytest.raises(Violation) as caught:
        judge_within(result(got), WANT, bound(WIDE))
    text = str(caught.value)
    assert "out[1, 0]: got 3.02, want 3.0" in text
    assert "exceeds the bound 0.01 by a factor 2; 1 of 4 elements do" in text
    assert "main term of the bound: large (0.0075)" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_must_be_finite(bad: float) -> None:
    got = WANT.copy()
    got[0, 1] = bad
    with pytest.raises(Violation, match=r"out\[0, 1\]"):
        judge_within(result(got), WANT, bound(WIDE))


def test_an_infinity_must_be_the_same_one() -> None:
    want = np.array([-np.inf, 1.0])
    exact = ErrorBound({"bound": np.array([0.0, 0.01])})
    assert judge_within(result(want), want, exact) == 0
    for wrong in (np.inf, -1e30, np.nan):
        with pytest.raises(Violation):
            judge_within(result(np.array([wrong, 1.0])), want, exact)


def test_an_exact_value_allows_no_error() -> None:
    want = np.zeros(3)
    exact = ErrorBound({"bound": np.zeros(3)})
    assert judge_within(result(want), want, exact) == 0
    for error in (1e-300, 5e-324):
        with pytest.raises(Violation, match="by a factor inf; 3 of 3 elements do"):
            judge_within(result(want + error), want, exact)


def test_the_bound_itself_is_allowed_and_nothing_beyond() -> None:
    want, half = np.ones(4), ErrorBound({"bound": np.full(4, 0.5)})
    assert judge_within(result(np.array([1.5, 0.5, 1.0, 1.0])), want, half, gate=False) == 1
    beyond = np.array([1.5, 0.5, 1.75, 0.5 - 2.0**-53])
    with pytest.raises(Violation, match=r"out\[2\][\s\S]* 2 of 4 elements do"):
        judge_within(result(beyond), want, half, gate=False)
    with pytest.raises(Violation, match="1 of 4 elements do"):
        judge_within(result(np.nextafter(np.array([1.5, 1.0, 1.0, 1.0]), 2)), want, half, gate=False)


def test_nothing_to_judge_is_no_error() -> None:
    assert judge_within(result(np.ones(0)), np.ones(0), ErrorBound({"bound": np.ones(0)})) == 0


def test_no_output_makes_numpy_warn() -> None:
    wild = np.array([np.inf, -np.inf, np.nan, 1.7e308])
    want, got = np.array([np.inf, np.inf, 1.0, -1.7e308]), Result(wild, wild.view(np.int64), "out")
    with np.errstate(all="raise"), pytest.raises(Violation, match="3 of 4 elements do"):
        judge_within(got, want, bound(np.full(4, 1e-300)), gate=False)


def test_exact_values_do_not_make_a_bound_look_meaningful() -> None:
    want = np.array([1e-3, 1e-3, 100.0, -np.inf])
    loose = ErrorBound({"bound": np.array([1e-3, 1e-3, 0.0, 0.01])})
    with pytest.raises(VacuousCase, match=r"median bound 0\.001 exceeds 0\.05 × rms of the expected values 0\.001"):
        judge_within(result(want), want, loose)


def test_a_loose_bound_is_an_error_of_the_suite_even_for_a_perfect_result() -> None:
    rms = float(np.sqrt(np.mean(WANT**2)))
    judge_within(result(WANT), WANT, bound(np.full((2, 2), VACUITY * rms)))
    with pytest.raises(VacuousCase, match="too loose"):
        judge_within(result(WANT), WANT, bound(np.full((2, 2), 1.01 * VACUITY * rms)))
    with pytest.raises(VacuousCase):
        judge_within(result(WANT), WANT, bound(np.full((2, 2), np.inf)))


def test_what_lies_outside_a_loose_bound_is_a_violation() -> None:
    with pytest.raises(Violation):
        judge_within(result(WANT + 2), WANT, bound(np.ones((2, 2))))
    with pytest.raises(VacuousCase):
        judge_within(result(WANT + 1), WANT, bound(np.ones((2, 2))))


def test_an_expected_nan_must_meet_a_nan_and_excuses_nothing_else() -> None:
    want = np.array([np.nan, 1.0, 2.0])
    exact = ErrorBound({"bound": np.array([0.0, 0.01, 0.01])})
    assert judge_within(result(np.array([np.nan, 1.0, 2.005])), want, exact) == pytest.approx(0.5)
    for wrong in (0.0, np.inf, -np.inf):
        with pytest.raises(Violation, match=r"out\[0\]: got .*, want nan"):
            judge_within(result(np.array([wrong, 1.0, 2.0])), want, exact)
    with pytest.raises(Violation, match=r"out\[2\]: got 3\.0, want 2\.0[\s\S]*1 of 3 elements do"):
        judge_within(result(np.array([np.nan, 1.0, 3.0])), want, exact)


@pytest.mark.parametrize("gate", [True, False])
def test_an_infinite_bound_judges_nothing(gate: bool) -> None:
    """One element without a bound leaves the case open, be all others right; but a violation elsewhere is one."""
    loose = WIDE.copy()
    loose[1, 1] = np.inf
    for value in (4.0, 1e30):
        got = WANT.copy()
        got[1, 1] = value
        with pytest.raises(VacuousCase, match="the bound of 1 of 4 elements is no finite number"):
            judge_within(result(got), WANT, bound(loose), gate=gate)
    got = WANT.copy()
    got[0, 0] += 1
    with pytest.raises(Violation, match=r"out\[0, 0\]"):
        judge_within(result(got), WANT, bound(loose), gate=gate)


def test_no_bound_is_asked_of_what_is_exact_because_it_is_no_finite_number() -> None:
    want = np.array([-np.inf, np.nan, 1.0])
    open_ended = ErrorBound({"bound": np.array([np.inf, np.inf, 0.01])})
    assert judge_within(result(want), want, open_ended) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-3])
def test_what_is_no_bound_is_never_one(bad: float) -> None:
    total = np.array([0.01, bad])
    for want in (np.array([1.0, 1.0]), np.array([1.0, 0.0])):
        with pytest.raises(VacuousCase):
            require_bounded(want, total)
    with pytest.raises(VacuousCase):
        require_meaningful(np.array([1.0, 1.0, 1.0]), np.array([0.01, np.nan, np.nan]))
    require_bounded(np.array([1.0, -np.inf]), total)


def test_same_bits() -> None:
    judge_same_bits(result(WANT), result(WANT), "why")
    changed = WANT.copy()
    changed[0, 0] = np.nextafter(np.float32(1.0), np.float32(2.0))
    with pytest.raises(Violation, match=r"out\[0, 0\] changed from 1\.0 to 1\.00000011920928\d+: why"):
        judge_same_bits(result(changed), result(WANT), "why")


def test_the_sign_of_zero_is_no_difference_but_nan_is() -> None:
    judge_same_bits(result(np.array([-0.0])), result(np.array([0.0])), "why")
    with pytest.raises(Violation):
        judge_same_bits(result(np.array([np.nan])), result(np.array([0.0])), "why")


@pytest.mark.parametrize(("error", "told"), [(0.01, True), (0.5, False)])
def test_an_error_that_looks_like_a_rounding_names_the_field_that_declares_it(error: float, told: bool) -> None:
    want, bound = np.ones(2), ErrorBound({"rounding of P to bfloat16": np.full(2, 0.001)})
    with pytest.raises(Violation) as violation:
        judge_within(result(want + error), want, bound)
    last = str(violation.value).splitlines()[-1]
    assert (
        last
        == "if the subject rounds so on purpose, Profile.probabilities or probabilities_scale declares it, which makes the "
        "statement weaker"
    ) == told
