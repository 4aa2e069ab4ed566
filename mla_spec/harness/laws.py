"""What a law is, and how one is run on a subject."""

from __future__ import annotations

import functools
import importlib
import shlex
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis
import torch
from hypothesis import Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS

from mla_spec.harness.cases import Case
from mla_spec.harness.contract import Supports, offers, profile_of, subject_name, supports_of
from mla_spec.harness.driver import Driver, Result
from mla_spec.harness.judge import judge_same_bits, judge_within, require_meaningful
from mla_spec.harness.verdict import NotOffered, Record, SubjectCrashed, VacuousCase, Verdict, Violation, merge
from mla_spec.reference.error_bound import ErrorBound
from mla_spec.reference.profile import Profile
from mla_spec.reference.typing import Array

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LAW_MODULES = (
    "test_rope",
    "test_absorb",
    "test_weights",
    "test_decode",
    "test_decode_exact",
    "test_decode_memory",
    "test_decode_tables",
    "test_statistics",
    "test_prefill",
    "test_backward",
    "test_merge",
    "test_write_cache",
    "test_sparse",
    "test_project_indexer",
    "test_indexer",
    "test_indexed_attention",
    "test_quantised_cache",
    "test_quantised_decode",
    "test_layer",
    "test_layer_gradients",
    "test_tensor_parallel",
    "test_context_parallel",
    "test_far_memory",
    "test_state",
    "test_compiled",
)
"""Modules of ``mla_spec.properties`` that hold laws, in the order of the report."""


# Under the name "hypothesis" later examples repeat parts of earlier ones, which is no use where the values come from a
# seed. Any other backend draws every example anew.
BACKEND = "mla-spec"
AVAILABLE_PROVIDERS[BACKEND] = AVAILABLE_PROVIDERS["hypothesis"]


@dataclass
class Run:
    """What a law's function works with: a driver of the subject, and the judge.

    The judge's largest error / bound over the law's cases is kept in ``worst``. ``compile`` is that of the options.
    """

    driver: Driver
    profile: Profile
    supports: Supports
    worst: float | None = None
    worst_case: str = ""
    case_id: str = ""
    compile: str | None = None

    def within(self, got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> None:
        """``judge_within``, recorded."""
        ratio = judge_within(got, want, bound, gate=gate)
        if self.worst is None or ratio > self.worst:
            self.worst, self.worst_case = ratio, self.case_id

    def meaningful(self, want: Array, bound: ErrorBound) -> None:
        """``require_meaningful`` for a case whose results are judged in parts."""
        require_meaningful(want, bound.total)

    def same_bits(self, got: Result, want: Result, why: str) -> None:
        """``judge_same_bits``."""
        judge_same_bits(got, want, why)

    def same_function(self, got: Result, want: Result, bound: ErrorBound, why: str) -> None:
        """Two results of the subject for the same exact value, each within ``bound`` of it."""
        twice = bound.map(lambda term: 2 * term)
        try:
            self.within(got, want.value, twice, gate=False)
        except Violation as violation:
            raise Violation(f"{violation}\n{why}") from None

    def require(self, condition: bool, message: str) -> None:
        """Raise Violation with ``message`` unless ``condition``."""
        if not condition:
            raise Violation(message)


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
    """

    name: str
    needs: tuple[str, ...]
    cases: CaseSource
    check: Callable[[Run, Any], None] = field(repr=False)
    missing: Callable[[Supports], str] = field(repr=False)
    unavailable: Callable[[Options], str] = field(default=lambda _: "", repr=False)
    cost: int = 1

    @property
    def statement(self) -> str:
        """First line of the law's docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


def law(
    *,
    needs: tuple[str, ...],
    cases: CaseSource,
    missing: Callable[[Supports], str] = lambda _: "",
    unavailable: Callable[[Options], str] = lambda _: "",
    cost: int = 1,
) -> Callable[[Callable[[Run, Any], None]], Callable[[Any], None]]:
    """Make a law of a function (run, case); what remains is a pytest test that takes the fixture ``mla_check``."""

    def decorate(check: Callable[[Run, Any], None]) -> Callable[[Any], None]:
        made = Law(check.__name__, needs, cases, check, missing, unavailable, cost)

        def test(mla_check: Callable[[Law], None]) -> None:
            mla_check(made)

        # Not functools.wraps: pytest would look through it to the parameters of ``check``.
        test.__name__, test.__qualname__, test.__doc__ = check.__name__, check.__qualname__, check.__doc__
        test.__module__ = check.__module__
        test.law = made  # type: ignore[attr-defined]
        return test

    return decorate


@functools.cache
def all_laws() -> dict[str, Law]:
    """Every law by name, in the order of the report."""
    laws: dict[str, Law] = {}
    for name in LAW_MODULES:
        module = importlib.import_module(f"mla_spec.properties.{name}")
        for value in vars(module).values():
            made = getattr(value, "law", None)
            if isinstance(made, Law):
                laws[made.name] = made
    return laws


@dataclass(frozen=True, kw_only=True)
class Options:
    """How laws are run.

    Attributes:
        examples: generated cases per law, spread over the dtypes.
        seed: of the generation; equal seeds give equal cases.
        device: torch device of the tensors.
        threads: of torch's operators on the CPU while laws run. Cases are small, so more only cost time; a kernel whose
            threads may race deserves more.
        dtypes: only these; None for all that the subject supports.
        case: run this one case instead.
        minimise: whether a failing case is made smaller.
        compile: backend of ``torch.compile`` with which laws of compiled operations run; None where they do not.
        spec: arguments by which ``mla-spec check`` finds the subject, for replay commands; None where it cannot.
        announce: called with each case before it runs.
    """

    examples: int = 100
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    dtypes: tuple[str, ...] | None = None
    case: Case | None = None
    minimise: bool = True
    compile: str | None = None
    spec: tuple[str, ...] | None = None
    announce: Callable[[Case], None] | None = None


def run_law(made: Law, subject: object, options: Options = Options()) -> Record:
    """Run a law on a subject, dtype after dtype until one fails, and say what came of it."""
    supports = supports_of(subject)
    name = subject_name(subject)
    absent = [operation for operation in made.needs if not offers(subject, operation)]
    reason = f"does not offer {', '.join(absent)}" if absent else made.unavailable(options) or made.missing(supports)
    dtypes = [d for d in supports.dtypes if options.dtypes is None or d in options.dtypes]
    if options.case is not None:
        dtypes = [options.case.dtype]
    if not reason and not dtypes:
        reason = f"supports none of the dtypes {', '.join(options.dtypes or ())}"
    if reason:
        return Record(made.name, name, "unsupported", message=reason)
    share = max(1, -(-options.examples // (len(dtypes) * made.cost)))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        records = []
        for dtype in dtypes:
            records.append(_run_dtype(made, subject, dtype, share, options))
            if records[-1].verdict not in ("pass", "incomplete"):
                break
        return merge(records)
    finally:
        torch.set_num_threads(before)


def replay_command(law: str, case: Case, options: Options) -> str:
    """The command line that runs one case again; empty where none can find the subject."""
    if options.spec is None:
        return ""
    device: tuple[str, ...] = () if options.device == "cpu" else ("--device", options.device)
    if options.threads != 1:
        device += ("--threads", str(options.threads))
    if options.compile is not None:
        device += ("--compile", options.compile)
    return shlex.join(["mla-spec", "check", *options.spec, "--law", law, "--case", case.id, *device])


_VERDICTS: dict[type[Exception], Verdict] = {Violation: "fail", SubjectCrashed: "crashed", VacuousCase: "incomplete"}
_FLAKY = "the same inputs gave a violation once and none when repeated: the subject is not deterministic"


def _run_dtype(made: Law, subject: object, dtype: str, examples: int, options: Options) -> Record:
    driver = Driver(subject, dtype, options.device)
    run = Run(driver, profile_of(subject, dtype), supports_of(subject), compile=options.compile)
    cases = 0
    failed = False
    last: Case | None = None

    def attempt(case: Case) -> None:
        nonlocal cases, failed, last
        cases += not failed
        last, run.case_id = case, case.id
        if options.announce is not None:
            options.announce(case)
        try:
            made.check(run, case)
        except (Violation, SubjectCrashed, VacuousCase, NotOffered):
            failed = True
            raise

    name = subject_name(subject)
    start = time.perf_counter()
    try:
        if options.case is not None:
            attempt(options.case)
        else:
            _generate(made, run, examples, options, attempt)
    except NotOffered as error:
        return Record(made.name, name, "unsupported", message=str(error), seconds=time.perf_counter() - start)
    except (Violation, SubjectCrashed, VacuousCase, Flaky) as error:
        assert last is not None
        return Record(
            made.name,
            name,
            _VERDICTS.get(type(error), "fail"),
            cases=cases,
            message=_FLAKY if isinstance(error, Flaky) else str(error),
            case=last.id,
            replay=replay_command(made.name, last, options),
            seconds=time.perf_counter() - start,
        )
    return Record(made.name, name, "pass", cases, run.worst, run.worst_case, seconds=time.perf_counter() - start)


def _generate(made: Law, run: Run, examples: int, options: Options, attempt: Callable[[Case], None]) -> None:
    """Draw cases with Hypothesis, and on a failure minimise; the last call of ``attempt`` is the smallest failure."""
    cases = made.cases(run.supports, run.profile)
    if isinstance(cases, list):
        for case in cases:
            attempt(case)
        return

    @hypothesis.seed(zlib.crc32(f"{options.seed} {made.name} {run.driver.dtype}".encode()))
    @settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if options.minimise else (Phase.generate,),
        backend=BACKEND,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @given(cases)
    def generated(case: Case) -> None:
        attempt(case)

    generated()
