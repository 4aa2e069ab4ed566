"""A run of cells: in worker processes or in this one, each recorded as it is judged."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Protocol

from mla_spec.installed import all_laws
from mla_spec.judging.environment import code_of, environment
from mla_spec.judging.hardest import HardCase
from mla_spec.judging.law import Options
from mla_spec.judging.plan import Cell, Judged, Shard
from mla_spec.judging.records import Evidence, RunLine, SubjectLine, VerdictLine
from mla_spec.judging.regime_count import RegimeCount
from mla_spec.judging.renamed import RENAMED
from mla_spec.judging.run import asked_dtypes, run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.description import Description

OFTEN = 0.5
"""Seconds after which it is looked at which cell is running."""


class Stopped(KeyboardInterrupt):
    """The run ends before its time; the text says why. No subject can catch it by mistake: it is no Exception."""


@contextmanager
def stops(limit: float | None = None) -> Iterator[None]:
    """Here Ctrl-C, TERM, HUP and the end of ``limit`` seconds raise ``Stopped``; the first of them only."""

    def stop(number: int, _: FrameType | None) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN if name == signal.SIGALRM else signal.SIG_DFL)
        reason = "time limit" if number == signal.SIGALRM else signal.Signals(number).name
        raise Stopped(reason)

    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM]
    before = [signal.signal(name, stop) for name in names]
    signal.setitimer(signal.ITIMER_REAL, limit or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


@dataclass(frozen=True)
class Asked:
    """A subject of a run.

    Attributes:
        options: how laws are run on it; ``spec`` finds it.
        signature: the operation that it implements, where it is a bare function.
        declared: what it says of itself.
        hard: cases with which laws begin.
    """

    options: Options
    signature: str | None
    declared: Description
    hard: tuple[HardCase, ...] = ()

    @property
    def spec(self) -> tuple[str, ...]:
        assert self.options.spec is not None
        return self.options.spec

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of its cells."""
        return [] if self.declared.fault else asked_dtypes(self.declared.supports, self.options)

    def options_of(self, cell: Cell) -> Options:
        """How one cell is run."""
        if not cell.dtype:
            return replace(self.options, seed=cell.seed)
        begin = tuple(each.parsed for each in self.hard if RENAMED.get(each.law, each.law) == cell.law)
        return replace(self.options, dtypes=(cell.dtype,), spread=len(self.dtypes), seed=cell.seed, begin=begin)

    def line(self, run: str) -> SubjectLine:
        """What is recorded of it."""
        declared = self.declared
        profiles = {dtype: asdict(profile) for dtype, profile in declared.profiles.items()}
        return SubjectLine(
            run=run,
            spec=self.spec,
            name=declared.name,
            operations=declared.operations,
            dtypes=tuple(self.dtypes),
            supports=_as_json(asdict(declared.supports)),
            profiles=_as_json(profiles),
            **code_of(self.spec[0]),
        )


def header(options: Options, laws: Sequence[str], shard: Shard = Shard(), devices: Sequence[str] = ()) -> RunLine:
    """The line that begins a run; ``devices`` are those of its workers, where they are several."""
    production = options.production
    return RunLine(
        run=uuid.uuid4().hex,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(*(devices or (options.device,))),
        seed=options.seed,
        examples=options.count,
        quick=options.quick,
        threads=options.threads,
        compile=options.compile,
        production=None
        if production is None
        else {"budget": production.budget, "seed": production.seed, "workload": [c.id for c in production.workload]},
        case=None if options.case is None else options.case.id,
        laws=tuple(laws),
        shard=(shard.number, shard.count),
    )


def verdict_line(run: str, cell: Cell, record: Record) -> VerdictLine:
    """What is recorded of a cell."""
    values = record.as_dict()
    del values["dtypes"], values["told"], values["cause"]
    values["evidence"] = tuple(Evidence(**each) for each in values["evidence"])
    values["regimes"] = {name: RegimeCount(**count) for name, count in values["regimes"].items()}
    return VerdictLine(run=run, spec=cell.spec, seed=cell.seed, **values)


def _as_json(value: Any) -> Any:
    """As a file would give it back: lists for tuples."""
    return json.loads(json.dumps(value))


def run_here(
    cells: Iterable[Cell], subjects: dict[tuple[str, ...], tuple[Asked, object]], show: Any
) -> Iterator[Judged]:
    """Run cells in this process, on the objects that ``subjects`` holds."""
    for cell in cells:
        show(cell)
        asked, subject = subjects[cell.spec]
        yield cell, named(cell, run_law(all_laws()[cell.law], subject, asked.options_of(cell)))


class Pool(Protocol):
    """What runs laws elsewhere: processes, or a cluster."""

    def submit(self, law: str, subject_name: str, options: Options, signature: str | None = None) -> Future[Record]:
        """Run a law on the subject that ``options.spec`` names."""


def run_in(
    pool: Pool, cells: Iterable[Cell], subjects: dict[tuple[str, ...], Asked], show: Callable[[Cell], None]
) -> Iterator[Judged]:
    """Run cells in the processes of ``pool``, and give each as it is judged. ``show`` is told what is running."""
    running: dict[Future[Record], Cell] = {}
    judged: SimpleQueue[Future[Record]] = SimpleQueue()
    for cell in cells:
        asked = subjects[cell.spec]
        if asked.declared.fault:
            yield cell, Record(cell.law, asked.declared.name, "crashed", message=asked.declared.fault)
            continue
        future = pool.submit(cell.law, asked.declared.name, asked.options_of(cell), asked.signature)
        running[future] = cell
        future.add_done_callback(judged.put)
    while running:
        try:
            future = judged.get(timeout=OFTEN)
        except Empty:
            pass
        else:
            cell = running.pop(future)
            yield cell, named(cell, future.result())
        if (now := next((cell for future, cell in running.items() if future.running()), None)) is not None:
            show(now)


def named(cell: Cell, record: Record) -> Record:
    """A record with the dtype of its cell."""
    return replace(record, dtype=cell.dtype, dtypes={})
