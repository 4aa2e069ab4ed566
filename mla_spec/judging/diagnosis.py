"""Says which other convention a wrong result obeys."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.finding import Finding
from mla_spec.judging.judge import PlainJudge
from mla_spec.judging.verdict import VacuousCase
from mla_spec.operations.conventions import Convention
from mla_spec.operations.operation import Operation
from mla_spec.subjects.driver import Results
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

LARGEST = 1 << 20
"""Elements of an argument beyond which no convention is looked for: each computes the exact results anew."""


def obeyed(
    operation: Operation, inputs: Any, got: Results, profile: Profile, supports: Supports
) -> tuple[Convention, ...]:
    """The conventions under which results are right that are wrong under the contract's."""

    def right(inputs: Any, got: Results) -> bool:
        try:
            for part, want in zip(got, operation.expected(inputs, profile, supports), strict=True):
                if part is not None and want is not None:
                    want.judge(PlainJudge(), part)
        except (Violation, VacuousCase, InvalidBound):
            return False
        return True

    if not operation.conventions or _is_large(inputs) or right(inputs, got):
        return ()
    seen = ((convention, convention.seen(inputs, got)) for convention in operation.conventions)
    return tuple(convention for convention, other in seen if other is not None and right(*other))


def diagnosis(conventions: tuple[Convention, ...]) -> str:
    """A sentence on the conventions that a subject obeys; "" where there is none."""
    return f"all would be right if {', or '.join(convention.what for convention in conventions)}" if conventions else ""


def finding(convention: Convention) -> Finding:
    """What is found out where a subject obeys a convention."""
    declare = f"; if that is intended, declare Supports({convention.declare})" if convention.declare else ""
    return Finding(convention.topic, f"all would be right if {convention.what}{declare}")


def _is_large(inputs: Any) -> bool:
    return any(np.size(x) > LARGEST for x in vars(inputs).values() if isinstance(x, np.ndarray))
