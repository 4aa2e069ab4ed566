"""Attempts of a law at a subject: what becomes of each case, and what the record says of them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mla_spec.judging.anatomy import Anatomy
from mla_spec.judging.drawing import FAILURES, TimeIsUp
from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.separation import History
from mla_spec.judging.verdict import TrivialCase, VacuousCase
from mla_spec.operations.case import Case
from mla_spec.operations.extent import beyond
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import Handle, gone
from mla_spec.subjects.process import HANGS, SubjectDied, SubjectHung
from mla_spec.subjects.violation import SubjectCrashed, SuiteFailed, Unsupported, raised

REPETITIONS = 5
"""How often the case of a failure that did not come back is run again, to say how often it does."""


SHRINKING = 30.0
"""Seconds that may be spent on cases which end the subject's process, while a smaller one is looked for."""


CASES_PER_VAGUE_ONE = 8
"""Of so many drawn cases one may have a bound that says little; of fewer, one too."""


class Attempts:
    """Runs cases of one law in one dtype, and keeps what the record says of them.

    The first one runs twice where ``twice``: a subject may be another when it is called for the second time.

    Attributes:
        cases: how many ran up to the first failure, and with it.
        drawn: how many of these were drawn.
        trivial: how many of these no subject could have failed, and why the last of them was.
        refused: how many of these the subject refused, and why the last of them was.
        vague: the drawn ones of these whose bound says little, though nothing was outside it; and why the last one's does.
        last: the case that ran last.
        failure: the first failure, and its case.
        smallest: the case that failed last: each that fails while a smaller one is looked for is smaller.
        since: when the first one failed.
        history: every case, and whether it failed.
        ratios: of each of them the largest error / bound, None where nothing was held against a bound.
    """

    def __init__(self, law: Law, run: Run, options: Options, make: Callable[[], Driver], *, twice: bool) -> None:
        self.law, self.run, self.options, self.make = law, run, options, make
        self.twice = twice and law.grown is None
        self.deaths = Deaths()
        self.cases = 0
        self.drawn = 0
        self.trivial = (0, "")
        self.refused = (0, "")
        self.vague: tuple[list[Case], str] = ([], "")
        self.last: Case | None = None
        self.failure: tuple[Exception, Case] | None = None
        self.smallest: Case | None = None
        self.since: float | None = None
        self.history: History = []
        self.ratios: list[float | None] = []
        self._wrong: list[Anatomy] = []

    def __call__(self, case: Case, *, drawn: bool = False) -> None:
        if self.deaths.spent > SHRINKING:
            self.deaths.again(case)
            return
        self.cases += self.failure is None
        self.drawn += self.failure is None and drawn
        self.last, self.run.case_id, self.run.compared, self.run.last = case, case.id, None, None
        self.run.anatomy, self.run.case_worst = {}, None
        self.history.append((case, False))
        self.ratios.append(None)
        if self.options.announce is not None:
            self.options.announce(case)
        try:
            if reason := beyond(case, self.run.supports):
                raise Unsupported(reason)
            self.deaths.counted(case, lambda: self._check(case))
            if self.run.compared == 0:
                raise TrivialCase("no output has an element")
            if self.twice:
                self.twice = False
                self.deaths.counted(case, lambda: self._check(case))
            self.ratios[-1] = self.run.case_worst
        except TrivialCase as reason:
            self.trivial = self.trivial[0] + (self.failure is None), str(reason)
        except Unsupported as reason:
            self.refused = self.refused[0] + (self.failure is None), str(reason)
        except FAILURES as error:
            if drawn and isinstance(error, VacuousCase):
                self.vague = [*self.vague[0], case], str(error)
                return
            self.failure = self.failure or (error, case)
            self.smallest, self.since = case, self.since or time.monotonic()
            self._keep_evidence(case)
            raise

    def given(self, case: Case) -> None:
        """Run a case that somebody wrote down: the law may not be made for such."""
        try:
            self(case)
        except SuiteFailed as error:
            raise VacuousCase(f"this law cannot be judged by this case: {error}") from error
        except FAILURES:
            raise
        except Exception as error:
            raise VacuousCase(f"this law cannot be judged by this case: {raised(error)}") from error

    def _check(self, case: Case) -> None:
        try:
            if gone(self.run.driver):
                self.run.driver = self.make()
            self.law.check(self.run, case)
            if isinstance(self.run.driver, Handle):
                self.run.driver.process.require_silence()
        except SystemExit as error:  # no law asks for it: it comes of what a subject computes when it is read
            raise SubjectCrashed(raised(error)) from error
        except (*FAILURES, TrivialCase, Unsupported):
            raise
        except Exception as error:
            if not isinstance(self.run.driver, Handle):  # for debuggers
                raise
            raise SuiteFailed(raised(error)) from error

    def _keep_evidence(self, case: Case) -> None:
        """Note that ``case`` failed: the last such case is the smallest, and the one with the most elements is kept too."""
        self.history[-1] = (case, True)
        if self.run.anatomy:
            excess = float(self.run.anatomy["excess"])
            self.ratios[-1] = excess if self.run.anatomy["judged"] == "within" and math.isfinite(excess) else None
            found = {"case": case.id, **self.run.anatomy}
            self._wrong = [found, max([*self._wrong[1:], found], key=lambda each: math.prod(each["shape"]))]

    @property
    def too_vague(self) -> bool:
        """Whether too many drawn cases have a bound that says little, or no other case says anything."""
        vague, blunt = len(self.vague[0]), len(self.vague[0]) + self.trivial[0] + self.refused[0]
        return vague > 0 and (vague > max(1, self.drawn // CASES_PER_VAGUE_ONE) or blunt == self.cases)

    def require_time(self) -> None:
        """Raise TimeIsUp where a smaller failing case has been looked for long enough."""
        if self.since is not None and time.monotonic() > self.since + self.options.patience:
            raise TimeIsUp

    @property
    def evidence(self) -> list[Anatomy]:
        """The anatomies of the smallest failing case and of the richest, once where they are one."""
        return self._wrong[:1] if len({each["case"] for each in self._wrong}) == 1 else self._wrong

    def flaky(self) -> tuple[Exception, Case, str]:
        """The first failure and its case, where its inputs gave none when they were repeated, and how often they do."""
        assert self.failure is not None
        error, case = self.failure
        count = sum(self._fails(case) for _ in range(REPETITIONS))
        often = f"this came back in {count} of {REPETITIONS} repetitions of the same inputs: the subject is not deterministic"
        return error, case, f"{error}\n{often}"

    def _fails(self, case: Case) -> bool:
        try:
            self(case)
        except FAILURES:
            return True
        return False


class Deaths:
    """Which cases have ended the subject's process, and the seconds that they took, those of the first hangs aside."""

    def __init__(self) -> None:
        self.spent, self.hangs = 0.0, 0
        self.known: dict[str, tuple[type[SubjectDied], str]] = {}
        self.first_hang: str | None = None

    def counted(self, case: Case, check: Callable[[], None]) -> None:
        """Run ``check``, and take note of its end."""
        start = time.monotonic()
        try:
            check()
            return
        except SubjectDied as death:
            kind, text = type(death), str(death)
        if kind is SubjectHung:  # a later one had less time, which is not what is wrong with it
            text = self.first_hang = self.first_hang or text
            self.hangs += 1
        if kind is not SubjectHung or self.hangs > HANGS:
            self.spent += time.monotonic() - start
        self.known.setdefault(case.id, (kind, text))
        self.again(case)

    def again(self, case: Case) -> None:
        """What the case came to, if it has ended a process; raised here alone, since Hypothesis tells failures by place."""
        if case.id in self.known:
            kind, text = self.known[case.id]
            raise kind(text)
