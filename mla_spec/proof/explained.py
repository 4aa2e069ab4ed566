"""For how many planted bugs the cause is named: each is found by a law, and its failure handed to the suspects.

That a bug is named when it stands among the suspects shows that nothing else looks like it on its cases. Whether the suspects
help with a fault that nobody has planted is another question: that is counted with the bug itself left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
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
    """

    bug: str
    law: str
    named: tuple[str, ...]
    case: str
    record: Record | None = None
    suspects: tuple[dict[str, Any], ...] = ()

    @property
    def itself(self) -> bool:
        return self.bug in self.named[:FIRST]

    @property
    def others(self) -> tuple[str, ...]:
        """The suspects without the bug."""
        return tuple(name for name in self.named if name != self.bug)

    def as_dict(self) -> dict[str, Any]:
        return {"bug": self.bug, "law": self.law, "case": self.case, "named": list(self.named)}


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
    """Find each bug by the first law that it names, and say which suspects look like it."""
    results = []
    with room() as pool:
        for bug in bugs:
            record = _found(bug, options, pool)
            found = () if record is None else tuple(named_suspects(record, pool))
            law, case = ("", "") if record is None else (record.law, record.case)
            results.append(Explained(bug.id, law, tuple(each["id"] for each in found), case, record, found))
            progress(results[-1])
    return results


def _found(bug: Any, options: Options, pool: WorkerPool) -> Record | None:
    for law in bug.killed_by:
        own = Options(examples=options.examples, seed=options.seed, device=options.device, spec=(bug.spec,))
        record = pool.submit(law, bug.id, own).result()
        if kills(record):
            return record
    return None


def score(results: Sequence[Explained]) -> str:
    """Two sentences: how many are named, and how many would be if nobody had planted them."""
    found = [each for each in results if each.law]
    itself, others = sum(each.itself for each in found), sum(bool(each.others) for each in found)
    alone = sum(len(each.named) == 1 and each.itself for each in found)
    count = len(found)
    return (
        f"the cause of {itself} of {count} planted bugs is named among the first {FIRST} suspects ({_share(itself, count)}), "
        f"of {alone} as the only one\n"
        f"with the bug itself left out of the suspects, something with the same wrong numbers is named for {others} of {count} "
        f"({_share(others, count)})"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"
