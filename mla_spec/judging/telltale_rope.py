"""A rotation of unit vectors: what becomes of each says with which column it is paired, and by which angle it turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.judging.finding import Finding
from mla_spec.operations.rope import OPERATION, RopeCase, RopeInputs
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.rope import rope_cos_sin
from mla_spec.reference.typing import Array
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver

POSITION = 3
"""At which vectors stand: its neighbours and its negative give other angles."""

TABLES = (4096, 32768, 65536)
"""Positions at which a table may end and begin again."""

SMALL = 1e-3
"""Numbers below it are no part of a unit vector: float32 leaves less."""


def rope_telltale(driver: Driver, case: RopeCase, declared: Description) -> list[Finding]:
    """Findings on pairs, angles and lengths that are not those of the case; the driver's dtype is float32."""
    case = replace(case, dtype="float32")
    inputs = case.build()
    last = int(np.abs(inputs.positions).max(initial=0))
    found: Counter[str] = Counter()
    for position in (POSITION, last):
        found = found or _turns(driver, replace(inputs, x=np.eye(case.dim)[None]), position)
    return [Finding("rotation", f"rope {way} ({count} of {case.dim} columns)") for way, count in found.most_common(3)]


def _turns(driver: Driver, inputs: RopeInputs, position: int) -> Counter[str]:
    """What is wrong with unit vectors at a position, and with how many."""
    rope = inputs.rope
    columns = np.arange(rope.dim)
    out = driver.call(OPERATION, replace(inputs, positions=np.full((1, rope.dim), position)))[0].value[0]
    partner = columns ^ 1 if rope.interleaved else (columns + rope.dim // 2) % rope.dim
    others = {0, *range(2 * POSITION), position - 1, position + 1, *(position % table for table in TABLES)}
    angles = {p: _angles(p, rope) for p in (position, *sorted(others - {position}))}
    plain = _angles(position, replace(rope, yarn=None, longrope=None))
    said: Counter[str] = Counter()
    for column in columns:
        pair = int(column // 2 if rope.interleaved else column % (rope.dim // 2))
        asked = Asked(int(column), int(partner[column]), pair, position)
        way = _way(out[column], asked, angles, plain, rope.cos_sin_factor)
        said.update([way] if way else [])
    return said


def _angles(position: int, rope: RopeConfig) -> Array:
    return np.asarray(np.arctan2(*rope_cos_sin(np.array([position]), rope)[::-1])[0])


@dataclass(frozen=True)
class Asked:
    """A unit vector: its column, that with which it is paired, the number of the pair, and where it stands."""

    column: int
    partner: int
    pair: int
    position: int


def _way(row: Array, asked: Asked, angles: dict[int, Array], plain: Array, length: float) -> str:
    """What is wrong with a rotated unit vector, or ""."""
    column, partner, pair = asked.column, asked.partner, asked.pair
    others = [int(i) for i in np.flatnonzero(~(np.abs(row) < SMALL)) if i != column]
    if not np.isfinite(row).all():
        return "gives numbers that are not finite"
    if others and others != [partner]:
        return f"pairs columns as others, such as {column} with {others[0]} in place of {partner}"
    got = float(np.hypot(row[column], row[partner]))
    if abs(got - length) > SMALL:
        return f"changes the length of a vector by the factor {got:.4g} in place of {length:.4g}"
    angle = float(np.arctan2(row[partner] if column < partner else -row[partner], row[column]))
    right = float(angles[asked.position][pair])
    if _same(angle, right):
        return ""
    if _same(angle, -right):
        return "turns backwards"
    if _same(angle, float(plain[pair])):
        return "turns as without YaRN or LongRoPE"
    for position, known in angles.items():
        if _same(angle, float(known[pair])):
            return f"turns as at the position {position} in place of {asked.position}"
    for other, known_angle in enumerate(angles[asked.position]):
        if _same(angle, float(known_angle)):
            return f"turns pairs by the angle of others, such as {pair} by that of {other}"
    return "turns by an angle of no pair"


def _same(one: float, other: float) -> bool:
    return bool(abs(np.angle(np.exp(1j * (one - other)))) < SMALL)
