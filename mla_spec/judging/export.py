"""Writes the calls that laws make into a folder, for somebody to answer; ``mla-spec judge`` then runs the laws on the answers.

A law is run with stand-ins for outputs, and nothing is judged. It is run twice, with other stand-ins: a call is written where it
is the same both times, so that no call depends on what a stand-in was. Where answers are there already they take the place of
stand-ins, and what depends on them is written: another round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.exchange.call import Call, address
from mla_spec.exchange.contents import Answer, ContentsSubject
from mla_spec.exchange.folder import Folder, LawLine
from mla_spec.judging.drawing import generate
from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.run import asked_dtypes, share_of, why_not
from mla_spec.operations.case import Case
from mla_spec.operations.extent import beyond
from mla_spec.operations.operation import Answers, Operation
from mla_spec.reference.typing import Array
from mla_spec.subjects.description import describe
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result, Results, Tensors
from mla_spec.subjects.signature import Asked, Output

STAND_INS = (0, 1)
"""What every output of a call that has no answer is filled with, in one run of a case and in the other."""

FULL = "the folder is full"


def export(folder: Folder, laws: list[Law], options: Options, most: int) -> Iterator[LawLine]:
    """Write the calls of laws, up to ``most`` bytes in the folder, and say what was written of each in each dtype.

    Args:
        options: ``spec`` names the folder as the subject, so that laws which need a live one do not run.
    """
    planner = _Planner(folder)
    subject = ContentsSubject(folder.declared, "files", planner.answer)
    declared = describe(subject)
    for law in laws:
        if why_not(law, declared, options):
            continue
        dtypes = asked_dtypes(declared.supports, options)
        for dtype in dtypes:
            planner.driver = _PlanningDriver(subject, dtype, planner)
            run = _UnjudgedRun(planner.driver, declared.profile(dtype), declared.supports)
            asking = _Asking(law, run, planner, folder, most)
            generate(law, run, share_of(law, len(dtypes), options), options, asking)
            line = LawLine(
                law=law.name,
                dtype=dtype,
                cases=asking.cases,
                calls=asking.calls,
                bytes=asking.bytes,
                left_out=asking.left_out,
            )
            folder.note(line)
            yield line


@dataclass
class _Asking:
    """Runs cases of one law in one dtype, and writes the calls that they make."""

    law: Law
    run: Run
    planner: _Planner
    folder: Folder
    most: int
    cases: int = 0
    calls: int = 0
    bytes: int = 0
    left_out: str = ""
    smallest: Case | None = None

    def __call__(self, case: Case, *, drawn: bool = False) -> None:
        if self.left_out == FULL or beyond(case, self.run.supports):
            return
        self.cases += 1
        first, second = self._calls(case, STAND_INS[0]), []
        if len(first) > 1:
            second = self._calls(case, STAND_INS[1])
        same = _common(first, second) if second else first
        if len(same) < len(first):
            self.left_out = "some calls depend on answers to others; another export writes them when these are there"
        for call in same:
            written = self.folder.add(call, self.law.name, case.id, self.most - self.folder.size)
            if written is None:
                self.left_out = FULL
                return
            self.calls += written > 0
            self.bytes += written

    def require_time(self) -> None:
        """Nothing fails here, so no smaller case is looked for."""

    def _calls(self, case: Case, stand_in: int) -> list[Call]:
        self.planner.stand_in, self.planner.calls = stand_in, []
        self.run.case_id = case.id
        with suppress(Exception):  # the law ends there: whatever it says of stand-ins counts nothing
            self.law.check(self.run, case)
        return self.planner.calls


def _common(first: list[Call], second: list[Call]) -> list[Call]:
    """The calls before the first that differ."""
    same = []
    for a, b in zip(first, second, strict=False):
        if address(a.encoded()) != address(b.encoded()):
            break
        same.append(a)
    return same


@dataclass
class _Planner:
    """Stands for a subject: answers that are there, and stand-ins."""

    folder: Folder
    stand_in: int = 0
    calls: list[Call] = field(default_factory=list)
    inputs: Any = None
    driver: _PlanningDriver = field(init=False)

    def answer(self, call: Call) -> Answer:
        """The outputs of a call, as far as anybody has computed them."""
        copied = {name: x.clone() for name, x in call.tensors.items()}  # a law may write to its tensors afterwards
        self.calls.append(Call(call.operation, copied, call.values, call.strides))
        name = address(call.encoded())
        found = self.folder.answer(name) if name in self.folder.known else None
        return self._stand_ins(call) if found is None else found

    def _stand_ins(self, call: Call) -> Answer:
        operation, made = call.signature, {}
        for output in operation.outputs:
            if output.name in operation.written:
                made[output.name] = torch.full_like(call.tensors[output.name], self.stand_in)
            elif output.offered(self.driver.supports):
                made[output.name] = self._stand_in(output)
        return made

    def _stand_in(self, output: Output) -> Tensor:
        inputs = self.inputs
        shape = inputs.shapes[output.name] if isinstance(inputs, Asked) else output.shape(inputs)
        dtypes = {
            "values": TORCH_DTYPES[self.driver.dtype],
            "wide": self.driver.wide,
            "float32 or better": self.driver.wide,
            "indices": torch.int32,
            "bytes": torch.uint8,
        }
        return torch.full(tuple(shape), self.stand_in, dtype=dtypes[output.kind])


class _PlanningDriver(Driver):
    """A driver that tells the planner what a call is about: its outputs have shapes that follow from it."""

    def __init__(self, subject: object, dtype: str, planner: _Planner) -> None:
        super().__init__(subject, dtype)
        self.planner = planner

    def raw(self, operation: Any, inputs: Any, tensors: Tensors) -> tuple[Any, ...]:
        """See ``Driver``."""
        self.planner.inputs = inputs
        return super().raw(operation, inputs, tensors)


@dataclass
class _UnjudgedRun(Run):
    """A run in which nothing is judged."""

    def expected(self, operation: Operation, inputs: Any) -> Answers:
        """Nothing."""
        return ()

    def agrees(self, operation: Operation, inputs: Any, got: Results, wanted: Answers | None = None) -> None:
        """Nothing."""

    def within(self, got: Result, want: Array, bound: ErrorBound, *, gate: bool = True) -> None:
        """Nothing."""

    def same_bits(self, got: Result, want: Result, why: str) -> None:
        """Nothing."""

    def same_function(self, got: Result, want: Result, bound: ErrorBound, why: str) -> None:
        """Nothing."""

    def meaningful(self, want: Array, bound: ErrorBound) -> None:
        """Nothing."""

    def bounded(self, want: Array, total: Array) -> None:
        """Nothing."""

    def require(self, condition: bool, message: str) -> None:
        """Nothing."""
