"""Runs the laws on subjects."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from mla_spec.installed import all_laws, operation_names, quick_laws
from mla_spec.judging.law import Law, Options
from mla_spec.judging.plan import Cell, Judged
from mla_spec.judging.renamed import current_name
from mla_spec.judging.run import run_dtypes
from mla_spec.judging.verdict import Record, merge
from mla_spec.judging.waivers import WaiverError, Waivers, read_waivers
from mla_spec.subjects.contract import require_subject
from mla_spec.text.terminal import shown


def find_laws(names: Iterable[str], *, quick: bool = False) -> list[Law]:
    """The laws that ``names`` mean, in the order of the report, or all when there are none.

    A name is that of a law, or a pattern of shell style, or an operation, which stands for every law that needs it. An
    earlier name of a law is honored, with a warning. A ``quick`` check takes the elementary ones of them, and every law whose
    own name is among the names.

    Raises:
        ValueError: a name means no law; the message suggests close ones. Or ``quick`` leaves none.
    """
    laws = all_laws()
    names = [current_name(name) for name in names]
    found = {law for name in names for law in _meant(name, laws)} if names else set(laws)
    if quick:
        found &= quick_laws().keys() | set(names)
    if not found:
        raise ValueError(
            f"{', '.join(names)}: a quick check has no law of it; `mla-spec laws --quick` lists those it has"
        )
    return [law for name, law in laws.items() if name in found]


def _meant(name: str, laws: Mapping[str, Law]) -> list[str]:
    """The names of the laws that ``name`` means."""
    if name in laws:
        return [name]
    if name in operation_names():
        return [law for law, made in laws.items() if name in made.needs]
    if matching := [law for law in laws if fnmatchcase(law, name)]:
        return matching
    close = difflib.get_close_matches(name, [*laws, *operation_names()], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else "see `mla-spec laws`"
    raise ValueError(f"unknown law {shown(name)}; {hint}")


def check_subject(
    subject: object,
    *,
    laws: Iterable[str] = (),
    options: Options = Options(),
    progress: Callable[[Record], None] = lambda record: None,
    waivers: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Run laws on a subject and return one record per law.

    Args:
        subject: an object that offers operations of the contract.
        laws: as for ``find_laws``; all when empty, or the elementary ones where ``options.quick``.
        options: how many cases, which dtypes, which device.
        progress: called with each record as it is made.
        waivers: a file of expected failures, whose records say why they are ``waived``.

    Raises:
        TypeError: ``subject`` offers nothing or declares itself wrongly.
        ValueError: an unknown law, or a waiver that is none, has expired, or is not needed.
    """
    require_subject(subject)
    expected = Waivers() if waivers is None else read_waivers(os.fspath(waivers))
    judged: list[Judged] = []
    records = []
    for law in find_laws(laws, quick=options.quick):
        cells = judge(law, subject, options, expected)
        judged += cells
        records.append(merge([record for _, record in cells]))
        progress(records[-1])
    for sentence in expected.needless(judged):
        raise WaiverError(sentence)
    return records


def judge(law: Law, subject: object, options: Options, waivers: Waivers) -> list[Judged]:
    """Run a law on a subject in this process: each cell and what came of it."""
    judged = []
    for record in run_dtypes(law, subject, options):
        cell = Cell(options.spec or (), law.name, record.dtype, options.seed)
        judged.append((cell, waivers.apply(cell, record)))
    return judged
