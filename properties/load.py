"""Production loads: whole published widths, and as many sequences, heads and keys as a budget of seconds allows.

The reference judges a sample of rows. It hits as many sequences, heads and queries as it has rows: the i-th row stands at place i
of each axis, modulo its size, and the places of each axis are then exchanged at random. So any fixed row is in a sample of n of N
rows with probability n / N, and any fixed head of h with probability min(1, n / h). Rows at the corners come on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Operation, Within
from mla_spec.subjects.driver import Results
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

ROWS = 64
"""Rows that the reference judges, beside those at corners."""

Row = tuple[int, ...]
"""A place on each axis of a load."""


def spread(i: int, sizes: tuple[int, ...]) -> Row:
    """The i-th of all places, in an order that has all places once and as many of each axis as early as possible."""
    *rest, last = sizes
    if not rest:
        return (i % last,)
    total = math.prod(rest)
    return *spread(i % total, tuple(rest)), (i + i // math.lcm(total, last)) % last


def sample(sizes: tuple[int, ...], seed: int, count: int = ROWS) -> list[Row]:
    """``count`` different rows, or all where there are fewer."""
    rng = np.random.default_rng([seed, 41])
    names = [rng.permutation(n) for n in sizes]
    places = (spread(i, sizes) for i in range(min(count, math.prod(sizes))))
    return [tuple(int(name[place]) for name, place in zip(names, row, strict=True)) for row in places]


def corners(sizes: tuple[int, ...], keys: list[int]) -> list[Row]:
    """The first and last place of each axis, and those of the fewest and most keys, which ``keys`` counts on the first."""
    ends = {0, sizes[0] - 1, int(np.argmin(keys)), int(np.argmax(keys))}
    return sorted(set(product(sorted(ends), *({0, n - 1} for n in sizes[1:]))))


def escapes(size: int, rows: int, count: int = ROWS) -> float:
    """The probability that a sample of ``count`` of so many rows has none at one fixed place of an axis of ``size``."""
    return 1 - min(count, rows, size) / size


def described(axes: dict[str, int], at_corners: int) -> str:
    """What is sampled, and how probably a fault escapes."""
    rows = math.prod(axes.values())
    chances = [f"one {name} of {n} with {escapes(n, rows):.3g}" for name, n in axes.items() if n > 1]
    chances.append(f"one row with {1 - min(ROWS, rows) / rows:.3g}")
    return (
        f"the reference judges {min(ROWS, rows)} of {rows} rows at random and {at_corners} at corners; "
        f"probability that a fault escapes it: {', '.join(chances)}"
    )


@dataclass(frozen=True)
class Took:
    """Seconds that a case took, and those of them in calls of the subject."""

    calls: float
    all: float

    def promised(self, ratio: float) -> float:
        """What a case of so much more work will take: calls grow with it, what else is done with its root at most."""
        return self.calls * ratio + (self.all - self.calls) * math.sqrt(ratio)


@dataclass(frozen=True)
class Load:
    """What the laws of production loads must know of an operation.

    Attributes:
        ladders: from what the subject supports, its profile and a seed, lists of cases from a small one to a real load.
        fits: whether a subject can be given a case.
        axes: sizes of the axes of rows, by name.
        keys: how many keys there are at each place of the first axis.
        work: products of a query and a key.
        one: the inputs of one row alone.
        places: where the row stands in each output.
    """

    operation: Operation
    ladders: Callable[[Supports, Profile, int], list[list[Any]]]
    fits: Callable[[Any, Supports], bool]
    axes: Callable[[Any], dict[str, int]]
    keys: Callable[[Any], list[int]]
    work: Callable[[Any], int]
    one: Callable[[Any, Row], Any]
    places: Callable[[Row], tuple[Any, ...]]

    def grown(self, run: Run) -> Iterator[Case]:
        """Cases of a run: those of its workload, or larger and larger ones as long as they promise to end in time.

        The first ladder has half of the budget, the others have the rest in equal shares.
        """
        given = run.production
        if given.workload:
            yield from self._recorded(run)
            return
        ladders = self.ladders(run.supports, run.profile, 1 + given.seed)
        start, largest, note, left, memory = time.perf_counter(), 0, "", 0, False
        for i, ladder in enumerate(ladders):
            end = start + given.budget * (0.5 + 0.5 * i / max(1, len(ladders) - 1))
            rung: int | None = 0 if i == 0 or time.perf_counter() < end else None
            passed = -1
            while rung is not None:
                before, called, passed = time.perf_counter(), run.seconds, rung
                yield ladder[rung]
                if run.exhausted:
                    memory, run.exhausted = True, False
                    break
                if self.work(ladder[rung]) >= largest:
                    largest, note = self.work(ladder[rung]), run.note
                now = time.perf_counter()
                took = Took(run.seconds - called, now - before)
                larger = [
                    r for r in range(rung + 1, len(ladder)) if took.promised(self._ratio(ladder, rung, r)) <= end - now
                ]
                rung = max(larger, default=None)
            left += len(ladder) - 1 - passed
        spared = f"; {given.budget:.3g} s were too few for {left} larger loads" if left else ""
        run.note = f"{note}{spared}{'; memory was too small for one' * memory}" if note else ""

    def _ratio(self, ladder: list[Any], rung: int, other: int) -> float:
        """How much more work another rung is."""
        return self.work(ladder[other]) / self.work(ladder[rung])

    def _recorded(self, run: Run) -> Iterator[Case]:
        """The cases of the workload that are of this operation, until the budget is used up."""
        every = [case for case in run.production.workload if type(case) is self.operation.case]
        fitting = [case for case in every if self.fits(case, run.supports)]
        start = time.perf_counter()
        for done, case in enumerate(fitting):
            if done and time.perf_counter() - start > run.production.budget:
                run.leave_out(
                    f"{done} of {len(fitting)} cases of the workload ran: {run.production.budget:.3g} s were over"
                )
                break
            yield replace(case, dtype=run.profile.dtype, seed=1 + run.production.seed + done)
            if run.exhausted:
                run.leave_out(f"case {done + 1} of {len(fitting)} of the workload is too large for the memory there is")
                run.exhausted = False
        if len(fitting) < len(every) and fitting:
            run.note += f"; {len(every) - len(fitting)} of {len(every)} cases are not what the subject supports"

    def rows(self, case: Any, count: int = ROWS) -> list[Row]:
        """Those of a case that the reference judges."""
        sizes = tuple(self.axes(case).values())
        return sorted({*sample(sizes, case.seed, count), *corners(sizes, self.keys(case))})

    def describe(self, case: Any) -> str:
        """A case and its sample, in one line."""
        axes = self.axes(case)
        keys = self.keys(case)
        load = " × ".join(f"{n} {plural(name, n)}" for name, n in axes.items())
        added = len(corners(tuple(axes.values()), keys))
        return f"{load} over {min(keys)} to {max(keys)} keys in {case.dtype}: {described(axes, added)}"

    def named(self, case: Any, row: Row) -> str:
        """A row, for messages."""
        where = ", ".join(f"{name} {place}" for name, place in zip(self.axes(case), row, strict=True))
        return f"{where} ({self.keys(case)[row[0]]} keys)"

    def judge(self, run: Run, case: Any, inputs: Any, got: Results, row: Row) -> None:
        """One row of outputs against the reference."""
        for output, want, place in zip(got, self.expected(run, inputs, row), self.places(row), strict=True):
            if output is not None:
                try:
                    want.judge(run, output[place])
                except Violation as violation:
                    raise Violation(f"{self.named(case, row)}: {violation}") from None

    def expected(self, run: Run, inputs: Any, row: Row) -> tuple[Within, ...]:
        """What the outputs of one row must be."""
        found = self.operation.expected(self.one(inputs, row), run.profile, run.supports)
        assert all(isinstance(each, Within) for each in found)
        return found  # type: ignore[return-value]


def plural(name: str, count: int) -> str:
    """A noun after a number."""
    if count == 1:
        return name
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
