"""The command ``mla-spec check``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from mla_spec.front.device import require_device
from mla_spec.front.production import production
from mla_spec.front.report import exit_code, report_of
from mla_spec.judging.check import check_subject, find_laws
from mla_spec.judging.compiled import compiler_missing
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options, Production
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.reference.checkpoint import checkpoint_model
from mla_spec.subjects.configured import configured_subject, dims_of
from mla_spec.subjects.description import describe
from mla_spec.subjects.find import UnknownSubject, available_subjects
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.terminal import UsageError, append_json, show_progress, write_json


def check(options: argparse.Namespace) -> int:
    """Check the subjects, print one report each, and return the exit code."""
    _require_sensible(options)
    try:
        laws = [law.name for law in find_laws(options.law)]
        common = _law_options(options)
        specs = options.subjects or available_subjects()
        arguments = [(name, getattr(options, name)) for name in ("signature", "config")]
        given = sum(((f"--{name}", value) for name, value in arguments if value is not None), ())
    except ValueError as error:
        raise UsageError(str(error)) from error
    settings = [Options(**common, spec=(spec, *given)) for spec in specs]
    everything: list[Record] = []
    try:
        for text, records in (_in_process if options.in_process else _in_workers)(settings, laws, options):
            show_progress("")
            print(f"{text}\n{report_of(records)}\n", flush=True)
            everything += records
    except UnknownSubject as error:
        raise UsageError(str(error)) from error
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in everything])
    return exit_code(everything)


def _in_process(
    settings: list[Options], laws: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, list[Record]]]:
    """What each subject declares, and the records of its laws, in order."""
    progress = _Progress(len(laws) * len(settings), options.records)
    subjects = [configured_subject(_spec(each), options.signature, each.dims) for each in settings]
    for subject, each in zip(subjects, settings, strict=True):
        yield describe(subject).text, check_subject(subject, laws=laws, options=each, progress=progress)


def _in_workers(
    settings: list[Options], laws: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, list[Record]]]:
    """The same of subjects that are never in this process; workers are busy with the subjects that follow."""
    progress = _Progress(len(laws) * len(settings), options.records)
    with WorkerPool(options.jobs, options.timeout) as pool:
        asked = [pool.describe(each, options.signature) for each in settings]
        declared = [future.result() for future in asked]
        pending = [
            [pool.submit(law, subject.name, each, options.signature) for law in laws]
            for subject, each in zip(declared, settings, strict=True)
        ]
        for future in (future for futures in pending for future in futures):
            future.add_done_callback(progress.of_future)
        for subject, futures in zip(declared, pending, strict=True):
            yield subject.text, [future.result() for future in futures]


def _spec(options: Options) -> str:
    assert options.spec is not None
    return options.spec[0]


class _Progress:
    """Counts records, names the law that has just run, and appends its record to a file where one is named."""

    def __init__(self, total: int, file: str | None) -> None:
        self.total, self.done, self.file = total, 0, file

    def of_future(self, future: Future[Record]) -> None:
        if not future.cancelled():
            self(future.result())

    def __call__(self, record: Record) -> None:
        self.done += 1
        if self.file is not None:
            append_json(self.file, record.as_dict())
        show_progress(f"[{self.done}/{self.total}] {record.law} [{record.subject}]")


def _law_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "examples": options.examples,
        "seed": options.seed,
        "device": options.device,
        "threads": options.threads,
        "compile": options.compile,
        "production": _production(options),
        "dims": () if options.config is None else dims_of(checkpoint_model(options.config)),
        "dtypes": None if options.dtype is None else tuple(options.dtype),
        "case": None if options.case is None else parse_case(options.case),
    }


def _production(options: argparse.Namespace) -> Production | None:
    """What ``--production``, ``--budget`` and ``--workload`` ask for; a file of shapes asks for all of it."""
    if not options.production and options.workload is None:
        if options.budget is not None:
            raise UsageError("--budget is of --production, which is not given")
        return None
    return production(options.budget, options.seed, options.workload)


def _require_sensible(options: argparse.Namespace) -> None:
    for name in ("examples", "threads", "jobs", "timeout", "budget"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be positive, got {value}")
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if options.case is not None and len(options.law) != 1:
        raise UsageError("--case needs exactly one --law")
    require_device(options.device)
    if options.records is not None:
        append_json(options.records)  # nothing yet: laws should not run for a file that cannot be written
    if options.compile is not None and (reason := compiler_missing(options.compile, options.device)):
        raise UsageError(f"--compile {options.compile}: {reason}")
