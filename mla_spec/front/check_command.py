"""The command ``mla-spec check``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch

from mla_spec.front.report import describe_subject, exit_code, report_of
from mla_spec.judging.check import check_subject, find_laws
from mla_spec.judging.compiled import compiler_missing
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.subjects.contract import subject_name
from mla_spec.subjects.find import UnknownSubject, available_subjects, resolve_subject
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.terminal import UsageError, show_progress, write_json


def check(options: argparse.Namespace) -> int:
    """Check the subjects, print one report each, and return the exit code."""
    _require_sensible(options)
    try:
        laws = [made.name for made in find_laws(options.law)]
        made = _law_options(options)
        specs = options.subjects or available_subjects()
        subjects = [(spec, resolve_subject(spec, options.signature)) for spec in specs]
    except (ValueError, UnknownSubject) as error:
        raise UsageError(str(error)) from error
    everything: list[Record] = []
    for subject, records in _records(subjects, laws, made, options):
        show_progress("")
        print(f"{describe_subject(subject)}\n{report_of(records)}\n", flush=True)
        everything += records
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in everything])
    return exit_code(everything)


def _records(
    subjects: list[tuple[str, object]], laws: list[str], made: dict[str, Any], options: argparse.Namespace
) -> Iterator[tuple[object, list[Record]]]:
    """Each subject with the records of its laws, in order; worker processes are busy with the subjects that follow."""
    signature = () if options.signature is None else ("--signature", options.signature)
    settings = [Options(**made, spec=(spec, *signature)) for spec, _ in subjects]
    progress = _Progress(len(laws) * len(subjects))
    if options.in_process:
        for (_, subject), options_of_one in zip(subjects, settings, strict=True):
            yield subject, check_subject(subject, laws=laws, options=options_of_one, progress=progress)
        return
    with WorkerPool(options.jobs or (2 if options.device == "cpu" else 1), options.timeout) as pool:
        pending = [
            [pool.submit(law, subject_name(subject), options_of_one, options.signature) for law in laws]
            for (_, subject), options_of_one in zip(subjects, settings, strict=True)
        ]
        for future in (future for futures in pending for future in futures):
            future.add_done_callback(progress.of_future)
        for (_, subject), futures in zip(subjects, pending, strict=True):
            yield subject, [future.result() for future in futures]


class _Progress:
    """Counts records, and names the law that has just run."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def of_future(self, future: Future[Record]) -> None:
        if not future.cancelled():
            self(future.result())

    def __call__(self, record: Record) -> None:
        self.done += 1
        show_progress(f"[{self.done}/{self.total}] {record.law} [{record.subject}]")


def _law_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "examples": options.examples,
        "seed": options.seed,
        "device": options.device,
        "threads": options.threads,
        "compile": options.compile,
        "dtypes": None if options.dtype is None else tuple(options.dtype),
        "case": None if options.case is None else parse_case(options.case),
    }


def _require_sensible(options: argparse.Namespace) -> None:
    for name in ("examples", "threads", "jobs", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be positive, got {value}")
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if options.case is not None and len(options.law) != 1:
        raise UsageError("--case needs exactly one --law")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if options.compile is not None and (reason := compiler_missing(options.compile, options.device)):
        raise UsageError(f"--compile {options.compile}: {reason}")
