"""What changed between two runs: law by law and dtype by dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mla_spec.front.report import outcome
from mla_spec.front.reports.account import Account, Document, code_text
from mla_spec.front.reports.heat import excess
from mla_spec.judging.causes import error_text
from mla_spec.judging.renamed import RENAMED
from mla_spec.judging.verdict import Record, merge
from mla_spec.text.terminal import UsageError, shown

Change = Literal["worse", "better", "judged now", "judged no more", "still wrong", "same"]
"""What passed and is judged no more is worse; what was wrong and is judged no more is neither."""

ABSENT = "absent"
"""The verdict of a cell that a run does not have."""

_RANK = {"pass": 0, "waived": 0, "incomplete": 1, "crashed": 2, "fail": 2}
"""Of what was judged, how bad it is."""


@dataclass(frozen=True)
class Step:
    """One law in one dtype, before and after.

    Attributes:
        old, new: what came of it: a verdict, "waived" or "absent".
        old_ratio, new_ratio: the largest error / bound; None where there is none that is finite.
        what: what is wrong now.
    """

    law: str
    dtype: str
    old: str
    new: str
    old_ratio: float | None
    new_ratio: float | None
    what: str

    @property
    def change(self) -> Change:
        """In which way the law holds more, or less."""
        before, after = _RANK.get(self.old), _RANK.get(self.new)
        if before is None:
            return "worse" if after else "judged now" if after == 0 else "same"
        if after is None:
            return "judged no more" if before else "worse"
        if after == before:
            return "still wrong" if after else "same"
        return "worse" if after > before else "better"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"change": self.change, **vars(self)}


@dataclass(frozen=True)
class Difference:
    """Two versions of one subject.

    Attributes:
        subject: its name now.
        runs: what differs in how the two runs were made, or in what the subject declares.
        same_cases: whether both drew the same cases, so that their errors can be compared.
        steps: every law and dtype that one of them judged.
    """

    subject: str
    runs: tuple[str, ...]
    same_cases: bool
    steps: tuple[Step, ...]

    def of(self, change: Change) -> list[Step]:
        """The steps of one kind."""
        return [step for step in self.steps if step.change == change]

    @property
    def moved(self) -> list[Step]:
        """What holds as before with another error / bound, the largest growth first; empty where cases are others."""
        steps = [step for step in self.of("same") if self.same_cases and step.old_ratio != step.new_ratio]
        return sorted(steps, key=lambda step: (step.old_ratio or 0.0) - (step.new_ratio or 0.0))

    @property
    def headline(self) -> str:
        """One sentence."""
        kinds: tuple[Change, ...] = ("worse", "better", "judged now", "judged no more", "still wrong")
        counts = [f"{len(self.of(kind))} {kind}" for kind in kinds if self.of(kind) or kind in kinds[:2]]
        return f"{', '.join(counts)}, of {len(self.steps)} cells"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is as it was is left out."""
        changed = [step for step in self.steps if step.change != "same"]
        return {
            "subject": self.subject,
            "runs": list(self.runs),
            "same_cases": self.same_cases,
            "cells": len(self.steps),
            "changes": [step.as_dict() for step in changed],
            "moved": [step.as_dict() for step in self.moved],
        }


def differences(old: Document, new: Document) -> list[Difference]:
    """One of each subject of ``new``; UsageError where ``old`` has not the same one.

    Where each has one subject, these are compared, whatever their names.
    """
    return [_difference(old, _other(account, old, new), new, account) for account in new.accounts]


def _other(account: Account, old: Document, new: Document) -> Account:
    if len(old.accounts) == len(new.accounts) == 1:
        return old.accounts[0]
    for name in ("spec", "name"):
        found = [each for each in old.accounts if getattr(each.subject, name) == getattr(account.subject, name)]
        if len(found) == 1:
            return found[0]
    known = ", ".join(each.subject.name for each in old.accounts)
    raise UsageError(f"the subject {shown(account.subject.name)} is in the new run only; the old one has {known}")


def _difference(old: Document, before: Account, new: Document, after: Account) -> Difference:
    first, second = _cells(before), _cells(after)
    steps = [_step(*key, first.get(key), second.get(key)) for key in {**second, **first}]
    judged = tuple(step for step in steps if {step.old, step.new} - {"unsupported", ABSENT})
    cases = not any(
        getattr(old.header, name) != getattr(new.header, name) for name in ("suite", "seed", "examples", "case")
    )
    declared = all(getattr(before.subject, name) == getattr(after.subject, name) for name in ("supports", "profiles"))
    return Difference(after.subject.name, tuple(_runs(old, before, new, after)), cases and declared, judged)


def _cells(account: Account) -> dict[tuple[str, str], Record]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for _, record in account.cells:
        groups.setdefault((RENAMED.get(record.law, record.law), record.dtype), []).append(record)
    return {key: merge(group) for key, group in groups.items()}


def _step(law: str, dtype: str, old: Record | None, new: Record | None) -> Step:
    names = [ABSENT if record is None else outcome(record) for record in (old, new)]
    ratios = [None if record is None else excess(record) for record in (old, new)]
    what = "" if new is None or new.verdict == "pass" else error_text(new)
    return Step(law, dtype, names[0], names[1], ratios[0], ratios[1], what)


def _runs(old: Document, before: Account, new: Document, after: Account) -> list[str]:
    """What else differs than the verdicts, as "name: old, now new"."""
    headers = (
        "suite",
        "python",
        "numpy",
        "torch",
        "platform",
        "device",
        "gpu",
        "seed",
        "examples",
        "threads",
        "compile",
    )
    pairs = [(name, getattr(old.header, name), getattr(new.header, name)) for name in headers]
    pairs.append(("code", code_text(before.subject) or None, code_text(after.subject) or None))
    pairs += [
        (name, getattr(before.subject, name), getattr(after.subject, name)) for name in ("name", "operations", "dtypes")
    ]
    for name in ("supports", "profiles"):
        one, other = getattr(before.subject, name), getattr(after.subject, name)
        pairs += [(f"{name} {key}", one.get(key), other.get(key)) for key in sorted({*one, *other})]
    return [f"{name}: {shown(a)}, now {shown(b)}" for name, a, b in pairs if a != b]
