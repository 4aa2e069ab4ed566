"""A folder of calls and answers. ``docs/exchange.md`` describes it.

A file is there whole or not at all, and a call's file is there before the line that names it, so that a reader may begin while
calls are still written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mla_spec.exchange.call import Call, address, read_call
from mla_spec.exchange.contents import Answer, ContentsSubject, read_answer
from mla_spec.exchange.declared import Declared, read_declared
from mla_spec.exchange.structure import drawn
from mla_spec.exchange.tensor_file import LARGEST, ExchangeError
from mla_spec.subjects.violation import NoAnswer, NotExported, SubjectCrashed
from mla_spec.text.files import write_atomically
from mla_spec.text.json_lines import LineSchema
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Count, Mistyped, Size

SCHEMA, VERSION = "mla-spec-exchange", 1
INDEX, CALLS, ANSWERS, SUFFIX = "calls.jsonl", "calls", "answers", ".safetensors"
LONGEST_LINE = 2**24
_ADDRESS = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class HeaderLine:
    """The first line of the index: what the calls were made from, or that they were ``recorded`` in some process."""

    type: Literal["exchange"] = "exchange"
    schema: Literal["mla-spec-exchange"] = "mla-spec-exchange"
    version: Literal[1] = 1
    suite: str
    seed: Size
    examples: Count
    laws: tuple[str, ...]
    dtypes: tuple[str, ...] | None
    subject: dict[str, Any]
    recorded: bool = False


@dataclass(frozen=True, kw_only=True)
class CallLine:
    """A call, and which case of which law made it first."""

    type: Literal["call"] = "call"
    call: str
    operation: str
    law: str
    case: str
    bytes: Size


@dataclass(frozen=True, kw_only=True)
class LawLine:
    """What was written of a law in a dtype; ``left_out`` says why not all of it, or is empty."""

    type: Literal["law"] = "law"
    law: str
    dtype: str
    cases: Size
    calls: Size
    bytes: Size
    left_out: str = ""


_LINES = LineSchema(SCHEMA, VERSION, "exchange", {"exchange": HeaderLine, "call": CallLine, "law": LawLine})


@dataclass
class Folder:
    """A folder that holds an index, calls and answers.

    Attributes:
        path: of the folder.
        header: the first line of its index.
        declared: the subject that the calls are for.
        known: addresses of calls that are there.
        size: bytes of their files.
    """

    path: Path
    header: HeaderLine
    declared: Declared
    known: set[str] = field(default_factory=set)
    size: int = 0

    @classmethod
    def made(cls, path: str, header: HeaderLine) -> Folder:
        """A new folder; ExchangeError where it cannot be made, or has an index already."""
        folder = cls(Path(path), header, read_declared(header.subject, "the subject"))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            for name in (CALLS, ANSWERS):
                (folder.path / name).mkdir(exist_ok=True)
            with open(folder.path / INDEX, "x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(header)) + "\n")
        except FileExistsError as error:
            raise ExchangeError(f"{shown(path)} holds something else already; expected a new folder") from error
        except (OSError, ValueError) as error:
            raise ExchangeError(f"cannot write {shown(path)}: {_reason(error)}") from error
        return folder

    @classmethod
    def opened(cls, path: str) -> Folder:
        """A folder that is there; ExchangeError where its index is damaged."""
        lines = list(_lines(Path(path) / INDEX))
        if not lines or not isinstance(lines[0], HeaderLine):
            raise ExchangeError(f"{shown(path)}: {INDEX} does not begin with a line of type 'exchange'")
        folder = cls(Path(path), lines[0], read_declared(lines[0].subject, f"{shown(path)}: subject"))
        for line in lines:
            if isinstance(line, CallLine):
                if not _ADDRESS.fullmatch(line.call):
                    raise ExchangeError(f"{shown(path)}: {INDEX} has the call {shown(line.call)}; expected a SHA-256")
                folder.known.add(line.call)
                folder.size += line.bytes
        return folder

    def add(self, call: Call, law: str, case: str, room: int) -> int | None:
        """Write a call, unless it is there: its new bytes, or None where these are more than ``room``."""
        data = call.encoded()
        name = address(data)
        if name in self.known:
            return 0
        if len(data) > room:
            return None
        self._write(f"{CALLS}/{name}{SUFFIX}", data)
        self.note(CallLine(call=name, operation=call.operation, law=law, case=case, bytes=len(data)))
        self.known.add(name)
        self.size += len(data)
        return len(data)

    def note(self, line: CallLine | LawLine) -> None:
        """Append a line to the index, by one call of the system."""
        try:
            handle = os.open(self.path / INDEX, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, (json.dumps(asdict(line)) + "\n").encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise ExchangeError(f"cannot write {shown(str(self.path / INDEX))}: {_reason(error)}") from error

    def calls(self) -> Iterator[tuple[str, bytes]]:
        """Every call by its address, as bytes; ExchangeError where one cannot be read."""
        for name in sorted(self.known):
            yield name, _read(self.path / CALLS / f"{name}{SUFFIX}")

    def put_answer(self, name: str, data: bytes) -> None:
        """Write the answer to a call."""
        self._write(f"{ANSWERS}/{name}{SUFFIX}", data)

    def answer(self, name: str) -> Answer | None:
        """The answer to a call, None where there is none.

        Raises:
            Unsupported, Violation, SubjectCrashed: as ``read_answer``.
        """
        path = self.path / ANSWERS / f"{name}{SUFFIX}"
        if not path.exists():
            return None
        try:
            data = _read(path)
        except ExchangeError as error:
            raise SubjectCrashed(str(error)) from error
        return read_answer(data, f"{ANSWERS}/{path.name}")

    def has_answer(self, name: str) -> bool:
        """Whether a call has an answer."""
        return (self.path / ANSWERS / f"{name}{SUFFIX}").exists()

    @property
    def answered(self) -> int:
        """How many calls have an answer."""
        return sum(map(self.has_answer, self.known))

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise ExchangeError(f"cannot write {shown(str(self.path / name))}: {_reason(error)}") from error


def files_subject(path: str) -> ContentsSubject:
    """The subject whose answers lie in a folder; ExchangeError where that is none."""
    folder = Folder.opened(path)

    def answer(call: Call) -> Answer:
        name = address(call.encoded())
        if name not in folder.known:
            raise NotExported(
                f"outputs come from files: a call of {call.operation} is not in {path}, because it depends on earlier answers or "
                "was left out"
            )
        found = folder.answer(name)
        if found is None:
            raise NoAnswer(
                f"no answer to {CALLS}/{name}{SUFFIX}: {folder.answered} of {len(folder.known)} calls in {path} have one"
            )
        return found

    return ContentsSubject(folder.declared, "files", answer)


def read_calls(folder: Folder) -> Iterator[tuple[str, Call]]:
    """Every call of a folder by its address; ExchangeError where one is damaged, or is not what its name says.

    Of a call whose tensors were not kept these are drawn by their moments.
    """
    for name, data in folder.calls():
        what = f"{CALLS}/{name}{SUFFIX}"
        if address(data) != name:
            raise ExchangeError(f"{what} has the sha256 {address(data)}: it is not what was written")
        yield name, drawn(read_call(data, what), what)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST:
            raise ExchangeError(f"{shown(str(path))} is larger than {LARGEST} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ExchangeError(f"cannot read {shown(str(path))}: {_reason(error)}") from error


def _lines(path: Path) -> Iterator[HeaderLine | CallLine | LawLine]:
    """The lines of an index; a last one that is not finished counts nothing."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if not raw.endswith(b"\n"):
                    if len(raw) == LONGEST_LINE:
                        raise ExchangeError(f"{path.name}:{number} is longer than {LONGEST_LINE} bytes")
                    return
                yield _line(raw, f"{path.name}:{number}")
    except (OSError, ValueError) as error:
        raise ExchangeError(f"cannot read {shown(str(path))}: {_reason(error)}") from error


def _line(raw: bytes, where: str) -> Any:
    try:
        return _LINES.read(raw, where)
    except Mistyped as error:
        raise ExchangeError(str(error)) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
