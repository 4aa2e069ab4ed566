"""A rotation of unit vectors: what becomes of each says with which column it is paired, and by which angle it turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from mla_spec.operations.rope import OPERATION, RopeCase
from mla_spec.reference.rope import rope_cos_sin
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver

POSITION = 3
"""At which vectors stand: its neighbours and its negative give other angles."""

SMALL = 1e-3
"""Numbers below it are no part of a unit vector: float32 leaves less."""


def rope_telltale(driver: Driver, case: RopeCase) -> list[str]:
    """Sentences on pairs, angles and lengths that are not those of the case."""
    rope = case.build().rope
    columns = np.arange(rope.dim)
    inputs = replace(case.build(), x=np.eye(rope.dim)[None], positions=np.full((1, rope.dim), POSITION))
    out = driver.call(OPERATION, inputs)[0].value[0]  # the row of each unit vector
    partner = columns ^ 1 if rope.interleaved else (columns + rope.dim // 2) % rope.dim
    angles = {p: np.arctan2(*rope_cos_sin(np.array([p]), rope)[::-1])[0] for p in range(2 * POSITION)}
    said: Counter[str] = Counter()
    for column in columns:
        pair = int(column // 2 if rope.interleaved else column % (rope.dim // 2))
        first = bool(column < partner[column])
        way = _way(out[column], int(column), int(partner[column]), pair, first, angles, rope.cos_sin_factor)
        said.update([way] if way else [])
    return [f"rope {way} ({count} of {rope.dim} columns)" for way, count in said.most_common(3)]


def _way(row: Array, column: int, partner: int, pair: int, first: bool, angles: dict[int, Array], length: float) -> str:
    """What is wrong with a rotated unit vector, or ""."""
    others = [int(i) for i in np.flatnonzero(~(np.abs(row) < SMALL)) if i != column]
    if not np.isfinite(row).all():
        return "gives numbers that are not finite"
    if others and others != [partner]:
        return f"pairs columns as others, such as {column} with {others[0]} in place of {partner}"
    got = float(np.hypot(row[column], row[partner]))
    if abs(got - length) > SMALL:
        return f"changes the length of a vector by the factor {got:.4g} in place of {length:.4g}"
    angle = float(np.arctan2(row[partner] if first else -row[partner], row[column]))
    if _same(angle, float(angles[POSITION][pair])):
        return ""
    if _same(angle, -float(angles[POSITION][pair])):
        return "turns backwards"
    for position, known in angles.items():
        if _same(angle, float(known[pair])):
            return f"turns as at the position {position} in place of {POSITION}"
    for other, known_angle in enumerate(angles[POSITION]):
        if _same(angle, float(known_angle)):
            return f"turns pairs by the angle of others, such as {pair} by that of {other}"
    return "turns by an angle of no pair"


def _same(one: float, other: float) -> bool:
    return bool(abs(np.angle(np.exp(1j * (one - other)))) < SMALL)
