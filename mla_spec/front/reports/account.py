"""What all reports tell: the subjects of a run, each with its laws, its causes and what it declares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from mla_spec.front.gathered import Gathered, gather
from mla_spec.front.overview import headline
from mla_spec.front.report import merged
from mla_spec.judging.causes import Cause, causes
from mla_spec.judging.plan import Judged
from mla_spec.judging.records import NamedSuspect, RunLine, SubjectLine
from mla_spec.judging.verdict import Record


@dataclass(frozen=True)
class Account:
    """What came of one subject.

    Attributes:
        subject: what it declares, and the state of its code.
        cells: each law in each dtype.
        records: one of each law, over all dtypes.
        causes: of what fails, with the suspects that the run named.
        part: whether cells of the run are missing.
    """

    subject: SubjectLine
    cells: tuple[Judged, ...]
    records: tuple[Record, ...]
    causes: tuple[Cause, ...]
    part: bool

    @property
    def headline(self) -> tuple[str, str]:
        """The verdict in one sentence, and its color."""
        return headline(list(self.records), list(self.causes), part=self.part)

    @property
    def judged(self) -> list[Record]:
        """Of each law in each dtype where it applies."""
        return [record for _, record in self.cells if record.verdict != "unsupported"]

    @property
    def seconds(self) -> float:
        """Of work."""
        return sum(record.seconds for record in self.records)


@dataclass(frozen=True)
class Document:
    """What a report is of.

    Attributes:
        header: how the run was made.
        accounts: one of each subject, in the order in which they were asked for.
        faults: what makes the whole incomplete.
        exit_code: of the whole run.
    """

    header: RunLine
    accounts: tuple[Account, ...]
    faults: tuple[str, ...]
    exit_code: int


def read_document(paths: Iterable[str]) -> Document:
    """The run that files of records tell of; UsageError where one cannot be read, holds none, or another one."""
    gathered = gather(paths)
    accounts = tuple(_account(gathered, line) for line in gathered.subjects.values())
    return Document(gathered.runs[0].header, accounts, tuple(gathered.faults()), gathered.exit_code)


def _account(gathered: Gathered, line: SubjectLine) -> Account:
    cells = tuple((cell, record) for cell, record in gathered.ordered() if cell.spec == line.spec)
    records = tuple(merged(record for _, record in cells))
    found = causes(record for record in records if not record.holds)
    known = {cause.law: cause for run in gathered.runs for cause in run.causes if cause.spec == line.spec}
    for cause in found:
        if cause.lead.law in known:
            cause.findings += [asdict(finding) for finding in known[cause.lead.law].findings]
            cause.suspects += [_plain(suspect) for suspect in known[cause.lead.law].suspects]
    part = any(cell.spec == line.spec for cell in gathered.missing)
    return Account(line, cells, records, tuple(found), part)


def _plain(suspect: NamedSuspect) -> dict[str, object]:
    return {name: value for name, value in asdict(suspect).items() if value}


def environment_rows(document: Document) -> list[tuple[str, str]]:
    """Where and how the run was made, as names and values."""
    header = document.header
    device = header.device if header.gpu is None else f"{header.device}, {header.gpu}"
    rows = [
        ("suite", f"mla-spec {header.suite}"),
        ("started", header.started),
        ("device", device),
        ("platform", header.platform),
        ("python, numpy, torch", f"{header.python}, {header.numpy}, {header.torch}"),
        ("cases", f"--seed {header.seed} --examples {header.examples}"),
        ("threads", str(header.threads)),
    ]
    more = {
        "torch.compile": header.compile,
        "one case": header.case,
        "production": None if header.production is None else f"budget {header.production.get('budget')} s",
    }
    return rows + [(name, value) for name, value in more.items() if value is not None]


def code_text(subject: SubjectLine) -> str:
    """The state of a subject's code; empty where it is part of the suite."""
    parts = [
        f"SHA-256 {subject.source}" if subject.source else "",
        f"commit {subject.revision}" if subject.revision else "",
    ]
    changed = ", with changes" if subject.modified else ""
    return ", ".join(part for part in parts if part) + changed


def declared_rows(subject: SubjectLine) -> list[tuple[str, str]]:
    """What a subject declares beyond the defaults, as names and values."""
    from mla_spec.bounds.profile import Profile
    from mla_spec.subjects.supports import Supports

    rows = [("operations", ", ".join(subject.operations) or "none"), ("dtypes", ", ".join(subject.dtypes) or "none")]
    rows += [("code", code_text(subject))] if code_text(subject) else []
    rows += [(f"supports {name}", _value(value)) for name, value in _changed(subject.supports, asdict(Supports()))]
    for dtype, declared in subject.profiles.items():
        try:
            usual = asdict(Profile.default(dtype))
        except (ValueError, KeyError):
            usual = {}
        changed = "; ".join(f"{name} {_value(value)}" for name, value in _changed(declared, usual) if name != "dtype")
        rows.append((f"profile of {dtype}", changed or "the default"))
    return rows


def _changed(declared: dict[str, object], usual: dict[str, object]) -> list[tuple[str, object]]:
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    return [(name, value) for name, value in declared.items() if name != "dtypes" and value != as_lists.get(name)]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
