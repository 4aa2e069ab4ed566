"""Runs the suite on the planted bugs: which law kills which, on which case, after how many cases and seconds.

A law that needs no operation in which a bug differs from the correct subject sees the correct subject, and is not run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mla_spec import installed
from mla_spec.installed import all_laws
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.proof.reach import operations_that_differ
from mla_spec.text.terminal import shown
from mla_spec.text.typed import checked


def kills(record: Record) -> bool:
    """Whether the law found the bug; not where the subject could not even be made."""
    return record.verdict in ("fail", "crashed") and record.cases > 0


@dataclass(frozen=True)
class BugResult:
    """What the laws said of one planted bug, in the order in which they ran."""

    bug: str
    symptom: str
    records: tuple[Record, ...]

    @property
    def kills(self) -> list[Record]:
        """The records of the laws that kill it."""
        return [record for record in self.records if kills(record)]

    @property
    def survives(self) -> bool:
        return not self.kills

    @property
    def seconds_to_kill(self) -> float:
        """Wall time up to and with the first law that kills; 0 where none does."""
        return sum(self.records[i].seconds for i in range(self._laws_to_kill))

    @property
    def cases_to_kill(self) -> int:
        """Generated cases up to and with the first that kills; 0 where none does."""
        return sum(self.records[i].cases for i in range(self._laws_to_kill))

    @property
    def _laws_to_kill(self) -> int:
        verdicts = [kills(record) for record in self.records]
        return verdicts.index(True) + 1 if any(verdicts) else 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "bug": self.bug,
            "symptom": self.symptom,
            "killed": not self.survives,
            "killed_by": [record.law for record in self.kills],
            "cases_to_kill": self.cases_to_kill,
            "seconds_to_kill": self.seconds_to_kill,
            "records": [record.as_dict() for record in self.records],
        }


@dataclass(frozen=True)
class Matrix:
    """The results of bugs; ``complete`` where they are all that are planted, and every law that could differ ran on them."""

    results: tuple[BugResult, ...]
    complete: bool

    @property
    def killed(self) -> list[BugResult]:
        return [result for result in self.results if not result.survives]

    @property
    def survivors(self) -> list[BugResult]:
        return [result for result in self.results if result.survives]

    @property
    def idle_laws(self) -> list[str]:
        """Laws that killed nothing; not those that could not run, for want of a device or a compiler."""
        killers = {record.law for result in self.results for record in result.kills}
        ran = {r.law for result in self.results for r in result.records if r.verdict != "unsupported"}
        return [
            name
            for name, law in all_laws().items()
            if name not in killers and (name in ran or not law.unavailable(Options()))
        ]

    @property
    def late_laws(self) -> list[str]:
        """Laws that kill, but no bug alone, and none after as few cases as any other law that kills it."""
        first, killers = set[str](), set[str]()
        for result in self.results:
            fewest = min((record.cases for record in result.kills), default=0)
            first |= {record.law for record in result.kills if record.cases == fewest}
            killers |= {record.law for record in result.kills}
        return [name for name in all_laws() if name in killers - first]

    @property
    def sole_killers(self) -> dict[str, list[str]]:
        """The bugs that no other law kills, by law."""
        sole: dict[str, list[str]] = {}
        for result in self.results:
            if len(result.kills) == 1:
                sole.setdefault(result.kills[0].law, []).append(result.bug)
        return sole

    @property
    def times(self) -> list[float]:
        """Seconds to kill, of every bug that is killed."""
        return [result.seconds_to_kill for result in self.killed]

    @property
    def score(self) -> str:
        """One line."""
        line = f"{len(self.killed)} of {len(self.results)} planted bugs killed"
        if self.times:
            line += f"; time to kill: median {statistics.median(self.times):.1f} s, worst {max(self.times):.1f} s"
        return line

    def as_dict(self) -> dict[str, Any]:
        matrix: dict[str, Any] = {
            "complete": self.complete,
            "score": self.score,
            "survivors": [result.bug for result in self.survivors],
            "bugs": [result.as_dict() for result in self.results],
        }
        if self.complete:
            matrix |= {
                "laws_that_killed_nothing": self.idle_laws,
                "laws_that_kill_nothing_first": self.late_laws,
                "sole_killers": self.sole_killers,
            }
        return matrix


def matrix_from(content: Any) -> Matrix:
    """The matrix that ``Matrix.as_dict`` wrote.

    Raises:
        ValueError: it is not one.
    """
    found = checked(content, dict[str, Any], "the content")
    bugs = checked(found.get("bugs"), list[dict[str, Any]], "bugs")
    results = tuple(_result_from(bug, f"bugs[{i}]") for i, bug in enumerate(bugs))
    return Matrix(results, checked(found.get("complete"), bool, "complete"))


def _result_from(bug: dict[str, Any], where: str) -> BugResult:
    name, symptom = (checked(bug.get(key), str, f"{where}: {key}") for key in ("bug", "symptom"))
    records = checked(bug.get("records"), list[Record], f"{where}: records")
    for record in records:
        if record.law not in all_laws():
            raise ValueError(f"{where} has the law {shown(record.law)}, which this version does not have")
        if record.case:
            parse_case(record.case)
    if not records:
        raise ValueError(f"{where} has no records")
    return BugResult(name, symptom, tuple(records))


def planted_bugs(ids: Iterable[str] = ()) -> list[Any]:
    """The planted bugs with these ids, or all.

    Raises:
        ValueError: no bug has the id.
    """
    planted = installed.planted_bugs()
    ids = list(ids)
    for name in ids:
        if name not in planted:
            raise ValueError(f"no planted bug has the id {name!r}; `mla-spec selftest --catalogue` lists them")
    return [planted[name] for name in ids] or list(planted.values())


def laws_for(bug: Any) -> list[str]:
    """Laws to which the bug can look different from the correct subject, those that it names first."""
    operations = operations_that_differ(bug.make)
    names = [name for name, law in all_laws().items() if operations & set(law.needs)]
    return sorted(names, key=lambda name: name not in bug.killed_by)


def run_bug(bug: Any, options: Options, pool: WorkerPool, *, quick: bool) -> BugResult:
    """Run the laws on one bug, in a process of ``pool``; up to the first that kills where ``quick``.

    Laws that the bug does not name run a quarter of the examples: most of them pass, and that takes the most time.
    """
    records: list[Record] = []
    own = replace(
        options,
        spec=(bug.spec,),
        minimise=False,
        until_failure=True,
        compile=bug.compile or options.compile,
        production=bug.production,
    )
    unnamed = replace(own, examples=-(-own.count // 4))
    for law in laws_for(bug):
        records.append(pool.submit(law, f"bug-{bug.id}", own if law in bug.killed_by else unnamed).result())
        could_be_made = records[-1].verdict != "crashed" or records[-1].cases > 0
        if not could_be_made or (quick and kills(records[-1])):
            break
    return BugResult(bug.id, bug.symptom, tuple(records))


def run_selftest(
    bugs: list[Any],
    options: Options,
    *,
    quick: bool = False,
    jobs: int = 1,
    timeout: float = 300,
    progress: Callable[[BugResult], None] = lambda result: None,
) -> Matrix:
    """Run the suite on planted bugs, ``jobs`` at once.

    Args:
        options: examples, seed, device and dtypes of the laws.
        quick: stop at the first law that kills a bug.
        timeout: seconds that one case may take; a bug that takes longer is killed by that law.
        progress: called with each bug's result as it is known.
    """
    with ThreadPoolExecutor(jobs) as threads, WorkerPool(jobs, timeout, share=True) as pool:

        def run(bug: Any) -> BugResult:
            result = run_bug(bug, options, pool, quick=quick)
            progress(result)
            return result

        results = tuple(threads.map(run, bugs))
    return Matrix(results, complete=not quick and len(bugs) == len(planted_bugs()))
