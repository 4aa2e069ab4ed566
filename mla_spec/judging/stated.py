"""What a failing law says of a fault by itself: it asks for one thing, and its statement names that."""

from __future__ import annotations

from typing import Final

from mla_spec.installed import all_laws
from mla_spec.judging.error_text import separation_text
from mla_spec.judging.finding import Finding
from mla_spec.judging.verdict import Record

AGREES = "_with_reference"
"""Ends the names of laws that ask for right results, and so for everything."""

TOPICS_OF_LAWS: Final[tuple[tuple[str, str], ...]] = (
    ("gradient", "gradient"),
    ("backward", "gradient"),
    ("modify", "memory"),
    ("aliased", "memory"),
    ("writes_all", "memory"),
    ("stays_within", "memory"),
    ("unused", "memory"),
    ("sequences_are_independent", "batch"),
    ("calls_are_independent", "state"),
    ("tensors_anew", "state"),
    ("reset", "state"),
    ("made_again", "state"),
    ("overwritten", "state"),
    ("strides", "strides"),
    ("beyond_2_31", "strides"),
    ("padded", "strides"),
    ("same_bits", "rounding"),
    ("relabelling", "rounding"),
    ("unbiased", "rounding"),
    ("as_small_as_declared", "rounding"),
    ("bytes", "bytes"),
    ("allocates", "bytes"),
    ("memory", "bytes"),
    ("lse", "lse"),
    ("future_keys", "mask"),
    ("prefix", "reads"),
    ("relative_positions", "rotation"),
    ("layouts", "rotation"),
    ("preserves_norm", "rotation"),
    ("positions", "rotation"),
    ("production", "size"),
    ("at_length", "size"),
    ("thousands", "size"),
    ("several_tokens", "cache"),
    ("in_chunks", "cache"),
)
"""Words in names of laws, the first that is found, and what the law is about."""

LEAST = 8
"""A size that a case must have to fail, below which it says little."""


def stated(record: Record) -> tuple[list[Finding], list[Finding]]:
    """The statement of the law, where it asks for less than right results; and the size from which on cases fail."""
    topic = next((topic for word, topic in TOPICS_OF_LAWS if word in record.law), "")
    law, least = all_laws().get(record.law), record.separation.get("least")
    less = not record.law.endswith(AGREES) or topic in ("gradient", "lse")
    said = [Finding(topic, f"law: {law.statement}")] if law is not None and topic and less else []
    large = isinstance(least, int) and least >= LEAST
    return said, [Finding("size", separation_text(record.separation))] if large else []
