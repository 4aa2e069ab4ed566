"""The command ``mla-spec campaign``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from mla_spec.front.device import devices_of
from mla_spec.front.overview import overview
from mla_spec.front.report import exit_code, merged
from mla_spec.front.run import INTERRUPTED, Progress, Store, opened, read, subject_lines
from mla_spec.judging.check import find_laws
from mla_spec.judging.cluster import NoCluster, RayPool
from mla_spec.judging.hardest import CorpusError, HardCase, hardest, read_hard_cases, write_hard_cases
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.plan import Cell, plan
from mla_spec.judging.records import RecordFile, RecordsError
from mla_spec.judging.session import Asked, Stopped, header, run_in, stops
from mla_spec.subjects.find import UnknownSubject
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.layout import Screen
from mla_spec.text.terminal import UsageError, show_progress, shown


def campaign(options: argparse.Namespace) -> int:
    """Judge cells of one seed after another until time is over, print what came of them, and return the exit code."""
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    options.devices = devices_of(options.device)
    if options.ray is not None and len(options.devices) > 1:
        raise UsageError(f"--ray gives each task a GPU itself: --device cuda, got {shown(options.device)}")
    try:
        laws = [law.name for law in find_laws(options.law)]
        known = read_hard_cases(options.corpus) if os.path.exists(options.corpus) else ()
    except CorpusError as error:
        raise UsageError(f"--corpus {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _Campaign(options, laws, known).run()


class _Campaign:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace, laws: list[str], known: tuple[HardCase, ...]) -> None:
        self.options, self.laws, self.known = options, laws, known
        self.subjects: list[Asked] = []
        self.store: Store | None = None

    def run(self) -> int:
        hours = self.options.hours
        with opened(self.options.records) as file:
            try:
                with stops(None if hours is None else 3600 * hours), self._pool() as pool:
                    self._describe(pool)
                    self._begin(file)
                    self._judge(pool)
                reason = "complete"
            except (UnknownSubject, NoCluster) as error:
                raise UsageError(str(error)) from error
            except (Stopped, RecordsError) as error:
                reason = str(error)
            show_progress("")
            return self._finish(reason)

    def _pool(self) -> WorkerPool | RayPool:
        if self.options.ray is not None:
            return RayPool(self.options.ray, self.options.devices[0], self.options.timeout)
        return WorkerPool(self.options.jobs, self.options.timeout, devices=self.options.devices)

    def _describe(self, pool: WorkerPool | RayPool) -> None:
        common = Options(
            examples=self.options.examples,
            seed=self.options.seed,
            device=self.options.devices[0],
            dtypes=None if self.options.dtype is None else tuple(self.options.dtype),
        )
        asked = [replace(common, spec=(spec,)) for spec in dict.fromkeys(self.options.subjects)]
        declared = [pool.describe(each) for each in asked]
        self.subjects = [
            Asked(each, None, future.result(), self.known) for each, future in zip(asked, declared, strict=True)
        ]

    def _begin(self, file: RecordFile) -> None:
        first = header(self.subjects[0].options, self.laws, devices=self.options.devices)
        self.store = Store(first, subject_lines(self.subjects, first))
        runs = read(self.options.records)
        every = [line.cell for run in runs for line in run.verdicts]
        count = self.store.resume(runs, self.options.records, every)
        if count:
            print(f"mla-spec: {count} cells are in {self.options.records}", file=sys.stderr)
        self.store.file = file
        self.store.begin()

    def _rounds(self) -> Iterator[list[Cell]]:
        """The cells of one seed after another."""
        specs = [(asked.spec, asked.dtypes) for asked in self.subjects]
        rounds = itertools.count() if self.options.rounds is None else range(self.options.rounds)
        return (plan(specs, self.laws, self.options.seed + number) for number in rounds)

    def _judge(self, pool: WorkerPool | RayPool) -> None:
        assert self.store is not None
        subjects = {asked.spec: asked for asked in self.subjects}
        for cells in self._rounds():
            left = [cell for cell in cells if cell not in self.store.judged]
            progress = Progress(len(left))
            for _ in self.store.add(progress.counted(run_in(pool, left, subjects, progress))):
                pass
            self._keep_hardest()

    def _keep_hardest(self) -> None:
        assert self.store is not None
        write_hard_cases(self.options.corpus, hardest(self.known, self.store.judged.items()))

    def _finish(self, reason: str) -> int:
        signaled = reason.startswith("SIG")
        if self.store is None:
            print(f"mla-spec: {reason}: the campaign ended before a law ran", file=sys.stderr)
            return INTERRUPTED if signaled else 3
        judged, screen = self.store.judged, Screen.of()
        for asked in self.subjects:
            records = merged(record for cell, record in sorted(judged.items()) if cell.spec == asked.spec)
            print("\n".join(screen.cut(line) for line in asked.declared.summary))
            print(f"{overview(records, screen, part=reason != 'complete') if records else 'no cell was judged'}\n")
        try:
            self._keep_hardest()
        except OSError as error:
            reason = f"cannot write {shown(self.options.corpus)}: {error.strerror}"
        print(f"mla-spec: {reason}: {len(judged)} cells of {len({cell.seed for cell in judged})} seeds are judged")
        code = exit_code(judged.values())
        code = 3 if code == 0 and reason not in ("complete", "time limit") else code
        code = INTERRUPTED if signaled else code
        self.store.end(reason, code)
        return code
