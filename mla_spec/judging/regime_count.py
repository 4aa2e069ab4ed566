"""What came of the cases of a regime: how many ran, how many failed, and how near the bound they came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mla_spec.text.typed import Size


@dataclass(frozen=True, kw_only=True)
class RegimeCount:
    """Cases of one regime, as a file has them; records hold them as plain data.

    Attributes:
        cases: that ran, those tried while a smaller one was looked for among them.
        failed: of them.
        worst: the largest error / bound; None where bits were compared, or it is not finite.
    """

    cases: Size
    failed: Size
    worst: float | None


def together(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The counts of several, by the name of the regime, added up."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, more in part.items():
            before = found.get(name, {"cases": 0, "failed": 0, "worst": None})
            known = [count["worst"] for count in (before, more) if count["worst"] is not None]
            counts = {key: before[key] + more[key] for key in ("cases", "failed")}
            found[name] = {**counts, "worst": max(known, default=None)}
    return found
