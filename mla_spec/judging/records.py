"""Records on disk: JSON lines, appended as they are made. ``docs/records.md`` describes them.

A file holds one or more runs. A run begins with a line of type "run", has one of type "subject" for each subject, one of type
"verdict" for each cell and one of type "cause" for each fault that was found, and ends with one of type "end" unless it was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from mla_spec.judging.plan import Cell
from mla_spec.judging.regime_count import RegimeCount
from mla_spec.judging.verdict import Record, Verdict
from mla_spec.operations.all import parse_case
from mla_spec.text.files import standard_stream
from mla_spec.text.json_lines import LineSchema
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Count, Mistyped, Size

SCHEMA, VERSION = "mla-spec-records", 1
LONGEST_LINE = 2**24


class RecordsError(Exception):
    """A file of records cannot be read or written, or is none; the text is one sentence."""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """How a run was made; everything of which its verdicts depend, but the subjects."""

    type: Literal["run"] = "run"
    schema: Literal["mla-spec-records"] = "mla-spec-records"
    version: Literal[1] = 1
    run: str
    started: str
    suite: str
    python: str
    numpy: str
    torch: str
    platform: str
    device: str
    gpu: str | None
    seed: Size
    examples: Count
    threads: Count
    compile: str | None
    production: dict[str, Any] | None
    case: str | None
    laws: tuple[str, ...]
    shard: tuple[Count, Count] = (1, 1)
    quick: bool = False

    def differs(self, other: RunLine) -> str:
        """The first field in which another run may have come to other verdicts, and both values; or ""."""
        for name in _DECISIVE:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {shown(mine)} in one and {shown(theirs)} in the other"
        return ""


_DECISIVE = [
    "suite",
    "numpy",
    "torch",
    "device",
    "gpu",
    "seed",
    "examples",
    "quick",
    "threads",
    "compile",
    "production",
    "case",
]


@dataclass(frozen=True, kw_only=True)
class SubjectLine:
    """What a subject declares, and the state of its code."""

    type: Literal["subject"] = "subject"
    run: str
    spec: tuple[str, ...]
    name: str
    operations: tuple[str, ...]
    dtypes: tuple[str, ...]
    supports: dict[str, Any]
    profiles: dict[str, dict[str, Any]]
    source: str | None
    revision: str | None
    modified: bool | None

    def differs(self, other: SubjectLine) -> str:
        """The first field in which the subject is another one, and both values; or ""."""
        for name in ("name", "operations", "dtypes", "supports", "profiles", "source", "revision"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} of {self.spec[0]} is {shown(mine)} in one and {shown(theirs)} in the other"
        return ""


Number = float | Literal["nan", "inf", "-inf"]
"""As JSON can hold it."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The anatomy of a wrong result (``mla_spec.judging.anatomy``), and its case."""

    case: str
    what: str
    shape: list[Size]
    wrong: Size
    judged: Literal["within", "bits"]
    excess: Number
    pattern: str
    value: Number | None
    where: dict[str, list[tuple[Size, Size]]]
    sample: list[tuple[Size, Number, Number, Number]]
    grid: list[list[Number]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            parse_case(self.case)
        except ValueError as error:
            raise Mistyped(str(error)) from error
        for axis in self.where:
            if axis not in map(str, range(len(self.shape))):
                raise Mistyped(f"where has the axis {shown(axis)}; expected one of {len(self.shape)}, counted from 0")


@dataclass(frozen=True, kw_only=True)
class VerdictLine:
    """What a law said of a subject in a dtype: the fields of ``Record``."""

    type: Literal["verdict"] = "verdict"
    run: str
    spec: tuple[str, ...]
    seed: Size
    law: str
    subject: str
    verdict: Verdict
    cases: Size
    worst: float | None
    worst_case: str
    message: str
    case: str
    replay: str
    seconds: float
    note: str
    dtype: str
    waived: str = ""
    evidence: tuple[Evidence, ...] = ()
    separation: dict[str, Any] = field(default_factory=dict)
    regimes: dict[str, RegimeCount] = field(default_factory=dict)
    spread: dict[str, dict[str, Size]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = self.separation
        if found and not (isinstance(found.get("field"), str) and {"is", "least", "most"} & set(found)):
            raise Mistyped(f"separation is {shown(found)}; expected a field, and what it is, or its least or most")

    @property
    def cell(self) -> Cell:
        return Cell(self.spec, self.law, self.dtype, self.seed)

    @property
    def record(self) -> Record:
        return Record(**{name: getattr(self, name) for name in _RECORD} | _plain(self))


def _plain(line: VerdictLine) -> dict[str, Any]:
    """The fields of a line that have a schema, as records hold them: lists, and no tuples."""
    evidence, regimes = map(asdict, line.evidence), {name: asdict(count) for name, count in line.regimes.items()}
    plain: dict[str, Any] = json.loads(json.dumps({"evidence": list(evidence), "regimes": regimes}))
    return plain


_RECORD = [f.name for f in fields(Record) if f.name not in ("dtypes", "told", "cause")]


@dataclass(frozen=True, kw_only=True)
class NamedSuspect:
    """A known fault that gives the same wrong numbers; what is empty is not known."""

    id: str
    claim: str
    source: str = ""
    symptom: str = ""
    declare: str = ""


@dataclass(frozen=True, kw_only=True)
class FoundOut:
    """What was found out of a fault: which part of the computation it is about, and a sentence."""

    topic: str
    says: str


@dataclass(frozen=True, kw_only=True)
class CauseLine:
    """A fault that the report of a run shows: the law that shows it first, what was found out, and known faults with the same numbers."""

    type: Literal["cause"] = "cause"
    run: str
    spec: tuple[str, ...]
    law: str
    statement: str
    laws: tuple[str, ...]
    follows: tuple[str, ...]
    suspects: tuple[NamedSuspect, ...]
    findings: tuple[FoundOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EndLine:
    """How a run ended, and with which exit code."""

    type: Literal["end"] = "end"
    run: str
    reason: str
    exit: Size


Line = RunLine | SubjectLine | VerdictLine | CauseLine | EndLine
_LINES = LineSchema(
    SCHEMA,
    VERSION,
    "run",
    {
        "run": RunLine,
        "subject": SubjectLine,
        "verdict": VerdictLine,
        "cause": CauseLine,
        "end": EndLine,
    },
)


@dataclass
class Run:
    """One run as it was recorded."""

    header: RunLine
    subjects: dict[tuple[str, ...], SubjectLine] = field(default_factory=dict)
    verdicts: list[VerdictLine] = field(default_factory=list)
    causes: list[CauseLine] = field(default_factory=list)
    end: EndLine | None = None


class RecordFile:
    """A file to which lines are appended, each by one call of the system; a context manager.

    A regular file is held by one run at a time: another that would write to it is refused. A line that a killed run left
    unfinished is taken away.

    Raises:
        RecordsError: it cannot be written, or another run holds it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._new = not os.path.lexists(path)
            self._handle, self.regular = _open(path)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        try:
            if self.regular:
                self._lock()
                self._end_last_line()
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, *lines: Line) -> None:
        """Append lines; RecordsError where the disk is full."""
        data = "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._new and os.fstat(self._handle).st_size == 0:
            os.unlink(self.path)  # no run began
        os.close(self._handle)

    def _failed(self, error: Exception) -> RecordsError:
        return RecordsError(f"cannot write {shown(self.path)}: {getattr(error, 'strerror', None) or error}")

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not a Unix
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordsError(f"cannot write {shown(self.path)}: another run is writing to it") from error
        except OSError:
            return  # a file system without locks

    def _end_last_line(self) -> None:
        size = os.fstat(self._handle).st_size
        tail = os.pread(self._handle, LONGEST_LINE, max(0, size - LONGEST_LINE))
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        try:
            _read_line(last, "")
        except RecordsError:
            if not last.startswith(b"{"):
                raise RecordsError(
                    f"{shown(self.path)} ends with what is no record; nothing is appended to it"
                ) from None
            os.ftruncate(self._handle, size - len(last))
        else:
            os.write(self._handle, b"\n")


def _open(path: str) -> tuple[int, bool]:
    """A handle that appends, and whether it is a regular file's."""
    stream = standard_stream(path)
    if stream is not None:
        stream.flush()
        return os.dup(stream.fileno()), False
    if not os.path.exists(path) or os.path.isfile(path):
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), True
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe that nobody reads would wait for ever
    os.set_blocking(handle, True)
    return handle, False


def read_records(path: str) -> list[Run]:
    """The runs of a file, in its order. A last line that was not finished counts nothing.

    Raises:
        RecordsError: the file cannot be read, or a line is no record.
    """
    runs: dict[str, Run] = {}
    for number, line in _lines(path):
        where = f"{shown(path)}:{number}"
        if isinstance(line, RunLine):
            if line.run in runs:
                raise RecordsError(f"{where}: the run {shown(line.run)} begins twice")
            runs[line.run] = Run(line)
            continue
        if line.run not in runs:
            raise RecordsError(f"{where}: the run {shown(line.run)} has no line that begins it")
        _add(runs[line.run], line, where)
    return list(runs.values())


def _add(run: Run, line: SubjectLine | VerdictLine | CauseLine | EndLine, where: str) -> None:
    if isinstance(line, SubjectLine):
        if not line.spec:
            raise RecordsError(f"{where}: spec is []; expected the arguments that name a subject")
        run.subjects[line.spec] = line
    elif isinstance(line, EndLine):
        run.end = line
    elif line.spec not in run.subjects:
        raise RecordsError(f"{where}: the subject {shown(line.spec)} has no line before its verdicts")
    elif isinstance(line, CauseLine):
        run.causes.append(line)
    else:
        run.verdicts.append(line)


def _lines(path: str) -> Iterator[tuple[int, Line]]:
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if not raw.strip():
                    continue
                try:
                    yield number, _read_line(raw, f"{shown(path)}:{number}")
                except RecordsError:
                    if raw.endswith(b"\n") or len(raw) == LONGEST_LINE or not raw.startswith(b"{"):
                        raise
    except (OSError, ValueError) as error:
        raise RecordsError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def _read_line(raw: bytes, where: str) -> Line:
    try:
        line: Line = _LINES.read(raw, where)
    except Mistyped as error:
        raise RecordsError(str(error)) from error
    return line
