"""Tries known faults on the causes of a run, in little time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mla_spec.judging.causes import Cause
from mla_spec.text.terminal import show_progress

SHARE, MOST = 0.2, 30.0
"""Of the work of the run, and in seconds: what may be spent where nobody says."""

LEAST = 5.0
"""Seconds below which it is not begun: a process has to start."""

TRIED = 3
"""Causes on which known faults are tried."""


def explain(found: Sequence[Cause], budget: float | None = None) -> None:
    """Name the suspects of the first causes.

    Args:
        budget: seconds; None for a share of what the run took.
    """
    if budget is None:
        budget = min(MOST, SHARE * sum(record.seconds for cause in found for record in (*cause.alike, *cause.follows)))
    if not found or budget < LEAST:
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
