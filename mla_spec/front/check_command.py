"""The command ``mla-spec check``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any

from mla_spec.front.case_script import export, exported
from mla_spec.front.device import devices_of
from mla_spec.front.explanation import explain
from mla_spec.front.overview import overview
from mla_spec.front.production import production
from mla_spec.front.report import exit_code, merged, report_of
from mla_spec.front.run import INTERRUPTED, Progress, Store, opened, read, subject_lines
from mla_spec.judging.causes import Cause, causes, with_causes
from mla_spec.judging.check import find_laws
from mla_spec.judging.compiled import compiler_missing
from mla_spec.judging.drawing import kind_of
from mla_spec.judging.hardest import CorpusError, HardCase, read_hard_cases
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options, Production, new_seed
from mla_spec.judging.plan import Cell, Shard, parse_shard, plan
from mla_spec.judging.quick import told
from mla_spec.judging.records import RecordFile, RecordsError
from mla_spec.judging.session import Asked, Stopped, header, run_here, run_in, stops
from mla_spec.judging.verdict import Record
from mla_spec.judging.waivers import WaiverError, Waivers, read_waivers
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.reference.checkpoint import checkpoint_model
from mla_spec.subjects.configured import configured_subject, dims_of
from mla_spec.subjects.description import describe
from mla_spec.subjects.find import UnknownSubject, available_subjects
from mla_spec.subjects.supports import DTYPES
from mla_spec.subjects.violation import SubjectCrashed
from mla_spec.text.layout import Screen
from mla_spec.text.terminal import UsageError, show_progress, shown, write_json


def check(options: argparse.Namespace) -> int:
    """Check the subjects, print one report each, and return the exit code."""
    _require_sensible(options)
    options.seed, options.devices = _seed(options), devices_of(options.device)
    _require_one_device(options)
    try:
        laws = [law.name for law in find_laws(options.law, quick=options.quick)]
        common = _law_options(options)
        specs = [*options.subjects, *(f"command:{each}" for each in options.command)] or available_subjects()
        shard = Shard() if options.shard is None else parse_shard(options.shard)
        waivers = Waivers() if options.waivers is None else read_waivers(options.waivers)
        hard = () if options.begin is None else read_hard_cases(options.begin)
    except CorpusError as error:
        raise UsageError(f"--begin {error}") from error
    except WaiverError as error:
        raise UsageError(f"--waivers {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    arguments = [(name, getattr(options, name)) for name in ("signature", "config")]
    given = sum(((f"--{name}", value) for name, value in arguments if value is not None), ())
    settings = [Options(**common, spec=(spec, *given)) for spec in dict.fromkeys(specs)]
    report_to: AbstractContextManager[Any] = redirect_stdout(sys.stderr) if options.json == "-" else nullcontext()
    with report_to:
        return _Check(options, laws, shard, waivers, hard).run(settings)


class _Check:
    """One run of the command."""

    def __init__(
        self, options: argparse.Namespace, laws: list[str], shard: Shard, waivers: Waivers, hard: tuple[HardCase, ...]
    ) -> None:
        self.options, self.laws, self.shard, self.waivers, self.hard = options, laws, shard, waivers, hard
        self.subjects: list[Asked] = []
        self.cells: list[Cell] = []
        self.cells_of: dict[tuple[str, ...], list[Cell]] = {}
        self.file: RecordFile | None = None
        self.store: Store | None = None
        self.printed = 0
        self.found: dict[tuple[str, ...], list[Cause]] = {}

    @property
    def count(self) -> int:
        """Generated cases per law."""
        return self.subjects[0].options.count

    def run(self, settings: list[Options]) -> int:
        """Judge every cell, or as many as can be; print, write and return what came of them."""
        path = self.options.records if self.options.resume is None else self.options.resume
        with nullcontext() if path is None else opened(path) as self.file:
            try:
                with stops(self.options.time_limit):
                    self._judge(settings)
                reason = ""
            except (UnknownSubject, SubjectCrashed) as error:
                raise UsageError(str(error)) from error
            except (Stopped, RecordsError) as error:
                reason = str(error)
            show_progress("")
            return self._finish(reason)

    def _judge(self, settings: list[Options]) -> None:
        if self.options.in_process:
            here = [(each, configured_subject(_name(each), self.options.signature, each.dims)) for each in settings]
            self.subjects = [
                Asked(each, self.options.signature, describe(subject), self.hard) for each, subject in here
            ]
            objects = {asked.spec: (asked, subject) for asked, (_, subject) in zip(self.subjects, here, strict=True)}
            left = self._prepare()
            progress = Progress(len(left))
            self._keep(progress.counted(run_here(left, objects, progress)))
            return
        with WorkerPool(
            self.options.jobs, self.options.timeout, under=self.options.under, devices=self.options.devices
        ) as pool:
            declared = [pool.describe(each, self.options.signature) for each in settings]
            cells = len(self.laws) * len(self.options.dtype or DTYPES) if self.options.case is None else 1
            for _ in range(min(self.options.jobs, cells) - len(settings)):
                pool.prepare(settings[-1], self.options.signature)
            self.subjects = [
                Asked(each, self.options.signature, future.result(), self.hard)
                for each, future in zip(settings, declared, strict=True)
            ]
            left = self._prepare()
            progress, by_spec = Progress(len(left)), {asked.spec: asked for asked in self.subjects}
            self._keep(progress.counted(run_in(pool, left, by_spec, progress)))

    def _prepare(self) -> list[Cell]:
        """Plan the cells, begin the records, and say which cells are left to judge."""
        every = plan([(asked.spec, asked.dtypes) for asked in self.subjects], self.laws, self.options.seed)
        self.cells = self.shard.take(every)
        self.cells_of = {asked.spec: [] for asked in self.subjects}
        for cell in self.cells:
            self.cells_of[cell.spec].append(cell)
        first = header(self.subjects[0].options, self.laws, self.shard, self.options.devices)
        self.store = Store(first, subject_lines(self.subjects, first), self.waivers, self.file)
        if self.options.resume is not None:
            count = self.store.resume(read(self.options.resume), self.options.resume, self.cells)
            print(f"mla-spec: {count} of {len(self.cells)} cells are in {self.options.resume}", file=sys.stderr)
        self.store.begin()
        return [cell for cell in self.cells if cell not in self.store.judged]

    def _keep(self, judged: Iterable[Any]) -> None:
        assert self.store is not None
        for _ in self.store.add(judged):
            self._print_whole()

    def _print_whole(self) -> None:
        """Print the reports of the subjects that are judged, in their order."""
        assert self.store is not None
        while self.printed < len(self.subjects) and all(
            cell in self.store.judged for cell in self.cells_of[self.subjects[self.printed].spec]
        ):
            show_progress("")
            self._print(self.subjects[self.printed])
            self.printed += 1

    def _records_of(self, asked: Asked) -> list[Record]:
        assert self.store is not None
        judged = self.store.judged
        return merged(judged[cell] for cell in self.cells_of[asked.spec] if cell in judged)

    def _print(self, asked: Asked) -> None:
        assert self.store is not None
        records, screen = self._records_of(asked), Screen.of()
        found = causes(record for record in records if not record.holds)
        if not self.options.in_process:
            explain(found, asked, self.options.explain)
        self.found[asked.spec] = found
        self.store.explained(asked.spec, found)
        self._export(asked, found)
        if self.options.verbose or self.options.case is not None:
            print(f"{asked.declared.text}\n{report_of(records, screen)}\n")
        else:
            print("\n".join(screen.cut(line) for line in asked.declared.summary))
        part = self.shard.count > 1 or any(cell not in self.store.judged for cell in self.cells_of[asked.spec])
        quick = told(self.count) if self.options.quick else ""
        print(f"{overview(records, screen, found, part=part, quick=quick)}\n", flush=True)

    def _export(self, asked: Asked, found: list[Cause]) -> None:
        """Write the script of the first cause that has one."""
        if self.options.export is None:
            return
        records = [record for cause in found for record in (*cause.alike, *cause.follows)]
        device = asked.options.device
        with WorkerPool(1, self.options.timeout) as pool:

            def again(law: str, case: Case) -> Record:
                options = replace(asked.options, case=case, minimise=False, dtypes=None)
                return pool.submit(law, asked.declared.name, options, asked.signature).result()

            export(self.options.export, lambda: exported(records, asked.declared, asked.spec, again, device))

    def _finish(self, reason: str) -> int:
        if self.store is None:
            print(f"mla-spec: {reason}: the run ended before a law ran", file=sys.stderr)
            return INTERRUPTED if reason.startswith("SIG") else 3
        self._print_whole()
        for asked in self.subjects[self.printed :]:
            self._print(asked)
        judged = [(cell, self.store.judged[cell]) for cell in self.cells if cell in self.store.judged]
        if self.options.case is None:
            print(f"cases: --seed {self.options.seed} --examples {self.count}{' --quick' * self.options.quick}")
        needless = [] if reason or self.shard.count > 1 else self.waivers.needless(judged)
        for sentence in needless:
            print(f"mla-spec: {sentence}", file=sys.stderr)
        code = exit_code([record for _, record in judged], part=self.shard.count > 1)
        code = 1 if needless else code
        if reason:
            print(f"mla-spec: {reason}: {len(judged)} of {len(self.cells)} cells are judged", file=sys.stderr)
            code = INTERRUPTED if reason.startswith("SIG") else max(code, 3) if code != 1 else 1
        self.store.end(reason or "complete", code)
        return self._write_json(code)

    def _write_json(self, code: int) -> int:
        """Write the records of laws, whatever happened; a disk that is full makes the run incomplete."""
        assert self.store is not None
        if self.options.json is None:
            return code
        everything = [
            record.as_dict()
            for asked in self.subjects
            for record in with_causes(self._records_of(asked), self.found.get(asked.spec, []))
        ]
        try:
            with redirect_stdout(sys.__stdout__) if self.options.json == "-" else nullcontext():
                write_json(self.options.json, everything)
        except UsageError as error:
            print(f"mla-spec: {error}", file=sys.stderr)
            return code or 3
        return code


def _seed(options: argparse.Namespace) -> int:
    """The seed that was given, that of the run to resume, 0 for a part of a run, or one that nobody knows before."""
    if options.seed is not None:
        return int(options.seed)
    if options.resume is not None and os.path.isfile(options.resume) and (runs := read(options.resume)):
        return runs[0].header.seed
    return 0 if options.shard is not None else new_seed()


def _name(options: Options) -> str:
    assert options.spec is not None
    return options.spec[0]


def _law_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "examples": options.examples,
        "quick": options.quick,
        "minimise": options.minimise,
        "minimise_seconds": options.minimise_seconds,
        "seed": options.seed,
        "device": options.devices[0],
        "threads": options.threads,
        "compile": options.compile,
        "production": _production(options),
        "dims": () if options.config is None else dims_of(checkpoint_model(options.config)),
        "dtypes": None if options.dtype is None else tuple(options.dtype),
        "case": None if options.case is None else _case(options.case, options.law[0]),
    }


def _case(text: str, law: str) -> Case:
    """The case with an id; UsageError where the law is not of such cases, or no inputs can be built."""
    case, wanted = parse_case(text), {kind_of(found) for found in find_laws([law])} - {""}
    if wanted and case.kind not in wanted:
        raise UsageError(
            f"--law {law} takes cases of kind {', '.join(sorted(wanted))}, but --case is of kind {case.kind}"
        )
    try:
        getattr(case, "build", lambda: None)()
    except Exception as error:
        raise UsageError(f"case {shown(text)}: its inputs cannot be built: {error}") from error
    return case


def _production(options: argparse.Namespace) -> Production | None:
    """What ``--production``, ``--budget`` and ``--workload`` ask for; a file of shapes asks for all of it."""
    if not options.production and options.workload is None:
        if options.budget is not None:
            raise UsageError("--budget is of --production, which is not given")
        return None
    return production(options.budget, options.seed, options.workload)


def _require_sensible(options: argparse.Namespace) -> None:
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if options.case is not None and len(options.law) != 1:
        raise UsageError("--case needs exactly one --law")
    if options.export is not None and len(options.subjects) != 1:
        raise UsageError(f"--export is of one SUBJECT, got {len(options.subjects)}")
    if options.resume is not None and options.records not in (None, options.resume):
        raise UsageError("--resume FILE goes on in FILE: --records cannot be another one")


def _require_one_device(options: argparse.Namespace) -> None:
    """Raise UsageError where what is asked for has no several devices, or their compiler is missing."""
    if options.in_process and len(options.devices) > 1:
        raise UsageError(f"--in-process has one device, got --device {shown(options.device)}")
    if options.compile is not None and (reason := compiler_missing(options.compile, options.devices[0])):
        raise UsageError(f"--compile {shown(options.compile)}: {reason}")
