"""Inputs that tell on themselves: from what a subject gives for them follows which part of its computation is wrong.

A case is asked again with numbers that say where they come from: rows that hold the number of their slot, values from which the
weight of each key is read, unit vectors to rotate, layers of which one step does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_spec.judging.finding import Finding
from mla_spec.judging.telltale_layer import layer_telltale
from mla_spec.judging.telltale_pages import pages_telltale
from mla_spec.judging.telltale_prefill import prefill_telltale
from mla_spec.judging.telltale_rope import rope_telltale
from mla_spec.judging.telltale_weights import decode_weights, prefill_weights
from mla_spec.operations.case import Case
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Unsupported, Violation

Ask = Callable[[Driver, Any, Description], list[Finding]]
"""(driver, case, what is declared) -> what is found."""

ASKED: dict[str, tuple[tuple[str, Ask], ...]] = {
    "decode": (("float32", pages_telltale), ("", decode_weights)),
    "prefill": (("float32", prefill_telltale), ("", prefill_weights)),
    "rope": (("float32", rope_telltale),),
    "layer": (("", layer_telltale),),
}
"""By the kind of a case, how it is asked again until something is found, and in which dtype where it is not that of the case."""

MOST = 3
"""Findings of one case."""


def telltale(subject: object, case: Case, declared: Description, device: str = "cpu") -> list[Finding]:
    """What a subject gives away of a fault that shows on a case; empty where it is right, or cannot be asked.

    Of ``decode`` and ``prefill`` findings name keys, pages, heads and sequences, masks and scales, of ``rope`` columns, angles and
    positions, of ``layer`` the step.
    """
    if case.kind not in declared.operations or case.dtype not in declared.supports.dtypes:
        return []
    for dtype, ask in ASKED.get(case.kind, ()):
        if dtype and dtype not in declared.supports.dtypes:
            continue
        try:
            found = ask(there(Driver, subject, dtype or case.dtype, device), case, declared)
        except (SubjectCrashed, Violation, Unsupported, NotOffered):
            continue
        if found:
            return found[:MOST]
    return []
