"""What an operation is: everything that the suite knows of it, as data.

An operation's module holds its cases and one ``Operation``; the module's docstring is its contract. One engine,
``mla_spec.subjects.driver``, calls all of them. Laws of hazards, which do not ask what a call computes, are made from this
data for every operation (``mla_spec.properties.test_hazards``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.operations.case import Case
from mla_spec.operations.conventions import Convention
from mla_spec.operations.lattice import Lattice
from mla_spec.operations.regimes import Regime
from mla_spec.operations.workload_line import WorkloadLine
from mla_spec.reference.typing import Array, BoolArray
from mla_spec.subjects.driver import Result, Tensors
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import behind_others

View = Callable[[Tensors], Tensors]
"""From the tensor arguments, the same contents in other memory."""


class Judge(Protocol):
    """What judges results: see ``mla_spec.judging.law.Run``."""

    def within(self, got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> None:
        """Raise Violation unless every element is within its bound."""

    def bounded(self, want: Array, total: Array) -> None:
        """Raise VacuousCase unless every finite number of ``want`` has a finite bound."""

    def require(self, condition: bool, message: str) -> None:
        """Raise Violation with ``message`` unless ``condition``."""


class Expected(Protocol):
    """What one output must be."""

    def judge(self, judge: Judge, got: Result) -> None:
        """Raise Violation unless ``got`` is what it must be."""


@dataclass(frozen=True)
class Within:
    """An exact value and how far the output may be from it.

    Attributes:
        gate: whether a bound that is loose against the value is refused.
        read: which elements are judged; None for all. The others may be anything.
    """

    value: Array
    bound: ErrorBound
    gate: bool = False
    read: BoolArray | None = None

    def judge(self, judge: Judge, got: Result) -> None:
        """Every element that is read lies within its bound."""
        shown = got if self.read is None else Result(np.where(self.read, got.value, self.value), got.bits, got.what)
        judge.within(shown, self.value, self.bound, gate=self.gate)


@dataclass(frozen=True)
class Exactly:
    """The very numbers that an output must hold, NaN where NaN is."""

    value: Array

    def judge(self, judge: Judge, got: Result) -> None:
        """No element differs."""
        different = ~((got.value == self.value) | (np.isnan(got.value) & np.isnan(self.value)))
        first = [int(i) for i in np.argwhere(different)[0]] if different.any() else []
        judge.require(
            not different.any(),
            f"{got.what}{first}: {int(different.sum())} of {different.size} elements are not exactly what they must be",
        )


Answers = tuple[Expected | None, ...]
"""What each output of a call must be, in their order; None for one that the subject does not offer."""


@dataclass(frozen=True, kw_only=True)
class Operation(Signature):
    """One thing that a subject may be asked to compute.

    Attributes:
        contract: the text that states it; the docstring of its module.
        case: class of its cases.
        build: from a case, the inputs of the call.
        expected: from inputs, a profile and what the subject supports, what each output must be, in their order; None for an
            output that the subject does not offer.
        views: ways to pass the same arguments as views of larger or transposed tensors, by name.
        others: from a case, inputs of other calls with tensors of the same shapes: other values, lengths, tables, positions
            and scales. Where a case has lengths, one of them permutes them: batch, longest and total stay.
        distant: from a case, inputs in which every argument that may lie far apart has three elements on its first axis.
        missing: from what the subject supports, why no case can be made, or "".
        tight: inputs without what no call needs: spare pages, spare columns of a table.
        conventions: others than the contract's, which a report names where a subject obeys one.
        recorded: from the arguments of a recorded call, by name, the inputs that ``expected`` takes; None where what it must
            give does not follow from the arguments of a call alone.
        probable: as ``expected``, by bounds of which an honest call exceeds any with no more than a given probability; None
            where there are none but the worst case.
        lattice: sizes for which ``mla-spec map`` says what a subject does; None where there are none.
        workload: what a line of a workload holds of it; None where a workload has none.
    """

    contract: str = field(repr=False)
    case: type[Case]
    build: Callable[[Any], Any] = lambda case: case.build()
    expected: Callable[[Any, Profile, Supports], Answers]
    views: Mapping[str, View]
    regimes: tuple[Regime, ...] = ()
    others: Callable[[Any], tuple[Any, ...]]
    distant: Callable[[Any], Any]
    missing: Callable[[Supports], str] = lambda _: ""
    tight: Callable[[Any], Any] = lambda inputs: inputs
    conventions: tuple[Convention, ...] = ()
    recorded: Callable[[Any], Any] | None = None
    probable: Callable[[Any, Profile, Supports, float], Answers] | None = None
    lattice: Lattice | None = None
    workload: WorkloadLine | None = None

    @property
    def all_views(self) -> Mapping[str, View]:
        """``views``, and one for all arguments, which do not begin where their memory does."""
        return {**self.views, "every argument behind another in its memory": behind_others}


def as_it_is(inputs: Any) -> Any:
    """The arguments of a recorded call, where ``expected`` takes them so."""
    return inputs
