"""Tries known faults on the causes of a run, in little time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mla_spec.judging.causes import Cause
from mla_spec.text.terminal import show_progress

SHARE, MOST = 0.2, 30.0
"""Of the work of the run, and in seconds: what may be spent where nobody says."""

LEAST = 8.0
"""Seconds that a run which took no time may spend: processes have to start, and the known faults of an operation take a few."""

TRIED = 3
"""Causes on which known faults are tried."""


def explain(found: Sequence[Cause], budget: float | None = None) -> None:
    """Name the suspects of the first causes.

    Args:
        budget: seconds; None for a share of what the run took.
    """
    if budget is None:
        worked = sum(record.seconds for cause in found for record in (*cause.alike, *cause.follows))
        budget = min(MOST, max(LEAST, SHARE * worked))
    if not found or budget <= 0:
        return
    from mla_spec.proof.suspects import named_suspects, room

    end = time.monotonic() + budget
    with room() as pool:
        for number, cause in enumerate(found[:TRIED]):
            if (left := end - time.monotonic()) <= 0:
                break
            show_progress(f"known faults on {cause.lead.law} [{number + 1}/{min(TRIED, len(found))}]")
            cause.suspects += named_suspects(cause.lead, pool, budget=left)
    show_progress("")
