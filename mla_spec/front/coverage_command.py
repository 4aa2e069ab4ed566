"""The command ``mla-spec coverage``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mla_spec.judging.law import Options
from mla_spec.proof.coverage import measure_coverage, report
from mla_spec.proof.selftest import matrix_from, planted_bugs, run_selftest
from mla_spec.subjects.description import declared_by
from mla_spec.subjects.process import apart
from mla_spec.subjects.violation import SubjectCrashed, UnknownSubject
from mla_spec.text.files import read_text
from mla_spec.text.terminal import UsageError, show_progress, shown, write_json


def coverage(options: argparse.Namespace) -> int:
    """Count cases and kills and print them; 1 where a cell is empty without a reason, or a law fails."""
    given = None if options.selftest is None else _read_matrix(options.selftest)
    try:
        for spec in options.subjects:
            with apart(spec) as subject:
                declared_by(subject)
    except (UnknownSubject, SubjectCrashed) as error:
        raise UsageError(str(error)) from error
    matrix = _first_kills(options) if given is None else given
    law_options = Options(examples=options.examples, seed=options.seed)
    measured = measure_coverage(options.subjects, matrix, law_options, jobs=options.jobs, progress=show_progress)
    show_progress("")
    print(report(measured))
    if options.json is not None:
        write_json(options.json, measured.as_dict())
    return 0 if measured.complete else 1


def _first_kills(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = run_selftest(
        planted_bugs(()),
        Options(seed=options.seed),
        quick=True,
        jobs=options.jobs,
        progress=lambda result: show_progress(f"planted bug {result.bug}"),
    )
    return [result.as_dict() for result in results.results]


def _read_matrix(path: str) -> list[dict[str, Any]]:
    try:
        matrix = matrix_from(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--selftest must be what `mla-spec selftest --json` wrote; {shown(path)}: {error}") from error
    return [result.as_dict() for result in matrix.results]
