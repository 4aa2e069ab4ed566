"""Every reported fault of the catalogue: those that are planted, and those that are not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.planted_bugs.registry import PLANTED


@dataclass(frozen=True)
class Entry:
    """One reported fault.

    Attributes:
        id: a letter for the kind of fault, and a number.
        source: where it was reported or fixed.
        symptom: what its users saw.
        missing: what planting it needs; "" where it is planted.
    """

    id: str
    source: tuple[str, ...]
    symptom: str
    missing: str = ""

    @property
    def status(self) -> str:
        return f"not planted: {self.missing}" if self.missing else "planted"


NOT_PLANTED: tuple[Entry, ...] = (
    Entry(
        "C15",
        ("https://github.com/lablup/mlxcel/pull/618",),
        "the last decoder layer is left out",
        "which layers a checkpoint's stack has, and how large its residuals grow between them, is no operation of attention",
    ),
)
"""Reported faults that no subject here can have."""


def catalogue() -> list[Entry]:
    """All reported faults in the order of their ids; one that is planted for several operations occurs once."""
    entries = {entry.id: entry for entry in NOT_PLANTED}
    for bug in reversed(PLANTED.values()):
        if bug.source:
            name = bug.id.partition("-")[0]
            entries[name] = Entry(name, bug.source, bug.symptom)
    return sorted(entries.values(), key=lambda entry: (entry.id[0], int(entry.id[1:])))
