"""Subjects that are elsewhere, by the names that a user gives: "command:PROGRAM ..." and "files:FOLDER"."""

from __future__ import annotations

from mla_spec.exchange.contents import ContentsSubject
from mla_spec.exchange.folder import files_subject
from mla_spec.exchange.program import program_subject
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.subjects.violation import UnknownSubject


def subject_elsewhere(spec: str) -> ContentsSubject:
    """The subject that ``spec`` names; UnknownSubject where there is none."""
    kind, _, rest = spec.partition(":")
    try:
        return program_subject(rest) if kind == "command" else files_subject(rest)
    except ExchangeError as error:
        raise UnknownSubject(f"{kind}: {error}") from error
