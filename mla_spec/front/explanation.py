"""Asks a subject again about the causes of a run, and tries known faults on them, in little time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mla_spec.judging.causes import Cause
from mla_spec.judging.session import Asked
from mla_spec.text.terminal import show_progress

SHARE, MOST = 0.2, 30.0
"""Of the work of the run, and in seconds: what may be spent where nobody says."""

LEAST = 8.0
"""Seconds that a run which took no time may spend beside the start of processes: the known faults of an operation take a few."""

TRIED = 3
"""Causes on which known faults are tried."""


def explain(found: Sequence[Cause], asked: Asked, budget: float | None = None) -> None:
    """Say what can be found out of the first causes of a subject's failures, and name their suspects.

    Args:
        budget: seconds; None for a share of what the run took.
    """
    if budget is None:
        worked = sum(record.seconds for cause in found for record in (*cause.alike, *cause.follows))
        budget = min(MOST, max(LEAST, SHARE * worked))
    if not found or budget <= 0:
        return
    from mla_spec.judging.findings import find_out
    from mla_spec.proof.suspects import named_suspects, room

    with room() as pool:
        pool.describe(asked.options, asked.signature).result()  # which starts the processes
        end = time.monotonic() + budget
        for number, cause in enumerate(found[:TRIED]):
            if (left := end - time.monotonic()) <= 0:
                break
            show_progress(f"what is wrong in {cause.lead.law} [{number + 1}/{min(TRIED, len(found))}]")
            out = find_out(cause.lead, asked.options, pool, asked.signature, budget=left / 2)
            cause.findings += [finding.as_dict() for finding in out]
            cause.suspects += named_suspects(cause.lead, pool, budget=end - time.monotonic())
    show_progress("")
