"""A random sample of the calls that a kernel answers inside any process: arguments before each call, and its outputs."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_spec.exchange.call import Call, call_of
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.rows import choose_rows
from mla_spec.installed import operation_named, operation_names
from mla_spec.subjects.contract import offers
from mla_spec.subjects.description import Description, describe
from mla_spec.subjects.find import FunctionSubject
from mla_spec.subjects.signature import Signature

LARGEST = 2**24
"""Bytes of the arguments of a call, or of the part of it that is taken."""


class Sample:
    """What becomes of the calls of a kernel. Nothing that goes wrong here reaches who calls the kernel.

    Attributes:
        what: begins warnings.
        calls: how many there were; with several threads, about so many.
        taken: calls of which a copy was kept.
        too_large: calls of the sample that were left out, for their size.
        full: why no more are taken, or "".
        heads: by operation of which rows were taken, how many heads each time, and of how many.
    """

    what = "mla_spec"
    largest = LARGEST
    whole = LARGEST
    """Bytes of the arguments of a call of which no rows are chosen."""

    most_heads: int | None = None
    """Heads of a call of which rows are chosen; None for all."""

    def __init__(self, declared: Description, rate: float, seed: int | None) -> None:
        self.declared, self.rate, self.drawn = declared, rate, random.Random(seed)
        self.calls, self.taken, self.too_large, self.full = 0, 0, 0, ""
        self.heads: dict[str, tuple[int, int]] = {}

    def keep(self, call: Call, answer: Answer) -> None:
        """Do what is to be done with a call, whose tensors are copies on the device of the kernel."""
        raise NotImplementedError

    def wrapped(self, operation: Signature, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, some of whose calls are taken."""
        rate, draw = self.rate, self.drawn.random

        @functools.wraps(method)
        def call(*places: Any, **options: Any) -> Any:
            self.calls += 1
            if draw() >= rate or self.full:
                return method(*places, **options)
            taken = self._guarded(lambda: self._before(operation, places, options))
            returned = method(*places, **options)
            if taken is not None:
                self._guarded(lambda: self._after(operation, taken, places, options, returned))
            return returned

        return call

    def stop(self, why: str) -> None:
        """Take no more calls."""
        self.full = why
        warnings.warn(f"{self.what}: {why}", stacklevel=2)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad():
                return work()
        except Exception as error:  # a fault of the sample must not reach who calls the kernel
            self.stop(f"{type(error).__name__}: {error}")
            return None

    def _before(
        self, operation: Signature, places: Any, options: Any
    ) -> tuple[Call, Callable[[Answer], Answer]] | None:
        """A copy of a call, or of a part of it, and what takes the same part of its outputs; None where it is too large."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        return self.copied(call_of(operation, places, options))

    def copied(self, given: Call) -> tuple[Call, Callable[[Answer], Answer]] | None:
        """See ``_before``."""
        operation, call = given.signature, given
        outputs: Callable[[Answer], Answer] = _whole
        if _size(call.tensors) > self.whole:
            part = choose_rows(call, self.drawn, self.most_heads, self._query_scale(call))
            if part is not None:
                call, outputs = part.call, part.outputs
                self.heads[operation.name] = part.heads
        if _size(call.tensors) > self.largest:
            self.too_large += 1
            return None
        memory = {x.untyped_storage().data_ptr() for x in given.tensors.values()}
        copies = {name: _own(x, memory) for name, x in call.tensors.items()}
        return Call(call.operation, copies, call.values, call.strides), outputs

    def _query_scale(self, call: Call) -> str:
        """Which rows of q share one scale."""
        q = call.tensors.get("q")
        dtype = "" if q is None else str(q.dtype).removeprefix("torch.")
        return self.declared.profile(dtype).query_scale if dtype in self.declared.profiles else "none"

    def _after(self, operation: Signature, taken: Any, places: Any, options: Any, returned: Any) -> None:
        call, part = taken
        answer = part(_outputs(operation, places, options, returned))
        self.keep(call, {name: x.detach().clone() for name, x in answer.items()})


def sampled(kernel: Any, operation: str | None, attribute: str, make: Callable[[Description], Sample]) -> Any:
    """What is called like ``kernel``, a sample of whose calls goes where ``make`` says.

    Args:
        kernel: a subject, or a function where ``operation`` names what it implements.
        attribute: of what is returned, the sample.
        make: from what the kernel declares, whose operations are those that take and give tensors, the sample.

    Raises:
        ValueError: the kernel offers no operation that has tensors.
    """
    subject = kernel if operation is None else FunctionSubject(kernel, operation)
    names = [
        name for name in operation_names() if isinstance(operation_named(name), Signature) and offers(subject, name)
    ]
    if not names:
        raise ValueError(
            f"{type(kernel).__name__} offers no operation that takes and gives tensors; name that of a function"
        )
    found = describe(subject)
    sample = make(Description(found.name, tuple(names), found.supports, found.profiles))
    if operation is not None:
        wrapped = sample.wrapped(operation_named(operation), kernel)
        setattr(wrapped, attribute, sample)
        return wrapped
    return SampledKernel(subject, names, attribute, sample)


class SampledKernel:
    """A subject of whose calls a sample is taken; everything else is the subject's own."""

    def __init__(self, subject: Any, names: list[str], attribute: str, sample: Sample) -> None:
        self._subject = subject
        setattr(self, attribute, sample)
        for name in names:
            setattr(self, name, sample.wrapped(operation_named(name), getattr(subject, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_subject"], name)


def require_rate(rate: float) -> None:
    """Raise ValueError where a rate is no share of the calls."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate!r}; expected a share of the calls, 0 to 1")


def _own(x: Tensor, memory: set[int]) -> Tensor:
    """A tensor that shares no memory with the arguments of a call."""
    own = x.detach()
    return own.clone() if own.untyped_storage().data_ptr() in memory else own


def _outputs(operation: Signature, places: tuple[Any, ...], options: dict[str, Any], returned: Any) -> Answer:
    """Outputs by name, of what a call returned and of the arguments that it changed."""
    given = dict(zip([a.name for a in operation.arguments if not a.optional], places, strict=False)) | options
    parts = returned if isinstance(returned, tuple) else (returned,)
    found = {output.name: x for output, x in zip(operation.returned, parts, strict=False) if isinstance(x, Tensor)}
    return found | {name: given[name] for name in operation.written}


def _whole(answer: Answer) -> Answer:
    return answer


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())
