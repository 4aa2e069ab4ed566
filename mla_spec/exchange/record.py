"""Writes a sample of the calls that a kernel answers inside any process, for ``mla-spec judge``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mla_spec import __version__
from mla_spec.exchange.call import Call, address
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.folder import Folder, HeaderLine
from mla_spec.exchange.sample import Sample, require_rate, sampled
from mla_spec.exchange.structure import structure_of
from mla_spec.exchange.tensor_file import ExchangeError, encode
from mla_spec.installed import operation_named
from mla_spec.subjects.description import Description
from mla_spec.subjects.signature import Signature


def record(
    kernel: Any,
    directory: str,
    *,
    rate: float = 0.001,
    most: int = 2**30,
    operation: str | None = None,
    seed: int | None = None,
    tensors: bool = True,
) -> Any:
    """The kernel, of whose calls a random sample is written into a new folder, for ``mla-spec judge``.

    Arguments are copied before the call, outputs after it. Of attention over a cache whose arguments exceed 16 MiB one
    sequence or query at random is kept, with the pages or rows that it needs; other calls of that size are left out and
    counted. What goes wrong while a call is recorded ends the recording with a warning, and never the call.

    Args:
        kernel: a subject, or a function where ``operation`` names what it implements.
        directory: a folder that has no calls yet; one a process.
        rate: share of the calls that are recorded, 0 to 1.
        most: bytes of all files, after which nothing is recorded any more.
        seed: of the sample; None for another each time.
        tensors: whether their elements are written. Otherwise integers alone are, such as tables and lengths, and shape, strides
            and moments of everything else, of calls of any size and without outputs: ``mla-spec replay`` draws such tensors again.

    Returns:
        What is called like ``kernel``. Its ``recording`` has counts: ``calls``, ``taken``, ``too_large``, ``of_bytes``, those of
        quantized pages where no tensors are kept, and ``full``, why nothing is recorded any more.

    Raises:
        ValueError: ``rate`` is no share, the folder cannot be made, or the kernel offers no operation that has tensors.
    """
    require_rate(rate)

    def make(declared: Description) -> Recording:
        cls = Recording if tensors else StructureRecording
        return cls(folder_of(directory, declared), declared, rate, most, seed)

    return sampled(kernel, operation, "recording", make)


class Recording(Sample):
    """A sample that is written into a folder; ``full`` says why nothing is recorded any more, or is empty."""

    def __init__(self, folder: Folder, declared: Description, rate: float, most: int, seed: int | None) -> None:
        super().__init__(declared, rate, seed)
        self.folder, self.most, self.of_bytes = folder, most, 0
        self.what = f"mla_spec.record: nothing more is recorded in {folder.path}"

    def keep(self, call: Call, answer: Answer) -> None:
        """Write a call and its answer, unless the call is there."""
        outputs = encode(answer, {}) if answer else b""
        if self.folder.size + len(call.encoded()) + len(outputs) > self.most:
            self.stop(f"its files would exceed {self.most} bytes")
            return
        if put(self.folder, call, outputs, str(self.taken)):
            self.taken += 1


class StructureRecording(Recording):
    """A sample of which no elements of tensors are written, but integers and moments."""

    def copied(self, given: Call) -> tuple[Call, Callable[[Answer], Answer]] | None:
        """What is written of a call; None where it is of bytes."""
        found = structure_of(given)
        self.of_bytes += found is None
        return None if found is None else (found, lambda answer: {})


def put(folder: Folder, call: Call, answer: bytes, case: str) -> bool:
    """Write a call and the bytes of its answer, none where these are empty; False where the call was there."""
    name = address(call.encoded())
    if name in folder.known:
        return False
    if answer:
        folder.put_answer(name, answer)
    folder.add(call, "", case, 2**63)
    folder.size += len(answer)
    return True


def plain_description(declared: Description) -> dict[str, Any]:
    """What a subject declares as JSON, of the operations that take and give tensors."""
    plain = {
        "name": declared.name,
        "operations": [name for name in declared.operations if isinstance(operation_named(name), Signature)],
        "supports": asdict(declared.supports),
        "profile": {dtype: asdict(each) for dtype, each in declared.profiles.items()},
    }
    made: dict[str, Any] = json.loads(json.dumps(plain))
    return made


def folder_of(directory: str, declared: Description) -> Folder:
    """A new folder for recorded calls; ValueError where it cannot be made."""
    header = HeaderLine(
        suite=__version__,
        seed=0,
        examples=1,
        laws=(),
        dtypes=None,
        subject=plain_description(declared),
        recorded=True,
    )
    try:
        return Folder.made(directory, header)
    except ExchangeError as error:
        raise ValueError(str(error)) from error
