"""The command ``mla-spec explain``."""

from __future__ import annotations

import argparse

from mla_spec.front.case_script import export, script
from mla_spec.front.device import require_device
from mla_spec.front.overview import short_replay, suspect_text
from mla_spec.front.report import exit_code
from mla_spec.installed import all_laws
from mla_spec.judging.causes import Cause, error_text, with_causes
from mla_spec.judging.check import find_laws
from mla_spec.judging.findings import find_out
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import CALLED, parse_case
from mla_spec.operations.case import Case
from mla_spec.proof.suspects import named_suspects, room
from mla_spec.subjects.description import Description
from mla_spec.subjects.violation import UnknownSubject
from mla_spec.text.layout import Screen
from mla_spec.text.terminal import UsageError, require_output, show_progress, write_json


def explain_case(options: argparse.Namespace) -> int:
    """Run one case, say what is wrong with its result and which known fault is wrong in the same way."""
    require_device(options.device)
    require_output("--json", options.json)
    try:
        case = parse_case(options.case)
        laws = [law.name for law in find_laws([options.law])] if options.law else laws_of(case)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not laws:
        raise UsageError(f"name the law that fails on a case of the kind {case.kind} with --law")
    record, declared = _first_failure(laws, case, options)
    screen = Screen.of()
    head = f"{record.law} [{record.subject}]: {record.verdict}"
    print("\n".join(line for text in (head, *record.message.splitlines()) for line in screen.wrapped(text, rest="  ")))
    if record.verdict not in ("fail", "crashed"):
        print("nothing to explain: the law does not fail on this case")
        return exit_code([record])
    cause = Cause(record, [record])
    print("\n".join(screen.wrapped(f"what: {error_text(record)}", rest="  ")), flush=True)
    show_progress("the subject is asked again, and known faults are tried")
    with room() as pool:
        asked = Options(device=options.device, spec=spec_of(options))
        cause.findings += [finding.as_dict() for finding in find_out(record, asked, pool, options.signature)]
        cause.suspects += named_suspects(record, pool)
    show_progress("")
    print("\n".join(_said(cause, screen)))
    if options.export is not None:
        export(options.export, lambda: script(record, declared, spec_of(options), options.device))
    if options.json is not None:
        (whole,) = with_causes([record], [cause])
        write_json(options.json, whole.as_dict())
    return exit_code([record])


def laws_of(case: Case) -> list[str]:
    """The laws of the operation of a case alone that compare with the reference, in the order of the report."""
    named = {operation.case.kind: operation.name for operation in CALLED} | {"layer": "layer"}
    laws = [law for law in all_laws().values() if law.needs == (named.get(case.kind, ""),)]
    return [law.name for law in laws if law.name.endswith("_with_reference") and not law.unavailable(Options())]


def spec_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The arguments by which ``mla-spec check`` finds the subject."""
    return (options.subject, *(() if options.signature is None else ("--signature", options.signature)))


def _first_failure(laws: list[str], case: Case, options: argparse.Namespace) -> tuple[Record, Description]:
    """The record of the first law that fails on the case, or of the last; and what the subject declares."""
    law_options = Options(case=case, minimise=False, device=options.device, spec=spec_of(options))
    try:
        with WorkerPool(1, options.timeout) as pool:
            declared = pool.describe(law_options, options.signature).result()
            if declared.fault:
                raise UsageError(declared.fault)
            for law in laws:
                record = pool.submit(law, declared.name, law_options, options.signature).result()
                if record.verdict in ("fail", "crashed"):
                    break
    except UnknownSubject as error:
        raise UsageError(str(error)) from error
    return record, declared


def _said(cause: Cause, screen: Screen) -> list[str]:
    known = [*(f"found out: {each['says']}" for each in cause.findings), *map(suspect_text, cause.suspects)]
    lines = [line for text in known for line in screen.wrapped(text, rest="  ")]
    lines += [] if cause.suspects else ["no known fault gives these numbers"]
    return [*lines, "try:", *screen.command(short_replay(cause.lead))]
