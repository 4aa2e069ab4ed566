"""The command ``mla-spec selftest``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mla_spec.front.device import require_device
from mla_spec.front.selftest_report import report, write_markdown
from mla_spec.installed import reported_faults
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
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError, append_json, show_progress, shown, write_json


def selftest(options: argparse.Namespace) -> int:
    """Run the suite on the planted bugs and print the kill matrix; 1 where a bug survives."""
    require_device(options.device)
    try:
        bugs = planted_bugs(options.bug)
    except ValueError as error:
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
    print(f"{format_table([('bug', 'law', 'same wrong numbers'), *rows])}\n\n{explained.score(results)}")
    if options.json is not None:
        write_json(options.json, [each.as_dict() for each in results])
    return 0


def _catalogue() -> list[tuple[str, ...]]:
    """Id, status and symptom of every reported fault; the status of one that is not planted says why."""
    return [(entry.id, entry.status, entry.symptom) for entry in reported_faults()]
