"""The command ``mla-spec check``."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mla_spec.harness.cases import parse_case
from mla_spec.harness.check import check_subject, find_laws
from mla_spec.harness.contract import DTYPES, subject_name
from mla_spec.harness.isolation import check_in_worker
from mla_spec.harness.laws import Options
from mla_spec.harness.report import describe_subject, exit_code, report_of
from mla_spec.harness.subjects import UnknownSubject, available_subjects, resolve_subject
from mla_spec.harness.terminal import UsageError, show_progress, write_json
from mla_spec.harness.verdict import Record


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
    done = 0

    def progress(record: Record) -> None:
        nonlocal done
        done += 1
        show_progress(f"[{done}/{len(laws) * len(subjects)}] {record.law} [{record.subject}]")

    def run(spec: str, subject: object) -> list[Record]:
        signature = () if options.signature is None else ("--signature", options.signature)
        settings = made | {"spec": (spec, *signature)}
        if options.in_process:
            return check_subject(subject, laws=laws, options=Options(**settings), progress=progress)
        return check_in_worker(
            subject_name(subject),
            laws,
            Options(**settings),
            signature=options.signature,
            timeout=options.timeout,
            progress=progress,
        )

    everything: list[Record] = []
    with ThreadPoolExecutor(_jobs(options)) as pool:
        pending = [pool.submit(run, spec, subject) for spec, subject in subjects]
        for (_, subject), future in zip(subjects, pending, strict=True):
            records = future.result()
            show_progress("")
            print(f"{describe_subject(subject)}\n{report_of(records)}\n", flush=True)
            everything += records
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in everything])
    return exit_code(everything)


def _jobs(options: argparse.Namespace) -> int:
    if options.in_process:
        return 1
    return int(options.jobs or (2 if options.device == "cpu" else 1))


def _law_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "examples": options.examples,
        "seed": options.seed,
        "device": options.device,
        "threads": options.threads,
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
