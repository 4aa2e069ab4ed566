"""Runs recorded calls again, beside what was recorded, and makes one that fails smaller."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.smaller import smallest
from mla_spec.exchange.tensor_file import encode
from mla_spec.judging.recorded import Judgement, judge_answer, judge_results
from mla_spec.operations.operation import Operation
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result, Results
from mla_spec.subjects.near import Handle, there
from mla_spec.subjects.signature import Output
from mla_spec.subjects.violation import SubjectCrashed, Unsupported, Violation


@dataclass(frozen=True)
class Replayed:
    """What was found of one recorded call.

    Attributes:
        recorded: of its output; None where none was recorded.
        again: of what the subject gives now.
        smallest: a call made of parts of it on which the subject fails in the same way; None where it does not fail.
        of_smallest: what is found of it.
    """

    recorded: Judgement | None
    again: Judgement
    smallest: Call | None = None
    of_smallest: Judgement | None = None

    @property
    def sentence(self) -> str:
        """What both findings say together."""
        if self.recorded is None:
            return ""
        was, is_now = (each.verdict in ("fail", "crashed") for each in (self.recorded, self.again))
        if was and not is_now and self.again.verdict == "pass":
            return "the subject passes now: what was recorded came of another kernel, state or machine"
        return "fails only now" if is_now and self.recorded.verdict == "pass" else ""


class Replay:
    """A subject in a process of its own, which answers recorded calls again.

    Args:
        subject: there.
        device: for its tensors.
        seconds: in which a smaller call is looked for, for each call that fails.
    """

    def __init__(self, subject: Handle, device: str, seconds: float) -> None:
        self.subject, self.device, self.seconds = subject, device, seconds
        self.description: Description = declared_by(subject)
        found = self.description
        self.declared = Declared(found.name, found.operations, found.supports, found.profiles)

    def of(self, call: Call, answer: Callable[[], Answer | None] | None, declared: Declared | None) -> Replayed:
        """Judge what was recorded, run the call again, and make a failing one smaller.

        Args:
            declared: by the kernel that was recorded; where None it is taken for the subject, and its LSE may be absent.
        """
        recorded = None
        if answer is not None:
            given = self._as_recorded(answer) if declared is None else declared
            recorded = judge_answer(given, call, answer)
        again = self.judged(call)
        if again.verdict not in ("fail", "crashed"):
            return Replayed(recorded, again)
        end = time.monotonic() + self.seconds
        small = smallest(
            call,
            self.declared.supports,
            lambda each: alike(self.judged(each), again),
            lambda: time.monotonic() < end,
        )
        return Replayed(recorded, again, small, again if small is call else self.judged(small))

    def _as_recorded(self, answer: Callable[[], Answer | None]) -> Declared:
        """What the subject declares, without an LSE where none was recorded."""
        try:
            outputs = answer() or {}
        except (SubjectCrashed, Unsupported, Violation):
            return self.declared
        return replace(self.declared, supports=replace(self.declared.supports, lse="lse" in outputs))

    def judged(self, call: Call) -> Judgement:
        """What is found of the outputs that the subject gives now."""
        if call.operation not in self.description.operations:
            return Judgement(verdict="unsupported", message=f"{self.declared.name} does not offer {call.operation}")

        def results(operation: Operation, inputs: object, dtype: str) -> Results:
            if dtype not in self.declared.supports.dtypes:
                raise Unsupported(f"the subject does not support {dtype}")
            driver: Driver = there(Driver, self.subject, dtype, self.device)
            return driver.call(operation, inputs)

        return judge_results(self.declared, call, results)

    def answer(self, call: Call) -> bytes:
        """The bytes of the subject's answer to a call: its outputs, or why there are none."""
        operation = call.signature
        assert isinstance(operation, Operation)
        kept: dict[str, bytes] = {}

        def results(operation: Operation, inputs: object, dtype: str) -> Results:
            driver: Driver = there(Driver, self.subject, dtype, self.device)
            got = driver.call(operation, inputs)
            parts = zip(operation.outputs, got, strict=True)
            kept["outputs"] = encode({o.name: _tensor(x, o, dtype) for o, x in parts if x is not None}, {})
            return got

        found = judge_results(self.declared, call, results)
        texts = {"unsupported" if found.verdict == "unsupported" else "error": found.message}
        return kept.get("outputs") or encode({}, texts)


def _tensor(x: Result, output: Output, dtype: str) -> Tensor:
    """A result as the tensor that it was."""
    bits = torch.from_numpy(np.array(x.bits))
    if output.kind in ("indices", "bytes"):
        return bits
    if output.kind == "values":
        return bits.view(TORCH_DTYPES[dtype])
    return bits.view(torch.float64 if bits.element_size() == 8 else torch.float32)


def alike(one: Judgement, other: Judgement) -> bool:
    """Whether two calls fail in the same way: the same output is wrong, or the same exception is raised."""
    kinds = [each.message.partition("[")[0].partition(":")[0] for each in (one, other)]
    return one.verdict == other.verdict and kinds[0] == kinds[1]
