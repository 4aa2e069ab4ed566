"""Runs the laws on subjects."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from mla_spec.installed import all_laws
from mla_spec.judging.law import Law, Options
from mla_spec.judging.renamed import current_name
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.contract import require_subject


def find_laws(names: Iterable[str]) -> list[Law]:
    """The laws called ``names``, or all when there are none.

    An earlier name of a law is honored, with a warning.

    Raises:
        ValueError: no law has the name; the message suggests close ones.
    """
    laws = all_laws()
    found = []
    for name in map(current_name, names):
        if name not in laws:
            close = difflib.get_close_matches(name, laws, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "see `mla-spec laws`"
            raise ValueError(f"unknown law {name!r}; {hint}")
        found.append(laws[name])
    return found or list(laws.values())


def check_subject(
    subject: object,
    *,
    laws: Iterable[str] = (),
    options: Options = Options(),
    progress: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run laws on a subject and return one record per law.

    Args:
        subject: an object that offers operations of the contract.
        laws: their names; all when empty.
        options: how many cases, which dtypes, which device.
        progress: called with each record as it is made.

    Raises:
        TypeError: ``subject`` offers nothing or declares itself wrongly.
        ValueError: an unknown law.
    """
    require_subject(subject)
    records = []
    for law in find_laws(laws):
        record = run_law(law, subject, options)
        progress(record)
        records.append(record)
    return records
