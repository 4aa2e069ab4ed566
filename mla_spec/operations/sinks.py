"""Attention sinks of cases: near the LSE, so that they leave the keys a share that formats of 16 bits can hold."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array

SINKS = ("none", "finite", "infinite")
"""What a case may have; with "infinite" both infinities are among the heads."""


def drawn_sink(rng: np.random.Generator, kind: str, lse: Array) -> Array:
    """A sink of each head, near the least LSE of its rows; numbers of float32.

    Args:
        kind: "finite" or "infinite".
        lse: [..., h, s]; -inf in rows without keys.
    """
    least = _least(lse)  # [h]
    sink = round_to(least + rng.uniform(-3, 3, len(least)), "float32")
    if kind == "infinite":
        sink = np.where(rng.random(len(sink)) < 0.7, rng.choice([-np.inf, np.inf], len(sink)), sink)
    return sink


def _least(lse: Array) -> Array:
    """The least LSE of each head over the rows that have keys, else 0."""
    heads = np.moveaxis(lse, -2, 0).reshape(lse.shape[-2], -1)
    least = np.where(np.isneginf(heads), np.inf, heads).min(axis=-1, initial=np.inf)
    return np.where(np.isinf(least), 0.0, least)
