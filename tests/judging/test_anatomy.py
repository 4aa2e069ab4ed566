"""The anatomy of an error: its pattern, its place, and what two errors have in common."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mla_spec.judging.anatomy import anatomy_of, same_wrong_numbers
from mla_spec.judging.error_text import pattern_text, place_text
from mla_spec.reference.typing import Array

RNG = np.random.default_rng(0)
WANT = RNG.uniform(1, 2, (3, 2, 4, 5))
BOUND = np.full(WANT.shape, 1e-6)


def wrong(got: Array) -> dict[str, object]:
    return anatomy_of("out", got, WANT, BOUND)


@pytest.mark.parametrize(
    ("got", "pattern", "value"),
    [
        (0.414 * WANT, "factor", 0.414),
        (-WANT, "factor", -1.0),
        (WANT + 0.25, "offset", 0.25),
        (0 * WANT, "zero", None),
        (WANT * np.arange(2, 6)[:, None], "factors", None),
        (np.where(WANT > 1.5, np.nan, WANT), "nan", None),
        (np.where(WANT > 1.5, np.inf, WANT), "infinite", None),
        (WANT + 3e-6 * RNG.uniform(-1, 1, WANT.shape), "rounding", None),
        (WANT[::-1], "other", None),
    ],
)
def test_the_pattern_is_named(got: Array, pattern: str, value: float | None) -> None:
    anatomy = wrong(got)
    assert anatomy["pattern"] == pattern
    assert anatomy["value"] == (None if value is None else pytest.approx(value, rel=1e-5))
    json.loads(json.dumps(anatomy, allow_nan=False))


def test_the_place_is_named_by_the_axes_of_the_contract() -> None:
    got = WANT.copy()
    got[1, :, 2:] *= 0.5
    anatomy = wrong(got) | {"case": "decode:dtype=float64,seqlens=3+90+64"}
    assert anatomy["where"] == {"0": [[1, 1]], "2": [[2, 3]]}
    assert pattern_text(anatomy) == "out is 0.5 times what it should be"
    assert place_text(anatomy, ("decode",)) == "in 20 of 120 elements: sequences with at least 90 keys, heads 2-3"
    inside = anatomy | {"case": "decode:dtype=float64,seqlens=3+70+90"}
    assert "sequence 1, heads 2-3" in place_text(inside, ("decode",))


def test_a_single_element_has_no_factor() -> None:
    one = np.array([[2.0]])
    assert anatomy_of("out", 3 * one, one, 0 * one + 1e-6)["pattern"] == "other"


def test_wrong_numbers_are_the_same_up_to_roundings_only() -> None:
    assert same_wrong_numbers(wrong(0.5 * WANT), wrong(0.5 * WANT + 1e-6))
    assert not same_wrong_numbers(wrong(0.5 * WANT), wrong(0.5 * WANT + 1e-4))
    assert not same_wrong_numbers(wrong(0.5 * WANT), {})
    right = anatomy_of("out", WANT, WANT, BOUND)
    assert not same_wrong_numbers(right, right)
