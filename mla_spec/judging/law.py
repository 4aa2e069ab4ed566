"""What a law is, and how one is run on a subject."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.anatomy import Anatomy, anatomy_of
from mla_spec.judging.diagnosis import obeyed
from mla_spec.judging.judge import judge_same_bits, judge_within, ratios, require_bounded, require_meaningful
from mla_spec.judging.quick import EXAMPLES as QUICK_EXAMPLES
from mla_spec.judging.quick import MINIMISING as QUICK_MINIMISING
from mla_spec.judging.spread import Spread, added, counted
from mla_spec.judging.verdict import TrivialCase, VacuousCase
from mla_spec.operations.case import Case
from mla_spec.operations.conventions import Convention
from mla_spec.operations.operation import Answers, Operation, Within
from mla_spec.reference.typing import Array
from mla_spec.subjects.configured import Dims
from mla_spec.subjects.driver import Driver, Result, Results, Tensors
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True, kw_only=True)
class Production:
    """How large the cases of production laws are.

    Attributes:
        budget: seconds that a law may take in all dtypes; cases grow until the next would take longer.
        seed: of the cases.
        workload: cases recorded elsewhere, of any dtype, which replace those of the suite; none for no such file.
    """

    budget: float = 60.0
    seed: int = 0
    workload: tuple[Case, ...] = ()


@dataclass
class Run:
    """What a law's function works with: a driver of the subject, and the judge.

    The judge's largest error / bound over the law's cases is kept in ``worst``, and what a law had to leave out in ``left_out``.
    ``compared`` counts the elements that the judge saw of a case, None where it was not asked. ``note`` says what of the last
    case was looked at, where that is not all, ``seconds`` how long calls of the subject took, ``exhausted`` that the last case
    was too large for the memory there is. Where P is so coarse that a worst case says nothing, ``sharp`` and ``loose`` count the
    comparisons whose probable bound says something, and those whose does not; ``calls`` are the last ones of a subject that is not
    deterministic. ``compile``, ``isolated`` and ``production`` are those of the options.
    ``last`` is the last call of an operation: inputs and results. ``anatomy`` is that of the result that failed, and
    ``case_worst`` the largest error / bound of the last case. ``spread`` counts elements by their errors.
    """

    driver: Driver
    profile: Profile
    supports: Supports
    worst: float | None = None
    worst_case: str = ""
    case_id: str = ""
    case_worst: float | None = None
    compared: int | None = None
    compile: str | None = None
    isolated: bool = False
    left_out: str = ""
    note: str = ""
    seconds: float = 0.0
    exhausted: bool = False
    sharp: int = 0
    loose: int = 0
    calls: list[tuple[Operation, Any, Results]] = field(default_factory=list, repr=False)
    production: Production = Production()
    last: tuple[Operation, Any, Results] | None = None
    anatomy: Anatomy = field(default_factory=dict)
    spread: Spread = field(default_factory=dict)

    def call(self, operation: Operation, inputs: Any, tensors: Tensors | None = None) -> Results:
        """The outputs of an operation of the subject. ``tensors`` replace those built from ``inputs``."""
        start = time.perf_counter()
        results = self.driver.call(operation, inputs, tensors)
        self.seconds += time.perf_counter() - start
        if not self.profile.deterministic:
            self.calls = [*self.calls[-3:], (operation, inputs, results)]
        self.last = operation, inputs, results
        return results

    def obeyed(self) -> tuple[Convention, ...]:
        """Which other conventions the results of the last call obey, where they are wrong."""
        return () if self.last is None else obeyed(*self.last, self.profile, self.supports)

    def expected(self, operation: Operation, inputs: Any) -> Answers:
        """What each output of a call on ``inputs`` must be; None for one that is not offered."""
        return operation.expected(inputs, self.profile, self.supports)

    def agrees(self, operation: Operation, inputs: Any, got: Results, wanted: Answers | None = None) -> None:
        """Judge the outputs of a call on ``inputs`` against what they must be: ``wanted``, where that is known already."""
        for part, want in zip(got, wanted or self.expected(operation, inputs), strict=True):
            if part is not None and want is not None:
                want.judge(self, part)

    def same(self, got: Results, want: Results, why: str) -> None:
        """No bit of any output differs."""
        for a, b in zip(got, want, strict=True):
            if a is not None and b is not None:
                self.same_bits(a, b, why)

    def within(self, got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> None:
        """``judge_within``, recorded."""
        self.compares(got.value.size)
        if gate and self.profile.coarse:
            gate = self._counted(want, bound)
        with self._dissected(got, want, bound.total):
            ratio = judge_within(got, want, bound, gate=gate)
        self.counts("bound", ratios(got, want, np.broadcast_to(bound.total, want.shape)))
        self.case_worst = max(ratio, self.case_worst or 0.0)
        if self.worst is None or ratio > self.worst:
            self.worst, self.worst_case = ratio, self.case_id

    def counts(self, kind: str, ratio: Array) -> None:
        """Count errors of a kind of ``mla_spec.judging.spread``."""
        self.spread = added([self.spread, {kind: counted(kind, ratio)}])

    def _counted(self, want: Array, bound: ErrorBound) -> bool:
        """Count a comparison as sharp or loose; whether it is sharp."""
        try:
            require_meaningful(want, np.broadcast_to(bound.total, want.shape))
        except VacuousCase:
            self.loose += 1
            return False
        self.sharp += 1
        return True

    @property
    def coarseness(self) -> str:
        """Of a profile whose worst case says nothing: by what the law was judged. "" of any other."""
        if not self.sharp + self.loose:
            return ""
        return (
            f"P in {self.profile.probabilities} may move an output by more than 5 %: {self.sharp} of {self.sharp + self.loose} "
            "comparisons were judged by the probable bound (1e-9 a call), the others, of few keys, by a worst case that says "
            "little"
        )

    def meaningful(self, want: Array, bound: ErrorBound) -> None:
        """``require_meaningful`` for a case whose results are judged in parts."""
        if self.profile.coarse:
            self._counted(want, bound)
        else:
            require_meaningful(want, bound.total)

    def bounded(self, want: Array, total: Array) -> None:
        """``require_bounded`` for results that a law compares itself."""
        require_bounded(want, total)

    def same_bits(self, got: Result, want: Result, why: str) -> None:
        """``judge_same_bits``; of a subject that is not deterministic, that both lie within the bound of the same value."""
        self.compares(got.value.size)
        if self.profile.deterministic:
            with self._dissected(got, want.value, None):
                judge_same_bits(got, want, why)
            return
        self.note = (
            "the subject is not deterministic: where bits should be the same, they were compared within the bound"
        )
        allowed = self._largest_error(want)
        if allowed is None:
            self.leave_out("bits were to be compared that have no bound, and the subject is not deterministic")
            return
        bound = ErrorBound({"largest of the call": np.full(want.value.shape, allowed)})
        self.same_function(got, want, bound, why)

    def _largest_error(self, part: Result) -> float | None:
        """The largest bound in the output of a recent call that ``part`` is, or is a part of; None of anything else."""
        for operation, inputs, results in reversed(self.calls):
            for i, output in enumerate(results):
                if output is not None and np.shares_memory(output.value, part.value):
                    want = self.expected(operation, inputs)[i]
                    return float(want.bound.total.max(initial=0.0)) if isinstance(want, Within) else None
        return None

    @contextmanager
    def _dissected(self, got: Result, want: Array, allowed: Array | None) -> Iterator[None]:
        """Keep the anatomy of what the judge finds wrong."""
        try:
            yield
        except Violation:
            self.anatomy = anatomy_of(got.what, got.value, want, allowed)
            raise

    def same_function(self, got: Result, want: Result, bound: ErrorBound, why: str) -> None:
        """Two results of the subject for the same exact value, each within ``bound`` of it; NaN is no result."""
        self.require(not np.isnan(want.value).any(), f"{want.what} has NaN: {why}")
        twice = bound.map(lambda term: 2 * term)
        try:
            self.within(got, want.value, twice, gate=False)
        except Violation as violation:
            raise Violation(f"{violation}\n{why}") from None

    def leave_out(self, why: str) -> None:
        """Go on without a part of the law that cannot be judged here: its verdict is no pass."""
        self.left_out = self.left_out or why

    def compares(self, elements: int) -> None:
        """Note that so many elements are judged: a case of which none is shows nothing."""
        self.compared = (self.compared or 0) + elements

    def trivial(self, why: str) -> NoReturn:
        """End the case: nothing that the subject could have returned would have failed. ``why`` is a clause."""
        raise TrivialCase(why)

    def require(self, condition: bool, message: str) -> None:
        """Raise Violation with ``message`` unless ``condition``."""
        if not condition:
            raise Violation(message)


def _names(needs: Needed) -> tuple[str, ...]:
    each = needs if isinstance(needs, tuple) else (needs,)
    return tuple(operation if isinstance(operation, str) else operation.name for operation in each)


Live = Literal["", "calls", "tensors"]
"""What a law looks at beside answers."""

CaseSource = Callable[[Supports, Profile], "SearchStrategy[Any] | list[Any]"]


@dataclass(frozen=True)
class Law:
    """A statement that every subject offering ``needs`` must satisfy.

    Attributes:
        name: of the test function; part of the public interface.
        needs: operations the subject must offer.
        cases: from what the subject supports and its profile for a dtype, a strategy of cases, or a list of all of them.
        check: (run, case) -> None; raises Violation.
        missing: from what the subject supports, why the law does not apply, or "".
        unavailable: from how laws are run, why this one cannot be, or "".
        cost: one case of it runs for every so many examples that were asked for.
        first: from the same as ``cases``, cases that run before any of them, whatever number of examples is asked for.
        grown: from a run, cases in place of ``cases``, each chosen after the one before it has been judged.
        live: what it looks at beside answers: "calls", that one process answers them one after the other, or "tensors", the
            tensors that a subject itself gets and returns.
    """

    name: str
    needs: tuple[str, ...]
    cases: CaseSource
    check: Callable[[Run, Any], None] = field(repr=False)
    missing: Callable[[Supports], str] = field(repr=False)
    unavailable: Callable[[Options], str] = field(default=lambda _: "", repr=False)
    cost: int = 1
    first: Callable[[Supports, Profile], list[Any]] = field(default=lambda *_: [], repr=False)
    grown: Callable[[Run], Iterable[Any]] | None = field(default=None, repr=False)
    live: Live = ""

    def out_of_reach(self, elsewhere: str) -> str:
        """Why it cannot be judged by answers that come from ``elsewhere``, "pipe" or "files"; or ""."""
        if elsewhere == "files" and self.live:
            return "outputs come from files: this law needs a live subject"
        if elsewhere == "pipe" and self.live == "tensors":
            return "answers come through a pipe: this law needs the subject's own tensors"
        return ""

    @property
    def statement(self) -> str:
        """First line of the law's docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


Needed = Operation | str | tuple[Operation | str, ...]
"""The operations that a law needs, or their names."""


def law(
    *,
    needs: Needed,
    cases: CaseSource,
    missing: Callable[[Supports], str] = lambda _: "",
    unavailable: Callable[[Options], str] = lambda _: "",
    cost: int = 1,
    first: Callable[[Supports, Profile], list[Any]] = lambda *_: [],
    live: Live = "",
) -> Callable[[Callable[[Run, Any], None]], Callable[[Any], None]]:
    """Make a law of a function (run, case); what remains is a pytest test that takes the fixture ``mla_check``."""

    def decorate(check: Callable[[Run, Any], None]) -> Callable[[Any], None]:
        made = Law(check.__name__, _names(needs), cases, check, missing, unavailable, cost, first, live=live)
        return as_test(made, check.__module__)

    return decorate


def as_test(made: Law, module: str) -> Callable[[Any], None]:
    """A pytest test of ``module`` that takes the fixture ``mla_check``, and bears the law as ``law``."""

    def test(mla_check: Callable[[Law], None]) -> None:
        mla_check(made)

    # Not functools.wraps: pytest would look through it to the parameters of ``check``.
    test.__name__ = test.__qualname__ = made.name
    test.__doc__, test.__module__ = made.check.__doc__, module
    test.law = made  # type: ignore[attr-defined]
    return test


EXAMPLES = 25
MINIMISING = 60.0
"""What ``Options`` means where it names no number of cases, and no seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How laws are run.

    Attributes:
        examples: generated cases per law, spread over the dtypes; None for 25, or for 8 in a quick check.
        quick: whether only elementary laws run, where none is named, and cases are small.
        seed: of the generation; equal seeds give equal cases.
        device: torch device of the tensors.
        threads: of torch's operators on the CPU while laws run. Cases are small, so more only cost time; a kernel whose
            threads may race deserves more.
        dtypes: only these; None for all that the subject supports.
        spread: dtypes over which examples are spread, where some of them run elsewhere; None for those that run.
        until_failure: whether dtypes that follow a failing one are left out.
        begin: cases that run before those of the law, in their own dtypes.
        case: run this one case instead.
        minimise: whether a failing case is made smaller.
        minimise_seconds: in which that has to be done; None for 60, or for 10 in a quick check.
        compile: backend of ``torch.compile`` with which laws of compiled operations run; None where they do not.
        production: how large the cases of production laws are; None where they do not run.
        dims: the only dims that a subject is given, by fields of ``Supports``; empty for all that it supports.
        under: the command under which the subject's process runs, for replay commands; empty for none.
        isolated: whether a subject that ends the process costs one law only.
        spec: arguments by which ``mla-spec check`` finds the subject, for replay commands; None where it cannot.
        announce: called with each case before it runs.
        tell: whether a subject that fails is also given inputs that tell which part of its computation is wrong.
    """

    examples: int | None = None
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    dtypes: tuple[str, ...] | None = None
    spread: int | None = None
    until_failure: bool = False
    begin: tuple[Case, ...] = ()
    case: Case | None = None
    minimise: bool = True
    minimise_seconds: float | None = None
    compile: str | None = None
    production: Production | None = None
    dims: Dims = ()
    under: str = ""
    isolated: bool = False
    spec: tuple[str, ...] | None = None
    announce: Callable[[Case], None] | None = None
    tell: bool = False

    @property
    def count(self) -> int:
        """Generated cases per law."""
        return self.examples if self.examples is not None else QUICK_EXAMPLES if self.quick else EXAMPLES

    @property
    def patience(self) -> float:
        """Seconds in which a failing case has to be made smaller."""
        given = self.minimise_seconds
        return given if given is not None else QUICK_MINIMISING if self.quick else MINIMISING


def new_seed() -> int:
    """A seed that no subject can know before its run."""
    return secrets.randbelow(2**32)


EVERY_REGIME = "every regime"
"""Stands for the regimes of a law that no subject could be given a case of."""


Cell = tuple[str, str, str]
"""Law, regime, dtype."""


@dataclass(frozen=True)
class Reason:
    """Why some cells have no case.

    Attributes:
        laws, regimes, dtypes: patterns of shell style; a cell that matches one of each is meant.
        why: a clause.
    """

    laws: tuple[str, ...]
    regimes: tuple[str, ...]
    why: str
    dtypes: tuple[str, ...] = ("*",)

    def covers(self, cell: Cell) -> bool:
        patterns = (self.laws, self.regimes, self.dtypes)
        return all(any(fnmatchcase(part, p) for p in ps) for part, ps in zip(cell, patterns, strict=True))
