"""What ``mla-spec laws`` says beside the laws."""

from __future__ import annotations

from mla_spec.properties.hazards import EXCEPTIONS, STATED_ELSEWHERE


def hazard_exceptions() -> str:
    """The operations of which a hazard has no law, or one that is written by hand, and why; a line each."""
    lines = [f"no law {operation} {hazard}: {why}" for (operation, hazard), why in EXCEPTIONS.items()]
    lines += [f"by hand: {operation} {hazard}: {why}" for (operation, hazard), why in STATED_ELSEWHERE.items()]
    return "\n".join(lines)
