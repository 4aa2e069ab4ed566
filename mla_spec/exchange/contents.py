"""A subject that is elsewhere: it gets the contents of a call, and gives the contents of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from mla_spec.exchange.call import Call, call_of, read_call
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.tensor_file import ExchangeError, decode, encode
from mla_spec.installed import operation_named
from mla_spec.subjects.driver import odd_for, parts_of
from mla_spec.subjects.near import there
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.violation import SubjectCrashed, Unsupported, Violation, subject_code
from mla_spec.text.terminal import one_line

Answer = dict[str, Tensor]
"""Outputs of a call by name."""

Elsewhere = Literal["pipe", "files"]
"""Where answers come from: a program that goes on, or files that somebody wrote."""


class ContentsSubject:
    """A subject whose methods ask ``answer`` for the outputs of a call.

    Args:
        declared: what it offers.
        elsewhere: where answers come from, so that laws which cannot see it there do not run.
        answer: from a call, its outputs.
    """

    def __init__(self, declared: Declared, elsewhere: Elsewhere, answer: Callable[[Call], Answer]) -> None:
        self.name, self.supports, self.profile = declared.name, declared.supports, declared.profile
        self.elsewhere, self._answer = elsewhere, answer
        for name in declared.operations:
            setattr(self, name, partial(self._ask, operation_named(name)))

    def _ask(self, operation: Signature, *places: Any, **options: Any) -> Any:
        call = call_of(operation, places, options)
        answer = self._answer(call)
        for name in operation.written:
            _overwrite(operation, name, call.tensors[name], answer.get(name))
        returned = tuple(answer.get(output.name) for output in operation.returned)
        return returned[0] if len(returned) == 1 else returned or None


def _overwrite(operation: Signature, name: str, pool: Tensor, new: Tensor | None) -> None:
    """Give an argument that a call changes the contents that the answer holds."""
    if new is None:
        raise Violation(f"the answer to {operation.name} has no {name}")
    if new.shape != pool.shape or new.dtype != pool.dtype:
        raise Violation(
            f"{name} of the answer to {operation.name} must be {pool.dtype} {list(pool.shape)}, got {new.dtype} "
            f"{list(new.shape)}"
        )
    pool.copy_(new)


def read_answer(data: bytes, what: str) -> Answer:
    """The outputs in the bytes of an answer; ``what`` names it in messages.

    Raises:
        Unsupported: it says that the call is refused, and why.
        Violation: it says what of the contract the outputs break.
        SubjectCrashed: it is no answer, or says that the call failed.
    """
    try:
        tensors, texts = decode(data, what)
    except ExchangeError as error:
        raise SubjectCrashed(str(error)) from error
    if "unsupported" in texts:
        raise Unsupported(one_line(texts["unsupported"], 200))
    if "violation" in texts:
        raise Violation(one_line(texts["violation"], 1000))
    if "error" in texts:
        raise SubjectCrashed(one_line(texts["error"], 1000))
    return tensors


def answer_by(subject: object, call: Call) -> bytes:
    """The bytes of a subject's answer to a call: its outputs, or why there are none."""
    places, options = call.arguments()
    operation = call.signature
    try:
        with subject_code():
            returned = getattr(subject, operation.name)(*places, **options)
        return encode(outputs_of(operation, call, places, returned), {})
    except Unsupported as refusal:
        return encode({}, {"unsupported": str(refusal)})
    except (Violation, ExchangeError) as violation:
        return encode({}, {"violation": str(violation)})
    except SubjectCrashed as crash:
        return encode({}, {"error": str(crash)})


def answer_apart(subject: object, call: Call) -> bytes:
    """As ``answer_by``, where the subject is; what ends its process is in the answer, as an exception would be."""
    try:
        return bytes(there(_answer_there, subject, call.encoded()))
    except SubjectCrashed as error:
        return encode({}, {"error": one_line(error, 1000)})


def _answer_there(subject: object, call: bytes) -> bytes:
    return answer_by(subject, read_call(call, "the call"))


def outputs_of(operation: Signature, call: Call, places: list[Any], returned: Any) -> Answer:
    """Outputs by name, of what a call returned and of the arguments that it changed.

    Raises:
        Violation: they are not as many as the contract says, or one is no plain tensor.
    """
    answer = {}
    for output, x in zip(operation.returned, parts_of(operation, returned).values(), strict=True):
        what = output.what or output.name
        if x is not None and not isinstance(x, Tensor):
            raise Violation(f"{what} must be a torch tensor, got {type(x).__name__}")
        if x is not None and (odd := odd_for(x, "cpu")):
            raise Violation(f"{what} must be a plain tensor on cpu, got {odd}")
        if x is not None:
            answer[output.name] = x
    for argument, x in zip([a for a in operation.arguments if not a.optional], places, strict=False):
        if argument.written:
            answer[argument.name] = x
    return answer
