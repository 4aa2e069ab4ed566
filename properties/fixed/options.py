"""Fixed cases of ``decode`` and ``prefill`` with a sink, a sliding window, or both."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any, TypeVar

from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.subjects.supports import Supports

C = TypeVar("C", DecodeCase, PrefillCase)

WINDOWS = (513, 130, 200, 1024, 512)
"""Of long sequences, no whole number of tiles, and whole ones."""


def with_all_options(operation: str, cases: list[Any], supports: Supports) -> list[Any]:
    """The cases with the sink and the window that the subject takes; none where it takes neither."""
    options: dict[str, Any] = {}
    if operation in supports.dense_sink:
        options["sink"] = "finite"
    if operation in supports.sliding_window and True in supports.causal:
        options |= {"window": 4, "causal": True}
    return [replace(case, **options) for case in cases if options]


def with_sinks(cases: list[C]) -> list[C]:
    """The cases, each with a sink."""
    return [replace(case, sink="finite") for case in cases]


def with_windows(operation: str, cases: list[C], supports: Supports) -> list[C]:
    """The cases, over and over, each with a window of hundreds of keys; the last with a sink beside it, where one is taken."""
    made = [replace(case, window=window, causal=True) for case, window in zip(cycle(cases), WINDOWS)]
    return made + (with_sinks(made[-1:]) if operation in supports.dense_sink else [])
