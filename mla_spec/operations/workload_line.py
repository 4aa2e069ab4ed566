"""How a line of a workload states a case: its fields, and what a host can hold of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mla_spec.operations.case import Case

ELEMENTS: Final = 2**24
"""Of one argument in float64, at most. A pool that would be larger is shared: sequences name the same pages."""

REQUIRED: Final = object()
"""The default of a field that must be there."""


@dataclass(frozen=True)
class Field:
    """A field of a line.

    Attributes:
        expected: for people.
        accepts: whether a JSON value will do.
        default: the value where the field is absent, or ``REQUIRED``.
    """

    expected: str
    accepts: Callable[[Any], bool]
    default: Any = REQUIRED

    def value(self, name: str, entry: Mapping[str, Any]) -> Any:
        """What ``entry`` holds of it; ValueError where that is none. A list becomes a tuple."""
        if name not in entry:
            if self.default is REQUIRED:
                raise ValueError(f"{name} is missing; expected {self.expected}")
            return self.default
        value = entry[name]
        if not self.accepts(value):
            raise ValueError(f"{name} is {shown_json(value)}; expected {self.expected}")
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class WorkloadLine:
    """What a line of a workload holds of an operation.

    Attributes:
        fields: of the line, beside "operation".
        case: from their values, the case; its dtype means nothing. ValueError where there is none.
        elements: of what sequences of a case cannot share, by name.
    """

    fields: Mapping[str, Field]
    case: Callable[..., Case]
    elements: Callable[[Any], Mapping[str, int]]


def integer(least: int, default: Any = REQUIRED) -> Field:
    """An integer from ``least`` on, below 2^31."""
    return Field(f"an integer of at least {least}", lambda x: type(x) is int and least <= x < 2**31, default)


def length_list(default: Any = REQUIRED) -> Field:
    """One or more lengths."""

    def accepts(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(type(n) is int and 0 <= n < 2**31 for n in x)

    return Field("a list of one or more integers, none negative", accepts, default)


def flag(default: bool) -> Field:
    """True or false."""
    return Field("true or false", lambda x: isinstance(x, bool), default)


def one_of(*names: str) -> Field:
    """One of some names, the first by default."""
    return Field(f"one of {', '.join(names)}", lambda x: x in names, names[0])


def shown_json(value: Any) -> str:
    """A JSON value, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shared(seqlens: tuple[int, ...], page_size: int, width: int) -> int:
    """How many pages sequences share, so that a pool stays below ``ELEMENTS``; 0 where each can have its own."""
    room = max(ELEMENTS // (page_size * width), 1)
    return 0 if sum(-(-n // page_size) for n in seqlens) <= room else room


def elements_of_decode(seqlens: tuple[int, ...], rows: int, width: int) -> dict[str, int]:
    """Of ``rows`` query rows of a sequence, and of the keys of the longest."""
    return {"queries": len(seqlens) * rows * width, "keys of one sequence": max(seqlens) * width}
