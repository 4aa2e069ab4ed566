"""Judges calls that were recorded in some process: each by the worst element of each output, the LSE first.

Real latents have no mean, so that a worst case says little of the output; by the LSE a lost page shows. Attention is judged by
the probable bound, outside of which an honest kernel is in one call of 10^9. No case is refused as vacuous, since nobody chose
it: what could not be seen is said instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.exchange.call import Call
from mla_spec.exchange.folder import Folder, read_calls
from mla_spec.judging.judge import judge_within, ratios
from mla_spec.judging.verdict import Record, VacuousCase
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.decode import attention_expected, decode_expected
from mla_spec.operations.operation import Exactly, Operation, Within
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result
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


Sights = dict[tuple[str, str], Sight]
"""By operation and output."""


@dataclass(frozen=True)
class _Declared:
    supports: Supports


def judge_recorded(folder: Folder, sights: Sights) -> Iterator[Record]:
    """A record of each call of a folder; what could be seen is added to ``sights``.

    Raises:
        ExchangeError: a call is damaged.
    """
    for name, call in read_calls(folder):
        yield _judged(folder, name, call, sights)


def _judged(folder: Folder, name: str, call: Call, sights: Sights) -> Record:
    declared = folder.declared

    def record(verdict: Any, message: str = "", worst: float | None = None, dtype: str = "", note: str = "") -> Record:
        case = f"{call.operation}:{name}"
        return Record(LAW, declared.name, verdict, 1, worst, case, message=message, case=case, note=note, dtype=dtype)

    operation = OPERATIONS[call.operation]
    assert isinstance(operation, Operation)
    if not operation.recordable:
        return record("unsupported", f"what {call.operation} must give does not follow from its arguments")
    dtype = _dtype(operation, call)
    if not dtype:
        return record("unsupported", f"its numbers are of none of the dtypes {', '.join(TORCH_DTYPES)}")
    try:
        answer = folder.answer(name)
        if answer is None:
            return record("incomplete", "it has no answer", dtype=dtype)
        inputs = call.inputs()
        driver = Driver(_Declared(declared.supports), dtype)
        unread = tuple(answer.get(output.name) for output in operation.outputs)
        got = driver.read(operation, inputs, unread)
        profile = declared.profile.get(dtype) or Profile.default(dtype)
        worst, note = _compared(operation, inputs, got, profile, declared.supports, sights)
    except Violation as error:
        return record("fail", str(error), dtype=dtype)
    except Unsupported as error:
        return record("unsupported", str(error), dtype=dtype)
    except SubjectCrashed as error:
        return record("crashed", str(error), dtype=dtype)
    except (VacuousCase, ValueError, IndexError) as error:
        return record("incomplete", f"its arguments make no sense to the reference: {error}", dtype=dtype)
    return record("pass", worst=worst, dtype=dtype, note=note)


def _compared(
    operation: Operation, inputs: Any, got: Any, profile: Profile, supports: Supports, sights: Sights
) -> tuple[float | None, str]:
    """The largest error / bound and where it is; Violation of the first output that is outside, the LSE before the others."""
    wants = _expected(operation, inputs, profile, supports)
    pairs = [(o.name, g, w) for o, g, w in zip(operation.outputs, got, wants, strict=True) if g is not None]
    worst, where = None, "every element is exactly what it must be"
    for name, result, want in sorted(pairs, key=lambda pair: pair[0] != "lse"):
        if isinstance(want, Exactly):
            _require_exact(result, want)
        if not isinstance(want, Within):
            continue
        total = np.broadcast_to(want.bound.total, want.value.shape)
        sights.setdefault((operation.name, name), Sight()).add(want.value, total)
        found = judge_within(result, want.value, want.bound, gate=False)
        if result.value.size and (worst is None or found > worst):
            ratio = ratios(result, want.value, total)
            index = [int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape)]
            worst, where = found, f"{result.what}{index} is the worst element"
    return worst, where


def _require_exact(result: Result, want: Exactly) -> None:
    different = ~((result.value == want.value) | (np.isnan(result.value) & np.isnan(want.value)))
    if different.any():
        first = [int(i) for i in np.argwhere(different)[0]]
        raise Violation(
            f"{result.what}{first}: {int(different.sum())} of {different.size} elements are not exactly what they must be"
        )


def _expected(operation: Operation, inputs: Any, profile: Profile, supports: Supports) -> tuple[Any, ...]:
    """What each output must be; of dense attention by the probable bound."""
    if operation.name == "decode":
        return attention_expected(_probable(decode_expected(inputs, profile, probable=True)), supports)
    if operation.name == "prefill":
        whole = prefill_with_bound(**vars(inputs), profile=profile, probable=True)
        return attention_expected(_probable(whole), supports)
    return operation.expected(inputs, profile, supports)


def _probable(want: BoundedAttention) -> BoundedAttention:
    return BoundedAttention(
        want.out,
        want.out_error_probable,
        want.lse,
        want.lse_error_probable,
        want.out_error_probable,
        want.lse_error_probable,
    )


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
