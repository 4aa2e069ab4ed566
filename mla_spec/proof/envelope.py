"""The envelope of an operation: a lattice of sizes, bisected into what is right, refused and silently wrong.

Of each dtype and class of cases, a box of sizes is judged in its corners and its middle. Where these are alike, so is the rest of
the box, as far as anybody knows; where they differ, its longest side is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from mla_spec.judging.verdict import Record
from mla_spec.operations.all import CALLED
from mla_spec.operations.case import Case
from mla_spec.operations.lattice import Lattice
from mla_spec.operations.operation import Operation
from mla_spec.subjects.supports import Supports

MAPPED: dict[str, Operation] = {operation.name: operation for operation in CALLED if operation.lattice is not None}
"""Operations that have a lattice, by name."""

Kind = Literal["right", "refuses", "wrong", "ends the process", "not judged"]

Point = tuple[int, int, int]
"""A value of each axis."""

_Box = tuple[range, range, range]
"""Indices into the three axes."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a subject does with calls of one size.

    Attributes:
        part: the class of the case.
        sizes: by the names of the axes.
        kind: "right"; "refuses" by an exception; "wrong" without a word; "ends the process", or hangs; "not judged".
        measured: whether it was called; else it is what the corners and the middle of its box are.
        declared: whether it says that it takes such a call.
        ratio: the largest error / bound; None where nothing was compared, or it is not finite.
        case: that was run; of what was not measured, empty.
        message: what it said, or what is wrong.
    """

    operation: str
    dtype: str
    part: str
    sizes: dict[str, int] = field(default_factory=dict)
    kind: Kind
    measured: bool
    declared: bool
    ratio: float | None = None
    case: str = ""
    message: str = ""


Judge = Callable[[Case], Record]
"""Runs the law of the lattice on one case of the subject."""


def lattice_of(operation: Operation) -> Lattice:
    """The lattice of one that is mapped."""
    assert operation.lattice is not None
    return operation.lattice


def envelope(
    operation: Operation, judge: Judge, supports: Supports, dtypes: tuple[str, ...], seed: int = 0
) -> Iterator[list[Cell]]:
    """The cells of each dtype and class, in the order of the axes."""
    for dtype, part in product(dtypes, lattice_of(operation).classes):
        box = _Part(operation, judge, supports, dtype, part, seed)
        first, second, third = (range(len(axis)) for axis in box.axes)
        box.bisect((first, second, third))
        yield box.cells()


class _Part:
    """One dtype and class of an operation."""

    def __init__(
        self, operation: Operation, judge: Judge, supports: Supports, dtype: str, part: str, seed: int
    ) -> None:
        self.operation, self.lattice = operation, lattice_of(operation)
        self.judge, self.supports, self.dtype, self.part, self.seed = judge, supports, dtype, part, seed
        self.axes = tuple(self.lattice.axes.values())
        self.found: dict[Point, Cell] = {}
        self.inferred: dict[Point, Kind] = {}

    def bisect(self, box: _Box) -> None:
        """Judge the corners and the middle of a box, and of its halves where they differ."""
        ends = [sorted({side[0], side[-1]}) for side in box]
        points = [*product(*ends), tuple(side[len(side) // 2] for side in box)]
        kinds = {self._cell(self._at(point)).kind for point in points}
        longest = max(range(3), key=lambda axis: len(box[axis]))
        if len(kinds) == 1:
            (kind,) = kinds
            self.inferred |= {self._at(point): kind for point in product(*box)}
        elif len(box[longest]) > 1:
            middle = len(box[longest]) // 2
            for half in (box[longest][:middle], box[longest][middle:]):
                first, second, third = (half if axis == longest else side for axis, side in enumerate(box))
                self.bisect((first, second, third))

    def _at(self, point: tuple[int, ...]) -> Point:
        first, second, third = (axis[i] for axis, i in zip(self.axes, point, strict=True))
        return first, second, third

    def _sizes(self, point: Point) -> dict[str, int]:
        return dict(zip(self.lattice.axes, point, strict=True))

    def _cell(self, point: Point) -> Cell:
        if point not in self.found:
            fields = self.lattice.fields(self.supports, self.part, self._sizes(point))
            case = self.operation.case(dtype=self.dtype, seed=self.seed, **fields)
            record = self.judge(case)
            self.found[point] = self._made(point, kind_of(record), True, **_told(record, case))
        return self.found[point]

    def _made(self, point: Point, kind: Kind, measured: bool, **told: Any) -> Cell:
        sizes = self._sizes(point)
        declared = self.dtype in self.supports.dtypes and self.lattice.declared(self.supports, self.part, sizes)
        return Cell(
            operation=self.operation.name,
            dtype=self.dtype,
            part=self.part,
            sizes=sizes,
            kind=kind,
            measured=measured,
            declared=declared,
            **told,
        )

    def cells(self) -> list[Cell]:
        """All of them, what was measured as it was."""
        points = ((first, second, third) for first, second, third in product(*self.axes))
        return [self.found.get(point) or self._made(point, self.inferred[point], False) for point in points]


_ENDS = ("the process", "did not return", "it could not be made again")
"""How messages of a process that ended begin; those of exceptions begin with their class."""


def kind_of(record: Record) -> Kind:
    """What a record of one case says: an exception is a refusal, the end of the process is not."""
    if record.verdict == "crashed":
        return "ends the process" if record.message.startswith(_ENDS) else "refuses"
    kinds: dict[str, Kind] = {"pass": "right", "fail": "wrong", "unsupported": "refuses"}
    return kinds.get(record.verdict, "not judged")


def _told(record: Record, case: Case) -> dict[str, Any]:
    ratios = [record.worst, *(float(each["excess"]) for each in record.evidence)]
    finite = [ratio for ratio in ratios if ratio is not None and ratio < float("inf")]
    message = "" if record.verdict == "pass" else next(iter(record.message.splitlines()), record.verdict)
    return {"ratio": max(finite, default=None), "case": case.short_id, "message": message}
