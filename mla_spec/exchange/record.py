"""Records a sample of the calls that a kernel answers inside any process: arguments before each call, and its outputs."""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mla_spec import __version__
from mla_spec.exchange.call import Call, address, call_of
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.folder import Folder, HeaderLine
from mla_spec.exchange.tensor_file import ExchangeError, encode
from mla_spec.installed import operation_named, operation_names
from mla_spec.subjects.contract import offers
from mla_spec.subjects.description import describe
from mla_spec.subjects.find import FunctionSubject
from mla_spec.subjects.signature import Signature

LARGEST = 2**24
"""Bytes of the arguments of a call that is recorded whole."""


def record(
    kernel: Any,
    directory: str,
    *,
    rate: float = 0.001,
    most: int = 2**30,
    operation: str | None = None,
    seed: int | None = None,
) -> Any:
    """The kernel, of whose calls a random sample is written into a new folder, for ``mla-spec judge``.

    Arguments are copied before the call, outputs after it. Of a ``decode`` whose arguments exceed 16 MiB one sequence at
    random is kept, with the pages that it needs; other calls of that size are left out and counted. What goes wrong while a
    call is recorded ends the recording with a warning, and never the call.

    Args:
        kernel: a subject, or a function where ``operation`` names what it implements.
        directory: a folder that has no calls yet; one a process.
        rate: share of the calls that are recorded, 0 to 1.
        most: bytes of all files, after which nothing is recorded any more.
        seed: of the sample; None for another each time.

    Returns:
        What is called like ``kernel``. Its ``recording`` has counts: ``taken``, ``too_large`` and ``full``.

    Raises:
        ValueError: ``rate`` is no share, the folder cannot be made, or the kernel offers no operation that has tensors.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate!r}; expected a share of the calls, 0 to 1")
    subject = kernel if operation is None else FunctionSubject(kernel, operation)
    names = [
        name for name in operation_names() if isinstance(operation_named(name), Signature) and offers(subject, name)
    ]
    if not names:
        raise ValueError(
            f"{type(kernel).__name__} offers no operation that takes and gives tensors; name that of a function"
        )
    try:
        folder = Folder.made(directory, _header(subject, names))
    except ExchangeError as error:
        raise ValueError(str(error)) from error
    recording = Recording(folder, rate, most, random.Random(seed))
    if operation is not None:
        wrapped = recording.wrapped(operation_named(operation), kernel)
        wrapped.recording = recording  # type: ignore[attr-defined]
        return wrapped
    return Recorded(subject, names, recording)


class Recorded:
    """A subject whose calls are recorded; everything else is the subject's own."""

    def __init__(self, subject: Any, names: list[str], recording: Recording) -> None:
        self.recording, self._subject = recording, subject
        for name in names:
            setattr(self, name, recording.wrapped(operation_named(name), getattr(subject, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


class Recording:
    """Where the sample goes, and how much of it there is.

    Attributes:
        taken: calls that were written.
        too_large: calls of the sample that were not, for their size.
        full: why nothing is recorded any more, or "".
    """

    def __init__(self, folder: Folder, rate: float, most: int, drawn: random.Random) -> None:
        self.folder, self.rate, self.most, self.drawn = folder, rate, most, drawn
        self.taken, self.too_large, self.full = 0, 0, ""

    def wrapped(self, operation: Signature, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, some of whose calls are recorded."""
        rate, draw = self.rate, self.drawn.random

        @functools.wraps(method)
        def call(*places: Any, **options: Any) -> Any:
            if draw() >= rate or self.full:
                return method(*places, **options)
            taken = self._guarded(lambda: self._before(operation, places, options))
            returned = method(*places, **options)
            if taken is not None:
                self._guarded(lambda: self._after(operation, taken, places, options, returned))
            return returned

        return call

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # a fault of the recorder must not reach who calls the kernel
            self._stop(f"{type(error).__name__}: {error}")
            return None

    def _stop(self, why: str) -> None:
        self.full = why
        warnings.warn(f"mla_spec.record: nothing more is recorded in {self.folder.path}: {why}", stacklevel=2)

    def _before(
        self, operation: Signature, places: Any, options: Any
    ) -> tuple[Call, Callable[[Answer], Answer]] | None:
        """A copy of a call, or of a part of it, and what takes the same part of its outputs; None where it is too large."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        call = call_of(operation, places, options)
        part: Callable[[Answer], Answer] = _whole
        if _size(call.tensors) > LARGEST and operation.name == "decode":
            call, part = _one_sequence(call, self.drawn)
        if _size(call.tensors) > LARGEST:
            self.too_large += 1
            return None
        copies = {name: x.detach().to("cpu", copy=True) for name, x in call.tensors.items()}
        return Call(call.operation, copies, call.values, call.strides), part

    def _after(self, operation: Signature, taken: Any, places: Any, options: Any, returned: Any) -> None:
        call, part = taken
        answer = encode(part(_outputs(operation, places, options, returned)), {})
        data = call.encoded()
        if self.folder.size + len(data) + len(answer) > self.most:
            self._stop(f"its files would exceed {self.most} bytes")
            return
        name = address(data)
        if name in self.folder.known:
            return
        self.folder.put_answer(name, answer)
        self.folder.add(call, "", str(self.taken), self.most)
        self.folder.size += len(answer)
        self.taken += 1


def _header(subject: Any, names: list[str]) -> HeaderLine:
    found = describe(subject)
    plain = {
        "name": found.name,
        "operations": names,
        "supports": asdict(found.supports),
        "profile": {dtype: asdict(each) for dtype, each in found.profiles.items()},
    }
    return HeaderLine(
        suite=__version__,
        seed=0,
        examples=1,
        laws=(),
        dtypes=None,
        subject=json.loads(json.dumps(plain)),
        recorded=True,
    )


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


def _one_sequence(call: Call, drawn: random.Random) -> tuple[Call, Callable[[Answer], Answer]]:
    """A ``decode`` of one sequence at random, with the pages that hold its tokens in their order."""
    q, cache, table, lengths = (call.tensors[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens"))
    i = drawn.randrange(len(q))
    one = slice(i, i + 1)
    needed = -(-int(lengths[i]) // cache.shape[1])
    pages = cache[table[i, :needed].long()]
    own = torch.arange(needed, dtype=torch.int32)[None]
    part = {"q": q[one], "kv_cache": pages, "block_table": own, "cache_seqlens": lengths[one]}
    return Call(call.operation, part, call.values), lambda answer: {name: x[one] for name, x in answer.items()}
