"""The commands ``mla-spec export``, ``mla-spec answer`` and ``mla-spec judge``."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from mla_spec import __version__
from mla_spec.exchange.contents import answer_apart
from mla_spec.exchange.declared import read_declared
from mla_spec.exchange.folder import INDEX, Folder, HeaderLine, read_calls
from mla_spec.exchange.record import plain_description
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.front.check_command import check
from mla_spec.front.report import exit_code
from mla_spec.installed import operation_named
from mla_spec.judging.check import find_laws
from mla_spec.judging.export import export as export_calls
from mla_spec.judging.law import Options, new_seed
from mla_spec.judging.recorded import Sights, judge_recorded, what_was_not_seen
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import CALLED
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.process import apart
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.supports import DTYPES
from mla_spec.subjects.violation import SubjectCrashed, UnknownSubject
from mla_spec.text.files import read_text
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError, show_progress, shown, write_json

_MIB = 2**20


def export(options: argparse.Namespace) -> int:
    """Write the calls of laws into a folder, or those that its answers now allow, and say what was written."""
    try:
        folder = _folder(options)
        header = folder.header
        laws = find_laws(header.laws)
        lines = []
        settings = Options(
            examples=header.examples,
            seed=header.seed,
            dtypes=header.dtypes,
            minimise=False,
            spec=(f"files:{options.folder}",),
        )
        for line in export_calls(folder, laws, settings, int(options.most * _MIB)):
            lines.append(line)
            show_progress(f"{line.law} {line.dtype}")
    except (ExchangeError, ValueError) as error:
        raise UsageError(str(error)) from error
    show_progress("")
    written = sum(line.calls for line in lines)
    print(
        f"{options.folder}: {written} new calls of {len({line.law for line in lines})} laws; {len(folder.known)} calls in all, "
        f"{folder.size / _MIB:.1f} MiB (--seed {header.seed} --examples {header.examples})"
    )
    for reason in sorted({line.left_out for line in lines} - {""}):
        names = sorted({line.law for line in lines if line.left_out == reason})
        print(f"{reason}: {', '.join(names)}")
    return 0


def _folder(options: argparse.Namespace) -> Folder:
    """The folder as it was begun, or a new one."""
    given = {name: getattr(options, name) for name in ("subject", "operation", "law", "examples", "seed", "dtype")}
    if os.path.lexists(os.path.join(options.folder, INDEX)):
        changed = [name for name, value in given.items() if value not in (None, [])]
        if changed:
            raise UsageError(
                f"{shown(options.folder)} has calls already, which say what they were made from; {changed[0]} cannot be another"
            )
        return Folder.opened(options.folder)
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    for name in options.operation:
        if not isinstance(operation_named(name), Signature):
            known = ", ".join(operation.name for operation in CALLED)
            raise UsageError(f"the operation {shown(name)} has no calls as files; those that have are {known}")
    header = HeaderLine(
        suite=__version__,
        seed=new_seed() if options.seed is None else options.seed,
        examples=options.examples or 10,
        laws=tuple(law.name for law in find_laws([*options.operation, *options.law])),
        dtypes=None if options.dtype is None else tuple(options.dtype),
        subject=_declared(options.subject),
    )
    return Folder.made(options.folder, header)


def _declared(subject: str | None) -> dict[str, Any]:
    """What a subject declares: one that can be asked, a file of JSON, or everything."""
    if subject is None:
        return {"name": "files", "operations": [operation.name for operation in CALLED]}
    if subject.endswith(".json"):
        try:
            content = json.loads(read_text(subject))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"cannot read {shown(subject)}: {getattr(error, 'strerror', None) or error}") from error
        return read_declared(content, shown(subject)).as_json()
    try:
        with apart(subject) as found:
            return _as_declared(declared_by(found), subject)
    except (UnknownSubject, SubjectCrashed) as error:
        raise UsageError(str(error)) from error


def _as_declared(found: Description, subject: str) -> dict[str, Any]:
    """What of a description can be asked by files."""
    plain = plain_description(found)
    if not plain["operations"]:
        raise UsageError(f"{subject} offers no operation that takes and gives tensors")
    return read_declared(plain, subject).as_json()


def answer(options: argparse.Namespace) -> int:
    """Have a subject answer the calls of a folder that have no answer, or all of them into another folder."""
    try:
        with apart(options.subject) as subject:
            declared_by(subject)  # a folder is not begun for none
            folder = Folder.opened(options.folder)
            into = folder if options.into is None else Folder.made(options.into, folder.header)
            count = 0
            for name, call in read_calls(folder):
                if into.has_answer(name):
                    continue
                show_progress(f"{count} answers")
                into.add(call, "", "", folder.size)
                into.put_answer(name, answer_apart(subject, call))
                count += 1
    except (ExchangeError, UnknownSubject, SubjectCrashed) as error:
        raise UsageError(str(error)) from error
    show_progress("")
    print(f"{into.path}: {count} new answers; {into.answered} of {len(into.known)} calls have one")
    return 0


def judge(options: argparse.Namespace) -> int:
    """Run the laws on the answers of a folder, as ``check`` runs them on a subject; judge recorded calls one by one."""
    try:
        folder = Folder.opened(options.folder)
        if folder.header.recorded:
            return _judge_recorded(options, folder)
    except ExchangeError as error:
        raise UsageError(str(error)) from error
    header = folder.header
    whole = options.check.parse_args(
        [f"files:{options.folder}", "--no-minimise"]
    )  # its other options are the default ones
    vars(whole).update(vars(options))
    whole.law = options.law or list(header.laws)
    whole.seed, whole.examples = header.seed, header.examples
    whole.dtype = None if header.dtypes is None else list(header.dtypes)
    return check(whole)


def _judge_recorded(options: argparse.Namespace, folder: Folder) -> int:
    """Print verdict and worst element of each recorded call, and what could not be seen."""
    for name in ("law", "records", "waivers"):
        if getattr(options, name):
            raise UsageError(
                f"--{name} is of laws; {shown(options.folder)} holds recorded calls, which are judged one by one"
            )
    sights: Sights = {}
    records: list[Record] = []
    rows = [("call", "operation", "dtype", "verdict", "error/bound", "")]
    for record in judge_recorded(folder, sights):
        show_progress(f"{len(records)} calls")
        records.append(record)
        operation, _, name = record.case.partition(":")
        worst = "" if record.worst is None else f"{record.worst:.3f}"
        first = (record.message or record.note).partition("\n")[0]
        rows.append((name[:12], operation, record.dtype, record.verdict, worst, first))
    show_progress("")
    print(format_table(rows))
    for sentence in what_was_not_seen(sights):
        print(sentence)
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in records])
    return exit_code(records)
