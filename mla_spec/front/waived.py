"""What tests have said of waivers; light, as the pytest plugin loads it before any law runs."""

from __future__ import annotations

OUTCOMES: list[tuple[str, str]] = []
"""A waiver and the verdict of a cell that it covers, of the test that is running."""
