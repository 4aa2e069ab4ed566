"""Judges calls that were recorded in some process: each by the worst element of each output, the LSE first.

Real latents have no mean, so that a worst case says little of the output; by the LSE a lost page shows. Attention is judged by
the probable bound, outside of which an honest kernel is in one call of 10^9. No case is refused as vacuous, since nobody chose
it: what could not be seen is said instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.folder import Folder, read_calls
from mla_spec.judging.judge import PlainJudge, judge_within, ratios
from mla_spec.judging.verdict import Record, VacuousCase, Verdict
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.operation import Exactly, Expected, Operation, Within
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result, Results
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import SubjectCrashed, Unsupported, Violation

LAW = "recorded call"
"""Stands for the law in a record."""

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass
class Sight:
    """How small an error of an output could be seen: the medians of its bound, and these relative to its rms."""

    bounds: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)

    def add(self, want: Any, total: Any) -> None:
        """Note an output that was held against a bound."""
        inexact = np.isfinite(want) & (total != 0)
        if inexact.any():
            median, rms = float(np.median(total[inexact])), float(np.sqrt(np.mean(want[inexact] ** 2)))
            self.bounds.append(median)
            self.relative.append(median / rms if rms else np.inf)

    def join(self, other: Sight) -> None:
        """Note what was seen of another call."""
        self.bounds += other.bounds
        self.relative += other.relative


Sights = dict[tuple[str, str], Sight]
"""By operation and output."""


@dataclass(frozen=True)
class _Declared:
    supports: Supports


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is found of one call.

    Attributes:
        dtype: of its numbers, or "".
        message: why it does not pass, or "".
        note: where the worst element is.
        margins: by output, the largest error / bound; more than 1 where it is outside.
        proof: an element is outside the worst case, not only outside the probable bound.
        sights: by output, what could be seen of it.
    """

    verdict: Verdict
    dtype: str = ""
    message: str = ""
    note: str = ""
    margins: dict[str, float] = field(default_factory=dict)
    proof: bool = False
    sights: dict[str, Sight] = field(default_factory=dict)

    @property
    def worst(self) -> float | None:
        """The largest error / bound; None where nothing was held against a bound."""
        return max(self.margins.values(), default=None)


def judge_recorded(folder: Folder, sights: Sights) -> Iterator[Record]:
    """A record of each call of a folder; what could be seen is added to ``sights``.

    Raises:
        ExchangeError: a call is damaged.
    """
    for name, call in read_calls(folder):
        found = judge_answer(folder.declared, call, partial(folder.answer, name))
        for output, sight in found.sights.items():
            sights.setdefault((call.operation, output), Sight()).join(sight)
        case = f"{call.operation}:{name}"
        yield Record(
            LAW,
            folder.declared.name,
            found.verdict,
            1,
            None if found.verdict == "fail" else found.worst,
            case,
            message=found.message,
            case=case,
            note=found.note,
            dtype=found.dtype,
        )


def judge_answer(
    declared: Declared, call: Call, answer: Callable[[], Answer | None], failure: float = FAILURE_PROBABILITY
) -> Judgement:
    """Hold the answer to a call against float64 and the bounds of the declared profile.

    Args:
        answer: gives the outputs, or None where there are none; what it raises is part of the judgement.
        failure: how probable it may be that an honest call is outside its probable bound.
    """

    def results(operation: Operation, inputs: Any, dtype: str) -> Results | None:
        outputs = answer()
        if outputs is None:
            return None
        unread = tuple(outputs.get(output.name) for output in operation.outputs)
        return Driver(_Declared(declared.supports), dtype).read(operation, inputs, unread)

    return judge_results(declared, call, results, failure)


def judge_results(
    declared: Declared,
    call: Call,
    results: Callable[[Operation, Any, str], Results | None],
    failure: float = FAILURE_PROBABILITY,
) -> Judgement:
    """As ``judge_answer``, where ``results`` gives the outputs from the operation, its inputs and the dtype."""
    operation = OPERATIONS[call.operation]
    assert isinstance(operation, Operation)
    if operation.recorded is None:
        return Judgement(
            verdict="unsupported", message=f"what {call.operation} must give does not follow from its arguments"
        )
    dtype = _dtype(operation, call)
    if not dtype:
        return Judgement(
            verdict="unsupported", message=f"its numbers are of none of the dtypes {', '.join(TORCH_DTYPES)}"
        )
    try:
        inputs = operation.recorded(call.inputs())
        profile = declared.profile.get(dtype) or Profile.default(dtype)
        compared = _Compared(operation, inputs, profile, declared.supports, failure)
        wants = compared.wants()  # before anybody is asked: no subject is to blame for arguments that make no sense
        got = results(operation, inputs, dtype)
        if got is None:
            return Judgement(verdict="incomplete", dtype=dtype, message="it has no answer")
        return _compared(compared, wants, dtype, got)
    except Violation as error:
        return Judgement(verdict="fail", dtype=dtype, message=str(error), proof=True)
    except Unsupported as error:
        return Judgement(verdict="unsupported", dtype=dtype, message=str(error))
    except SubjectCrashed as error:
        return Judgement(verdict="crashed", dtype=dtype, message=str(error))
    except (VacuousCase, ValueError, IndexError, TypeError) as error:
        message = f"its arguments make no sense to the reference: {error}"
        return Judgement(verdict="incomplete", dtype=dtype, message=message)


@dataclass(frozen=True)
class _Compared:
    """What a call is held against."""

    operation: Operation
    inputs: Any
    profile: Profile
    supports: Supports
    failure: float

    def wants(self) -> tuple[Expected | None, ...]:
        """What each output must be, by the probable bound where there is one."""
        if self.operation.probable is None:
            return self.worst_case()
        return self.operation.probable(self.inputs, self.profile, self.supports, self.failure)

    def worst_case(self) -> tuple[Expected | None, ...]:
        return self.operation.expected(self.inputs, self.profile, self.supports)

    def proves(self, name: str, result: Result) -> bool:
        """Whether an output that is outside its probable bound is outside the worst case too."""
        if self.operation.probable is None:
            return True
        if self.profile.coarse:  # then laws take the probable bound for the worst case
            return False
        names = [output.name for output in self.operation.outputs]
        want = self.worst_case()[names.index(name)]
        assert isinstance(want, Within)
        return bool((ratios(result, want.value, np.broadcast_to(want.bound.total, want.value.shape)) > 1).any())


def _compared(compared: _Compared, wants: tuple[Expected | None, ...], dtype: str, got: Results) -> Judgement:
    """The judgement of outputs, the LSE before the others; the message is of the first that is outside."""
    pairs = [(o.name, g, w) for o, g, w in zip(compared.operation.outputs, got, wants, strict=True)]
    margins: dict[str, float] = {}
    sights: dict[str, Sight] = {}
    note = "every element is exactly what it must be"
    for name, result, want in sorted(pairs, key=lambda pair: pair[0] != "lse"):
        if result is None:
            continue
        if isinstance(want, Exactly):
            want.judge(PlainJudge(), result)
        if not isinstance(want, Within):
            continue
        total = np.broadcast_to(want.bound.total, want.value.shape)
        sights[name] = Sight()
        sights[name].add(want.value, total)
        ratio = ratios(result, want.value, total)
        margin = float(ratio.max(initial=0.0))
        if result.value.size and margin >= max(margins.values(), default=0.0):
            index = [int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape)]
            note = f"{result.what}{index} is the worst element"
        margins[name] = margin
        try:
            judge_within(result, want.value, want.bound, gate=False)
        except Violation as error:
            proof = compared.proves(name, result)
            found = Judgement(verdict="fail", dtype=dtype, message=str(error), margins=margins, sights=sights)
            return replace(found, proof=proof)
    return Judgement(verdict="pass", dtype=dtype, note=note, margins=margins, sights=sights)


def _dtype(operation: Operation, call: Call) -> str:
    """The dtype of its numbers; "" where there is none, or one that no profile is of."""
    names = [argument.name for argument in operation.arguments if argument.kind == "values"]
    return next((_NAMES.get(call.tensors[name].dtype, "") for name in names if name in call.tensors), "")


def what_was_not_seen(sights: Sights) -> list[str]:
    """A sentence for each output: how large an error of most elements had to be."""
    return [
        f"{operation}: an error of {name} up to {max(sight.bounds):.2g} ({100 * max(sight.relative):.2g} % of its rms) is not seen"
        for (operation, name), sight in sorted(sights.items())
        if sight.bounds
    ]
