"""Laws of the numbers that production has: see ``mla_spec.properties.fixed``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Law, Run, as_test
from mla_spec.operations.all import CALLED
from mla_spec.operations.extent import Most
from mla_spec.operations.operation import Operation
from mla_spec.properties.cases import CASES, none
from mla_spec.subjects.supports import Supports


def agrees_at_production_counts(operation: Operation, run: Run, case: Any) -> None:
    """Hundreds of sequences and heads, and thousands of keys, tokens or indices, give what few of them give."""
    inputs = operation.build(case)
    run.agrees(operation, inputs, run.call(operation, inputs))


def _cases(operation: str, supports: Supports, profile: Profile) -> list[Any]:
    """Those that raise one number at a time, with no more sequences and keys than the subject takes, and those that raise several."""
    fixed, most = CASES[operation], Most.of(supports)
    counts = [most.cut(case, supports.topk_multiple) for case in fixed.counts(supports, profile)]
    # Of cases that the cut leaves alike but for their seeds, one is enough.
    counts = list({replace(case, seed=0): case for case in counts}.values())
    return [*counts, *fixed.crossed(supports, profile)]


def production_law(operation: Operation) -> Law:
    """The law of one operation."""
    check = partial(agrees_at_production_counts, operation)
    check.__doc__ = agrees_at_production_counts.__doc__
    name = f"test_{operation.name}_at_production_counts"
    return Law(name, (operation.name,), partial(_cases, operation.name), check, operation.missing)


LAWS = tuple(production_law(operation) for operation in CALLED if CASES[operation.name].counts is not none)

globals().update({made.name: as_test(made, __name__) for made in LAWS})
