"""The command ``mla-spec selftest``."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch

from mla_spec.harness import peer_results
from mla_spec.harness.laws import Options
from mla_spec.harness.report import format_table
from mla_spec.harness.selftest import BugResult, planted_bugs, run_selftest
from mla_spec.harness.selftest_report import report, write_markdown
from mla_spec.harness.terminal import UsageError, show_progress, write_json


def selftest(options: argparse.Namespace) -> int:
    """Run the suite on the planted bugs and print the kill matrix; 1 where a bug survives."""
    for name in ("examples", "jobs", "timeout"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name} must be positive, got {getattr(options, name)}")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    try:
        bugs = planted_bugs(options.bug)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.catalogue:
        print(format_table([("bug", "status", "symptom"), *_catalogue()]))
        return 0
    done = 0

    def progress(result: BugResult) -> None:
        nonlocal done
        done += 1
        show_progress(f"[{done}/{len(bugs)}] {result.bug} {'survives' if result.survives else 'killed'}")

    made = Options(examples=options.examples, seed=options.seed, device=options.device)
    matrix = run_selftest(
        bugs, made, quick=options.quick, jobs=options.jobs, timeout=options.timeout, progress=progress
    )
    show_progress("")
    print(report(matrix))
    content, tables = matrix.as_dict(), []
    if options.peers:
        results = peer_results.run_peers(bugs, matrix, jobs=options.jobs, progress=show_progress)
        show_progress("")
        print(f"\n{peer_results.report(results)}")
        content["peers"] = results.as_dict()
        tables.append(peer_results.markdown(results))
    if options.json is not None:
        write_json(options.json, content)
    if options.markdown is not None:
        try:
            write_markdown(options.markdown, matrix, tables)
        except OSError as error:
            raise UsageError(f"cannot write {options.markdown}: {error.strerror}") from error
    return 1 if matrix.survivors else 0


def _catalogue() -> list[tuple[str, ...]]:
    """Id, status and symptom of every reported fault; the status of one that is not planted says why."""
    entries: list[Any] = importlib.import_module("mla_spec.planted_bugs.catalogue").catalogue()
    return [(entry.id, entry.status, entry.symptom) for entry in entries]
