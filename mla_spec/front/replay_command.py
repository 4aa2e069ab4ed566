"""The command ``mla-spec replay``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from mla_spec.exchange.call import Call
from mla_spec.exchange.folder import INDEX
from mla_spec.exchange.record import folder_of, put
from mla_spec.exchange.recorded import Recorded
from mla_spec.exchange.source import recorded_calls
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.front.case_script import export, script_of_call
from mla_spec.front.device import require_device
from mla_spec.front.explain_command import spec_of
from mla_spec.front.report import exit_code
from mla_spec.judging.recorded import LAW, Judgement
from mla_spec.judging.replay import Replay, Replayed
from mla_spec.judging.verdict import Record
from mla_spec.subjects.find import UnknownSubject
from mla_spec.subjects.process import SubjectProcess
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError, show_progress, shown, write_json

AGAIN = "replayed call"
"""Stands for the law in the record of what a subject gives now."""


def replay(options: argparse.Namespace) -> int:
    """Judge recorded outputs, run the calls again, and write a smallest failing call of each that fails."""
    require_device(options.device)
    if options.into is not None and os.path.lexists(os.path.join(options.into, INDEX)):
        raise UsageError(f"--into: {shown(options.into)} holds calls already; expected a new folder")
    try:
        source = recorded_calls(options.folder, options.map)
    except ExchangeError as error:
        raise UsageError(str(error)) from error
    process = SubjectProcess(options.subject, options.signature, device=options.device, limit=options.timeout)
    try:
        return _replayed(options, source, Replay(process.subject, options.device, options.minimise_seconds))
    except (ExchangeError, UnknownSubject, ValueError) as error:
        raise UsageError(str(error)) from error
    finally:
        process.end()


def _replayed(options: argparse.Namespace, source: Iterator[Recorded], again: Replay) -> int:
    records: list[Record] = []
    rows: list[tuple[str, ...]] = [("call", "operation", "recorded", "again", "error/bound", "")]
    kept: list[tuple[Call, str]] = []
    for each in source:
        show_progress(f"{len(rows) - 1} calls")
        if isinstance(each.call, str):
            rows.append((_short(each.name), "", "unsupported", "", "", each.call))
            records.append(Record(LAW, "dump", "unsupported", case=each.name, message=each.call))
            continue
        found = again.of(each.call, each.answer, each.declared)
        records += _records(each, found, again.declared.name)
        rows.append(_row(each, found))
        if found.smallest is not None and found.of_smallest is not None:
            kept.append((found.smallest, found.of_smallest.message))
    show_progress("")
    print(format_table(rows))
    if len(rows) == 1:
        raise UsageError(f"{options.folder} holds no call")
    _write_smallest(options, again, kept)
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in records])
    return exit_code(records)


def _records(each: Recorded, found: Replayed, subject: str) -> Iterator[Record]:
    assert isinstance(each.call, Call)
    case = f"{each.call.operation}:{each.name}"
    for law, judgement, name in (
        (LAW, found.recorded, each.declared.name if each.declared else subject),
        (AGAIN, found.again, subject),
    ):
        if judgement is not None:
            worst = None if judgement.verdict == "fail" else judgement.worst
            yield Record(
                law,
                name,
                judgement.verdict,
                1,
                worst,
                case,
                message=judgement.message,
                case=case,
                note=judgement.note,
                dtype=judgement.dtype,
            )


def _row(each: Recorded, found: Replayed) -> tuple[str, ...]:
    assert isinstance(each.call, Call)
    was = "" if found.recorded is None else found.recorded.verdict
    worst = "" if found.again.worst is None else f"{found.again.worst:.3f}"
    said = found.sentence or _first(found.again) or ("" if found.recorded is None else _first(found.recorded))
    return _short(each.name), each.call.operation, was, found.again.verdict, worst, said


def _short(name: str) -> str:
    """A name for a column: the beginning of an address, the end of a file's name."""
    return name[:12] if len(name) == 64 else name[-32:]


def _first(judgement: Judgement) -> str:
    return judgement.message.partition("\n")[0]


def _write_smallest(options: argparse.Namespace, again: Replay, kept: list[tuple[Call, str]]) -> None:
    """Write failing calls with the answers of the subject, and the first as a script."""
    if not kept:
        return
    for call, message in kept:
        print(f"\nsmallest failing call: {shape_of(call)}\n  {message.partition(chr(10))[0]}")
    if options.into is not None:
        folder = folder_of(options.into, again.description)
        for small, _ in kept:
            put(folder, small, again.answer(small), "")
        print(f"\nmla-spec judge {options.into}\nmla-spec replay {options.into} {options.subject}")
    if options.export is not None:
        call, message = kept[0]
        spec = spec_of(options)
        export(options.export, lambda: script_of_call(call, message, again.description, spec, options.device))


def shape_of(call: Call) -> str:
    """A call in one line: its operation, and the shapes of its tensors."""
    names = [argument.name for argument in call.signature.arguments if argument.name in call.tensors]
    shapes = ", ".join(f"{name} {list(call.tensors[name].shape)}" for name in names)
    lengths = call.tensors.get("cache_seqlens")
    return f"{call.operation}: {shapes}" + ("" if lengths is None else f"; lengths {lengths.tolist()}")
