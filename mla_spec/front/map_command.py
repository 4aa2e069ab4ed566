"""The command ``mla-spec map``."""

from __future__ import annotations

import argparse

from mla_spec.front.device import require_device
from mla_spec.front.reports.account import code_text
from mla_spec.front.reports.map_page import Envelope, as_json, html, markdown
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.plan import Shard
from mla_spec.judging.session import Asked, header
from mla_spec.judging.verdict import Record
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Operation
from mla_spec.proof.envelope import MAPPED, Cell, envelope, lattice_of
from mla_spec.subjects.description import Description
from mla_spec.subjects.find import UnknownSubject
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.terminal import UsageError, show_progress, shown, write_text


def chart(options: argparse.Namespace) -> int:
    """Map what a subject does with calls of many sizes; 1 where it is silently wrong, 3 where nothing was judged."""
    require_device(options.device)
    for name in options.operation:
        if name not in MAPPED:
            raise UsageError(f"--operation {shown(name)} is not mapped; those that are: {', '.join(MAPPED)}")
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    found = _found(options)
    write_text(options.output, html(found) if options.output.endswith((".html", ".htm")) else markdown(found))
    if options.json is not None:
        write_text(options.json, as_json(found))
    if any(cell.kind in ("wrong", "ends the process") for cell in found.cells):
        return 1
    return 0 if any(cell.kind in ("right", "refuses") for cell in found.cells) else 3


def _found(options: argparse.Namespace) -> Envelope:
    spec = (options.subject, *(() if options.signature is None else ("--signature", options.signature)))
    given = Options(minimise=False, device=options.device, spec=spec, seed=options.seed)
    cells: list[Cell] = []
    try:
        with WorkerPool(1, options.timeout) as pool:
            declared = pool.describe(given, options.signature).result()
            if declared.fault:
                raise UsageError(declared.fault)
            dtypes, laws = tuple(options.dtype or declared.supports.dtypes), []
            for operation in _asked(declared, options.operation):
                laws.append(law := lattice_of(operation).law)

                def judge(case: Case, law: str = law) -> Record:
                    own = Options(minimise=False, device=options.device, spec=spec, case=case)
                    return pool.submit(law, declared.name, own, options.signature).result()

                for part in envelope(operation, judge, declared.supports, dtypes, options.seed):
                    cells += part
                    show_progress(f"{part[0].operation}, {part[0].dtype}, {part[0].part}")
            show_progress("")
    except UnknownSubject as error:
        raise UsageError(str(error)) from error
    run, line = header(given, laws, Shard()), Asked(given, options.signature, declared).line("")
    about = [
        ("suite", f"mla-spec {run.suite}"),
        ("code", code_text(line) or "part of the suite"),
        ("device", run.device if run.gpu is None else f"{run.device}, {run.gpu}"),
        ("platform", run.platform),
        ("python, numpy, torch", f"{run.python}, {run.numpy}, {run.torch}"),
        ("seed", str(options.seed)),
    ]
    return Envelope(declared.name, tuple(about), tuple(cells))


def _asked(declared: Description, names: list[str]) -> list[Operation]:
    """The operations to map: those that are named, or all that the subject offers; UsageError where it lacks one."""
    offered = [name for name in MAPPED if name in declared.operations]
    missing = [name for name in names if name not in offered]
    what = ", ".join(missing) or f"any of {', '.join(MAPPED)}"
    if missing or not offered:
        raise UsageError(f"{declared.name} does not offer {what}")
    return [MAPPED[name] for name in dict.fromkeys(names or offered)]
