"""For how many planted bugs the cause is named: each is found by a law, and its failure handed to the suspects.

That a bug is named when it stands among the suspects shows that nothing else looks like it on its cases. A fault that nobody has
planted has no such suspect. What is said of it then is counted too: what was found out by asking it again names the part of the
computation in which it is wrong (``TOPICS`` of ``mla_spec.judging.finding``), and this is held against what the bug's author wrote of
it, and against the step that it overrides, by ``topics_of``. A report that always said the same would be right now and then, so the same
count is made with what was found out of every other bug.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.finding import Finding
from mla_spec.judging.findings import find_out
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.proof.bug_topics import topics_of
from mla_spec.proof.selftest import kills
from mla_spec.proof.suspects import named_suspects, room, suspects

OPERATIONS = ("decode", "prefill", "rope", "layer")
"""Operations whose bugs are counted."""

FIRST = 3
"""A cause counts as named where the bug is among so many suspects."""


@dataclass(frozen=True)
class Explained:
    """What was said of one planted bug.

    Attributes:
        bug: its id.
        law: the one that found it; empty where none did.
        named: ids of the suspects that give the same wrong numbers, the likeliest first.
        case: the smallest failing case.
        record: of that law; None where none found it.
        suspects: what is said of each of ``named``.
        findings: what was found out of it.
        about: the parts of the computation in which it is wrong.
    """

    bug: str
    law: str
    named: tuple[str, ...]
    case: str
    record: Record | None = None
    suspects: tuple[dict[str, Any], ...] = ()
    findings: tuple[Finding, ...] = ()
    about: frozenset[str] = frozenset()

    @property
    def itself(self) -> bool:
        return self.bug in self.named[:FIRST]

    @property
    def others(self) -> tuple[str, ...]:
        """The suspects without the bug."""
        return tuple(name for name in self.named if name != self.bug)

    @property
    def found_out(self) -> bool:
        """Whether what was found out names a part in which the bug is wrong."""
        return self.would_name(self.about)

    def would_name(self, about: frozenset[str]) -> bool:
        """Whether what was found out would name a bug that is wrong in these parts."""
        return any(finding.topic in about for finding in self.findings[:FIRST])

    def as_dict(self) -> dict[str, Any]:
        found = [finding.as_dict() for finding in self.findings]
        about = sorted(self.about)
        return {
            "bug": self.bug,
            "law": self.law,
            "case": self.case,
            "named": list(self.named),
            "findings": found,
            "about": about,
        }


def explicable(bugs: Sequence[Any], count: int = 0) -> list[Any]:
    """The bugs of ``OPERATIONS`` among ``bugs``; ``count`` of them, evenly chosen, where it is not 0."""
    known = {each.id for each in suspects()}
    laws = all_laws()
    chosen = [bug for bug in bugs if bug.id in known and laws[bug.killed_by[0]].needs[0] in OPERATIONS]
    if not count or count >= len(chosen):
        return chosen
    return [chosen[i * len(chosen) // count] for i in range(count)]


def explain_bugs(
    bugs: Sequence[Any], options: Options, progress: Callable[[Explained], None] = lambda result: None
) -> list[Explained]:
    """Find each bug by the first law that it names, ask it again, and say which suspects look like it."""
    results = []
    with room() as pool:
        for bug in bugs:
            record = _found(bug, options, pool)
            results.append(Explained(bug.id, "", (), "") if record is None else _explained(bug, record, options, pool))
            progress(results[-1])
    return results


def _explained(bug: Any, record: Record, options: Options, pool: WorkerPool) -> Explained:
    suspects = tuple(named_suspects(record, pool))
    findings = tuple(find_out(record, replace(options, spec=(bug.spec,)), pool))
    named = tuple(each["id"] for each in suspects)
    return Explained(bug.id, record.law, named, record.case, record, suspects, findings, topics_of(bug))


def _found(bug: Any, options: Options, pool: WorkerPool) -> Record | None:
    for law in bug.killed_by:
        own = Options(examples=options.examples, seed=options.seed, device=options.device, spec=(bug.spec,))
        record = pool.submit(law, bug.id, own).result()
        if kills(record):
            return record
    return None


def score(results: Sequence[Explained]) -> str:
    """Three sentences: how many are named, and how many would be, and are found out, if nobody had planted them."""
    found = [each for each in results if each.law]
    itself, others = sum(each.itself for each in found), sum(bool(each.others) for each in found)
    alone = sum(len(each.named) == 1 and each.itself for each in found)
    out, count = [each for each in found if each.found_out], len(found)
    by_law = sum(
        all(finding.topic not in each.about for finding in each.findings if not finding.says.startswith("law: "))
        for each in out
    )
    pairs = [one.would_name(other.about) for one in found for other in found if one is not other]
    return (
        f"the cause of {itself} of {count} planted bugs is named among the first {FIRST} suspects ({_share(itself, count)}), "
        f"of {alone} as the only one\n"
        f"with the bug itself left out of the suspects, something with the same wrong numbers is named for {others} of {count} "
        f"({_share(others, count)})\n"
        f"without any suspect, what is found out names the part that is wrong for {len(out)} of {count} "
        f"({_share(len(out), count)}), for {by_law} of these by the statement of the law alone; "
        f"what is found out of another bug would for {_share(sum(pairs), len(pairs))}"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"
