"""What the peers' inputs and criteria let pass, of the planted bugs: emulated, next to what this suite kills."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from mla_spec.proof.peer_inputs import (
    PeerCall,
    pages_of_one_token,
    peer_call,
    run,
)
from mla_spec.proof.peers import PEERS, Peer
from mla_spec.proof.reach import operations_that_differ
from mla_spec.proof.selftest import Matrix, planted_bugs
from mla_spec.subjects.contract import offers, supports_of
from mla_spec.subjects.find import resolve_subject
from mla_spec.subjects.violation import SubjectCrashed, Violation
from mla_spec.text.table import format_table

SEEDS = (0, 1, 2)
CORRECT = ("torch-explicit", "torch-absorbed", "torch-sdpa")
"""Subjects that every peer ought to accept."""

DISCLAIMER = (
    "This emulates the inputs and pass criteria that these projects publish, on a CPU, with small batches; it does not run "
    "their tests."
)


OTHER_MATTERS = ("_gradients_", "_backward_", "test_compiled_", "_memory_")
"""In the names of laws of what the result of a plain call, all that a peer's test looks at, does not show."""

OTHER_SIZES = ("sizes", "distant")
"""Modules of planted bugs that need large sizes, or tensors that lie elsewhere in memory than the emulation has them."""


def accepted(peer: Peer, subject: Any) -> bool:
    """Whether the subject passes on every seed that suits it. One that raises, or returns nothing to compare, does not."""
    try:
        calls = (peer_call(peer, seed) for seed in SEEDS)
        return all(_accepts(call, subject) for call in calls if call.suits(subject))
    except (Violation, SubjectCrashed):
        return False


def _accepts(call: PeerCall, subject: Any) -> bool:
    peer = call.peer
    out, lse = call.run(subject)
    want, want_lse = call.want
    if peer.against_itself:
        want, want_lse = run(peer, pages_of_one_token(call.inputs), subject, peer.dtype)
    if not peer.out.accepts(out, want, call.coarse):
        return False
    if peer.lse is None or lse is None or want_lse is None:
        return True
    return peer.lse.accepts(lse, want_lse, want_lse)


def can_see(peer: Peer, bug: Any) -> bool:
    """Whether the bug is in the results of an operation that the peer's test calls, with a dtype that it uses."""
    if bug.make.__module__.rpartition(".")[2] in OTHER_SIZES or all(
        any(word in law for word in OTHER_MATTERS) for law in bug.killed_by
    ):
        return False
    if peer.operation not in operations_that_differ(bug.make):
        return False
    subject = bug.make()
    return offers(subject, peer.operation) and peer.dtype in supports_of(subject).dtypes


def judge_bug(bug_id: str) -> dict[str, bool]:
    """By the name of each peer that can see the bug, whether it accepts it."""
    (bug,) = planted_bugs([bug_id])
    return {peer.name: accepted(peer, bug.make()) for peer in PEERS if can_see(peer, bug)}


def rejected_correct() -> dict[str, list[str]]:
    """By peer, the correct subjects that the emulation rejects; it should reject none."""
    rejected = {}
    for peer in PEERS:
        names = [name for name in CORRECT if not accepted(peer, resolve_subject(name))]
        if names:
            rejected[peer.name] = names
    return rejected


@dataclass(frozen=True)
class PeerResults:
    """By bug and peer, whether the peer accepts the bug; and what this suite said of the same bugs."""

    accepted: dict[str, dict[str, bool]]
    ours: Matrix
    rejected_correct: dict[str, list[str]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, ...]]:
        """Per peer: its name, operation, inputs, criterion, the bugs it can see, those it kills, and those this suite does."""
        killed = {result.bug for result in self.ours.killed}
        rows = []
        for peer in PEERS:
            seen = [bug for bug, verdicts in self.accepted.items() if peer.name in verdicts]
            theirs = sum(not self.accepted[bug][peer.name] for bug in seen)
            criterion = str(peer.out) + (f"; LSE: {peer.lse}" if peer.lse is not None else "")
            counts = (str(len(seen)), str(theirs), str(len(killed.intersection(seen))))
            rows.append((peer.name, peer.operation, peer.inputs, criterion, *counts))
        seen = [bug for bug, verdicts in self.accepted.items() if verdicts]
        theirs = sum(not all(self.accepted[bug].values()) for bug in seen)
        counts = (str(len(seen)), str(theirs), str(len(killed.intersection(seen))))
        return [*rows, ("all of them together", "", "", "", *counts)]

    @property
    def missed_by_all(self) -> list[str]:
        """Bugs that some peer can see and all of those accept."""
        return [bug for bug, verdicts in self.accepted.items() if verdicts and all(verdicts.values())]

    def footnotes(self) -> list[str]:
        """Bugs that nobody else finds, and correct subjects that are rejected."""
        rejected = ", ".join(f"{name} ({', '.join(subjects)})" for name, subjects in self.rejected_correct.items())
        return [
            f"Accepted by every peer that can see them: {', '.join(self.missed_by_all) or 'none'}.",
            f"Correct subjects rejected: {rejected or 'none'}.",
        ]

    def as_dict(self) -> dict[str, Any]:
        sources = {
            peer.name: {"source": peer.source, "inputs": peer.inputs, "passes_when": str(peer.out)} for peer in PEERS
        }
        return {
            "note": DISCLAIMER,
            "peers": sources,
            "accepted": self.accepted,
            "missed_by_all": self.missed_by_all,
            "rejected_correct_subjects": self.rejected_correct,
        }


def report(results: PeerResults) -> str:
    """The side-by-side table as text."""
    return "\n".join([DISCLAIMER, format_table([HEADER, *results.rows()]), *results.footnotes()])


HEADER = ("peer", "operation", "inputs", "passes when", "bugs it can see", "it kills", "this suite kills")


def markdown(results: PeerResults, *, short: bool = False) -> str:
    """The side-by-side table, with links to the sources; without inputs, criteria and the names of bugs if ``short``."""
    sources = {peer.name: peer.source for peer in PEERS}
    columns = [i for i in range(len(HEADER)) if not (short and HEADER[i] in ("inputs", "passes when"))]
    lines = ["| " + " | ".join(HEADER[i] for i in columns) + " |", "|" + "---|" * len(columns)]
    for row in results.rows():
        cells = [cell.replace("|", "\\|") for cell in row]
        cells[0] = f"[{row[0]}]({sources[row[0]]})" if row[0] in sources else row[0]
        lines.append("| " + " | ".join(cells[i] for i in columns) + " |")
    return "\n".join([DISCLAIMER, "", *lines, *([] if short else ["", *results.footnotes()])])


def run_peers(
    bugs: Iterable[Any], ours: Matrix, *, jobs: int = 1, progress: Callable[[str], None] = lambda bug: None
) -> PeerResults:
    """Evaluate the bugs under every peer's inputs and criterion, in processes of their own."""
    ids = [bug.id for bug in bugs]
    verdicts: dict[str, dict[str, bool]] = {}
    try:
        with _pool(jobs) as pool:
            for bug_id, verdict in zip(ids, pool.map(judge_bug, ids), strict=True):
                verdicts[bug_id] = verdict
                progress(bug_id)
    except BrokenProcessPool:
        for bug_id in ids[len(verdicts) :]:
            verdicts[bug_id] = _alone(bug_id)
            progress(bug_id)
    return PeerResults(verdicts, ours, rejected_correct())


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _alone(bug_id: str) -> dict[str, bool]:
    """A bug's verdicts; one that ends its process is accepted by no peer that can see it."""
    try:
        with _pool(1) as pool:
            return pool.submit(judge_bug, bug_id).result()
    except BrokenProcessPool:
        (bug,) = planted_bugs([bug_id])
        return {peer.name: False for peer in PEERS if can_see(peer, bug)}
