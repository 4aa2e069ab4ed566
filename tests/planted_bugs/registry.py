"""What a planted bug is, and the table of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mla_spec.judging.law import Production

C = TypeVar("C", bound=type)


@dataclass(frozen=True, kw_only=True)
class PlantedBug:
    """One fault in an otherwise correct subject.

    Attributes:
        id: its name; X1, X2, ... are faults that no public report was found for.
        make: the subject's class.
        source: where the fault was reported or fixed.
        symptom: what its users saw.
        shows_when: the inputs that expose it.
        killed_by: laws that fail on it with the default options, ``compile`` and ``production``; those that need a device fail there.
        compile: backend with which laws of compiled operations run on it; None where they do not.
        production: how large the cases of production laws are on it; None where they do not run.
    """

    id: str
    make: Callable[[], Any]
    source: tuple[str, ...]
    symptom: str
    shows_when: str
    killed_by: tuple[str, ...]
    compile: str | None = None
    production: Production | None = None

    @property
    def spec(self) -> str:
        """The name by which the command line finds the subject."""
        return f"{self.make.__module__}:{self.make.__qualname__}"

    @property
    def base(self) -> Callable[[], Any]:
        """The correct subject from which this one differs."""
        return self.make.__bases__[0]


PLANTED: dict[str, PlantedBug] = {}
"""Every planted bug by id."""


def planted(
    bug_id: str,
    *,
    source: tuple[str, ...] = (),
    symptom: str,
    shows_when: str,
    killed_by: tuple[str, ...],
    compile: str | None = None,
    production: Production | None = None,
) -> Callable[[C], C]:
    """Decorate the class of a faulty subject: name it and enter it in ``PLANTED``."""

    def enter(cls: C) -> C:
        assert bug_id not in PLANTED, f"planted bug {bug_id} is defined twice"
        cls.name = f"bug-{bug_id}"
        PLANTED[bug_id] = PlantedBug(
            id=bug_id,
            make=cls,
            source=source,
            symptom=symptom,
            shows_when=shows_when,
            killed_by=killed_by,
            compile=compile,
            production=production,
        )
        return cls

    return enter
