"""What an audit has seen: counts and margins, the false alarms that it allows, and how soon it meets a fault."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from mla_spec.bounds.statistics import FAMILY_ALPHA
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY

SCHEMA, VERSION = "mla-spec-audit", 1

CONFIDENCE = 0.99
"""With which a fault is met within the calls that a report says."""

EDGES = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 10.0)
"""Upper ends of the cells in which error / bound is counted; there is one more beyond."""


def level(k: int) -> float:
    """How probable it may be that the k-th judged call, k ≥ 1, gives a false alarm by the probable bound.

    min(10^-9, α/(k(k+1))), of which all together are less than α, since Σ 1/(k(k+1)) = 1.
    """
    return min(FAILURE_PROBABILITY, FAMILY_ALPHA / (k * (k + 1)))


def false_alarms(judged: int) -> float:
    """How probable any false alarm by the probable bound is among so many judged calls: the sum of their levels."""
    # From k on, min(...) is its second term, whose sum telescopes.
    few = next(k for k in range(1, 10**6) if level(k) < FAILURE_PROBABILITY)
    if judged < few:
        return judged * FAILURE_PROBABILITY
    return (few - 1) * FAILURE_PROBABILITY + FAMILY_ALPHA * (1 / few - 1 / (judged + 1))


def calls_until_met(rate: float, share: float, confidence: float = CONFIDENCE) -> int | None:
    """Calls among which one is judged, with this probability, in a row that has a fault; None where none ever is.

    Args:
        rate: share of the calls that are judged.
        share: of the rows of a call that have the fault, as far as rows of one call are taken together.
    """
    met = rate * share
    if met <= 0:
        return None
    return 1 if met >= 1 else math.ceil(math.log(1 - confidence) / math.log1p(-met))


@dataclass
class Margins:
    """Error / bound of one output of an operation: how often it lay in which cell, and the largest."""

    cells: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    largest: float = 0.0
    total: float = 0.0
    unseen: float = 0.0
    unseen_relative: float = 0.0

    def add(self, margin: float, sight: tuple[float, float] | None) -> None:
        """Note a judged call; ``sight`` is the median bound, and the same relative to the rms of the output."""
        self.cells[bisect_left(EDGES, margin)] += 1
        self.largest = max(self.largest, margin)
        self.total += margin if math.isfinite(margin) else 0.0
        if sight is not None:
            self.unseen, self.unseen_relative = max(self.unseen, sight[0]), max(self.unseen_relative, sight[1])


@dataclass
class Counts:
    """What became of the calls of a kernel.

    Attributes:
        dropped: calls that were copied and not judged, because the queue was full or the judging process ended.
        judged: calls by operation and verdict.
        violations, proofs: failing calls, and those of them that are outside the worst case.
        margins: by operation and output.
    """

    dropped: int = 0
    judged: dict[tuple[str, str], int] = field(default_factory=dict)
    violations: int = 0
    proofs: int = 0
    margins: dict[tuple[str, str], Margins] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Calls that were held against a bound."""
        return sum(n for (_, verdict), n in self.judged.items() if verdict in ("pass", "fail"))

    def add(self, operation: str, found: dict[str, Any]) -> None:
        """Note what the judging process found of one call."""
        key = operation, found["verdict"]
        self.judged[key] = self.judged.get(key, 0) + 1
        failed = found["verdict"] == "fail"
        self.violations += failed
        self.proofs += failed and found["proof"]
        for output, margin in found["margins"].items():
            sight = found["sights"].get(output)
            self.margins.setdefault((operation, output), Margins()).add(
                math.inf if margin is None else margin, sight if sight is None else tuple(sight)
            )


@dataclass(frozen=True)
class Status:
    """The counts of an audit and of its sample, for people and machines."""

    subject: str
    calls: int
    taken: int
    too_large: int
    stopped: str
    heads: dict[str, tuple[int, int]]
    counts: Counts

    @property
    def rate(self) -> float:
        """Share of the calls that were judged."""
        return self.counts.held / self.calls if self.calls else 0.0

    def line(self) -> str:
        """As a JSON object in one line."""
        counts = self.counts
        plain = {
            "type": "counts",
            "calls": self.calls,
            "taken": self.taken,
            "dropped": counts.dropped,
            "too_large": self.too_large,
            "judged": {f"{operation} {verdict}": n for (operation, verdict), n in sorted(counts.judged.items())},
            "violations": counts.violations,
            "proofs": counts.proofs,
            "false_alarm_probability": false_alarms(counts.held),
            "margins": {
                f"{operation} {output}": {
                    "largest": number(m.largest),
                    "cells": m.cells,
                    "unseen": number(m.unseen),
                    "unseen_relative": number(m.unseen_relative),
                }
                for (operation, output), m in sorted(counts.margins.items())
            },
            "stopped": self.stopped,
        }
        return json.dumps(plain) + "\n"

    def text(self) -> str:
        """For people."""
        counts = self.counts
        lines = [
            f"{self.subject}: {self.calls} calls, {self.taken} taken, {counts.held} judged, {counts.dropped} dropped, "
            f"{self.too_large} too large; {counts.violations} violations, {counts.proofs} of them beyond the worst case",
            "A violation beyond the worst case is no false alarm. One by the probable bound is, anywhere in this run, with a "
            f"probability of at most {false_alarms(counts.held):.2g}.",
        ]
        for operation, (kept, of) in sorted(self.heads.items()):
            calls = calls_until_met(self.rate, kept / of)
            if calls is not None:
                lines.append(
                    f"{operation}: a fault in one head of {of} is in a judged row within {calls} calls "
                    f"({100 * CONFIDENCE:g} %)"
                )
        for (operation, output), m in sorted(counts.margins.items()):
            lines.append(
                f"{operation}: {output} has used {100 * m.largest:.3g} % of its bound at most; an error up to {m.unseen:.2g} "
                f"({100 * m.unseen_relative:.2g} % of its rms) is not seen"
            )
        return "\n".join([*lines, *([f"stopped: {self.stopped}"] if self.stopped else [])])


def number(x: float) -> float | None:
    """A number as JSON has it; None for what is not finite."""
    return x if math.isfinite(x) else None
