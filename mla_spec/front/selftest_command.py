"""The command ``mla-spec selftest``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from mla_spec.front.device import require_device
from mla_spec.front.overview import overview
from mla_spec.front.selftest_report import report, require_markdown, write_markdown
from mla_spec.installed import reported_faults
from mla_spec.judging.causes import Cause
from mla_spec.judging.law import Options
from mla_spec.proof import explained, peer_results
from mla_spec.proof.selftest import (
    BugResult,
    Matrix,
    matrix_from,
    planted_bugs,
    run_selftest,
)
from mla_spec.text.files import read_text
from mla_spec.text.layout import WIDTH, Screen
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError, append_json, show_progress, shown, write_json

LINES = 24
"""Of a terminal, which the report of one fault should fit."""


def selftest(options: argparse.Namespace) -> int:
    """Run the suite on the planted bugs and print the kill matrix; 1 where a bug survives."""
    require_device(options.device)
    try:
        bugs = planted_bugs(options.bug)
        for path in options.markdown:
            require_markdown(path)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if options.catalogue:
        print(format_table([("bug", "status", "symptom"), *_catalogue()]))
        return 0
    if options.explain is not None:
        return _explain(bugs, options)
    matrix = _read(options.read) if options.read is not None else _run(bugs, options)
    print(report(matrix))
    content, tables, short_tables = matrix.as_dict(), [], []
    if options.peers:
        results = peer_results.run_peers(bugs, matrix, jobs=options.jobs, progress=show_progress)
        show_progress("")
        print(f"\n{peer_results.report(results)}")
        content["peers"] = results.as_dict()
        tables.append(peer_results.markdown(results))
        short_tables.append(peer_results.markdown(results, short=True))
    if options.json is not None:
        write_json(options.json, content)
    for path in options.markdown:
        try:
            write_markdown(path, matrix, tables, short_tables)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return 1 if matrix.survivors else 0


def _read(path: str) -> Matrix:
    try:
        return matrix_from(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--read must be what `mla-spec selftest --json` wrote; {shown(path)}: {error}") from error


def _run(bugs: list[Any], options: argparse.Namespace) -> Matrix:
    done = 0

    def progress(result: BugResult) -> None:
        nonlocal done
        done += 1
        if options.records is not None:
            append_json(options.records, result.as_dict())
        show_progress(f"[{done}/{len(bugs)}] {result.bug} {'survives' if result.survives else 'killed'}")

    law_options = Options(examples=options.examples, seed=options.seed, device=options.device)
    matrix = run_selftest(
        bugs, law_options, quick=options.quick, jobs=options.jobs, timeout=options.timeout, progress=progress
    )
    show_progress("")
    return matrix


def _explain(bugs: list[Any], options: argparse.Namespace) -> int:
    """Say for how many planted bugs the cause is named; 0 whatever the figure is."""
    chosen, done = explained.explicable(bugs, options.explain), 0

    def progress(result: explained.Explained) -> None:
        nonlocal done
        done += 1
        if options.records is not None:
            append_json(options.records, result.as_dict())
        show_progress(f"[{done}/{len(chosen)}] {result.bug}: {', '.join(result.named) or 'nothing named'}")

    law_options = Options(examples=options.examples, seed=options.seed, device=options.device)
    results = explained.explain_bugs(chosen, law_options, progress)
    show_progress("")
    rows = [(each.bug, each.law or "not found", ", ".join(each.named) or "-") for each in results]
    print(
        f"{format_table([('bug', 'law', 'same wrong numbers'), *rows])}\n\n{explained.score(results)}\n{lengths(results)}"
    )
    if options.json is not None:
        write_json(options.json, [each.as_dict() for each in results])
    return 0


def report_lines(result: explained.Explained) -> list[str]:
    """The screen on the law that found a bug, below two lines that say what its subject declares; none where none found it."""
    record = result.record
    if record is None:
        return []
    cause = Cause(record, [record], suspects=list(result.suspects))
    return ["", "", *overview([record], Screen(), [cause]).splitlines()]


def lengths(results: Sequence[explained.Explained]) -> str:
    """How many reports are longer or wider than a screen, and which."""
    found = {result.bug: report_lines(result) for result in results if result.law}
    long = [bug for bug, lines in found.items() if len(lines) > LINES or max(map(len, lines)) > WIDTH]
    longest = max(map(len, found.values()), default=0)
    named = f": {', '.join(long)}" if long else ""
    return f"{len(long)} of {len(found)} reports do not fit {LINES} lines of {WIDTH} columns{named}; the longest has {longest} lines"


def _catalogue() -> list[tuple[str, ...]]:
    """Id, status and symptom of every reported fault; the status of one that is not planted says why."""
    return [(entry.id, entry.status, entry.symptom) for entry in reported_faults()]
