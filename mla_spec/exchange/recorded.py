"""A call that somebody recorded, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.declared import Declared


@dataclass(frozen=True)
class Recorded:
    """One call that somebody recorded.

    Attributes:
        name: of it, for people.
        call: what was called, or a clause that says why it cannot be told.
        answer: gives the outputs as ``Folder.answer``; None where there are none.
        declared: by whom it was answered; None where nobody says.
    """

    name: str
    call: Call | str
    answer: Callable[[], Answer | None] | None = None
    declared: Declared | None = None
