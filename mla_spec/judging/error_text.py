"""Says the anatomy of an error in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mla_spec.judging.anatomy import Anatomy
from mla_spec.judging.separation import threshold
from mla_spec.operations.all import OPERATIONS, parse_case
from mla_spec.operations.operation import Operation

_NAMES = {
    "b": "sequence",
    "s": "query",
    "h": "head",
    "tokens": "token",
    "pages": "page",
    "page_size": "slot",
    "key tokens": "key",
    "out": "row",
    "in": "column",
}
_LAYERS = ("sequence", "token", "dim")
"""Axes of what a layer gives."""

_LONGEST = 3
"""Ranges of indices that are listed."""


def pattern_text(anatomy: Anatomy) -> str:
    """What is wrong with a result, as the predicate of a sentence: "out is 0.414 times what it should be"."""
    what, value = anatomy["what"], anatomy["value"]
    return {
        "nan": f"{what} has NaN",
        "infinite": f"{what} is infinite where it should be finite, or the reverse",
        "zero": f"{what} is 0",
        "factor": f"{what} is {value:.4g} times what it should be" if isinstance(value, float) else "",
        "offset": f"{what} is off by {value:+.4g}" if isinstance(value, float) else "",
        "factors": f"every row of {what} is off by a factor of its own",
        "rounding": f"{what} is wrong by {float(anatomy['excess']):.2g} times its bound, as if rounded more coarsely than declared",
    }.get(anatomy["pattern"]) or _other(anatomy)


def _other(anatomy: Anatomy) -> str:
    if anatomy["judged"] == "bits":
        return f"{anatomy['what']} has other bits than it should"
    return f"{anatomy['what']} is wrong by up to {float(anatomy['excess']):.2g} times its bound"


def place_text(anatomy: Anatomy, operations: Iterable[str]) -> str:
    """Where the wrong elements lie, as an adverbial: "in every element", "in sequence 1, heads 32-63"."""
    size = 1
    for extent in anatomy["shape"]:
        size *= extent
    share = "every element" if anatomy["wrong"] == size else f"{anatomy['wrong']} of {size} elements"
    names = axis_names(anatomy, operations)
    places = [_place(anatomy, axis, ranges, names) for axis, ranges in anatomy["where"].items()]
    return f"in {share}" + ("" if not places else f": {', '.join(place for place in places if place)}")


def _place(anatomy: Anatomy, axis: str, ranges: list[list[int]], names: list[str]) -> str:
    name = names[int(axis)] if int(axis) < len(names) else f"axis {axis} at"
    plural = name if name.endswith("at") else {"query": "queries"}.get(name, f"{name}s")
    if name == "sequence" and (condition := _length_condition(anatomy, int(axis), ranges)):
        return f"{plural} with {condition}"
    if len(ranges) > _LONGEST:
        return f"some {plural}" if int(axis) < len(names) else ""
    indices = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    several = len(ranges) > 1 or ranges[0][0] != ranges[0][1]
    return f"{plural if several else name} {indices}"


def _length_condition(anatomy: Anatomy, axis: int, ranges: list[list[int]]) -> str:
    """What tells the wrong entries of an axis from the right ones, where a field of the case has a number for each."""
    extent = anatomy["shape"][axis]
    wrong = {i for first, last in ranges for i in range(first, last + 1)}
    for name, value in vars(parse_case(anatomy["case"])).items():
        if extent < 2 or not isinstance(value, tuple) or len(value) != extent:
            continue
        found = threshold([value[i] for i in wrong], [v for i, v in enumerate(value) if i not in wrong])
        if found:
            (word, least), unit = next(iter(found.items())), "keys" if name in ("seqlens", "seqlens_k") else name
            return f"{'at least' if word == 'least' else 'at most'} {least} {unit}"
    return ""


def axis_names(anatomy: Anatomy, operations: Iterable[str]) -> list[str]:
    """Names of the axes of a result, as far as the contract of an operation tells them."""
    rank = len(anatomy["shape"])
    for operation in (OPERATIONS[name] for name in operations if name in OPERATIONS):
        if not isinstance(operation, Operation):
            return list(_LAYERS) if rank == len(_LAYERS) else []
        for output in operation.outputs:
            axes = [_NAMES.get(axis, "dim") for axis in _letters(output.axes)]
            if anatomy["what"] == (output.what or output.name) and len(axes) == rank:
                return axes
    return []


def _letters(axes: str) -> list[str]:
    found = re.match(r"\[([^\]]*)\]", axes)
    return [] if found is None else re.sub(r"\((\w+),\)", r"\1,", found[1]).replace(", ", ",").split(",")


def separation_text(found: dict[str, Any]) -> str:
    """What separates failing from passing cases, as a clause; empty where nothing does."""
    if not found:
        return ""
    if "is" in found:
        condition = f"{found['field']} is {str(found['is']).lower()}"
    elif "least" in found:
        condition = f"{found['field']} is at least {found['least']}"
    else:
        condition = f"{found['field']} is at most {found['most']}"
    return f"only where {condition}"
