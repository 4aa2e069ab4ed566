"""Asks a subject again about a failing case, and says what comes of it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from mla_spec.judging.finding import Finding
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.necessary import necessary
from mla_spec.judging.stated import stated
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case

MOST = 4
"""Findings of one failure."""

LARGE = 1 << 15
"""Elements of a result beyond which a smaller one is asked about first: it takes less time, and says less."""


def find_out(
    record: Record, options: Options, pool: WorkerPool, signature: str | None = None, budget: float = 60.0
) -> list[Finding]:
    """What is found out of a failure: what inputs tell, what it needs, and what its law states; the finest first.

    Args:
        options: with which the law ran; ``spec`` finds the subject.
        budget: seconds after which the subject is not asked again.
    """
    if record.verdict not in ("fail", "crashed") or not record.case:
        return []
    end = time.monotonic() + budget

    def again(case: Case, tell: bool = False) -> Record:
        if time.monotonic() > end:
            return replace(record, told=[])
        own = replace(options, case=case, minimise=False, dtypes=None, tell=tell)
        return pool.submit(record.law, record.subject, own, signature).result()

    found = [Finding(**each) for each in record.told]
    for case in _cases(record):
        found = found or [Finding(**each) for each in again(parse_case(case), tell=True).told]
    needed = necessary(parse_case(record.case), again)
    law, size = stated(record)
    return list(dict.fromkeys([*found[:2], *law, *needed, *size]))[:MOST]


def _cases(record: Record) -> list[str]:
    """Ids of the cases that show most, then the smallest; a large one last."""
    shown = sorted(record.evidence, key=lambda each: math.prod(each["shape"]), reverse=True)
    few, many = ([e["case"] for e in shown if (math.prod(e["shape"]) > LARGE) is large] for large in (False, True))
    return list(dict.fromkeys([*few, record.case, *many]))
