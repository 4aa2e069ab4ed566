"""The probable error of rounding P, against the same sums written out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mla_spec.bounds.attention_moments import Moments, Rates
from mla_spec.bounds.attention_sums import CELLS, BoundSums, bound_sums
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.weight_rounding import (
    FAILURE_PROBABILITY,
    SPREAD,
    Likely,
    _repeats,
    underflow,
)
from mla_spec.reference.attention import softmax_blocks
from mla_spec.reference.typing import Array

T, D, DV, SCALE = 40, 5, 3, 0.3
U_BF16, SURPLUS = 2.0**-8, math.expm1(0.01)
ORDER = gamma(8 * (D + T), 2.0**-53)
"""By how much float64 may differ from itself: the sums over D and T numbers have another order, and scores are up to some 8 in size."""


class Row:
    """One query of two heads that share their keys, in the profile's arithmetic; each score is off by 0.01 at most."""

    def __init__(self, profile: Profile) -> None:
        rng = np.random.default_rng(7)
        q, self.k, self.v = (rng.standard_normal(shape) for shape in ((1, 2, D), (T, 1, D), (T, 1, DV)))
        self.k[30] = self.k[20] = self.k[10]  # so that one key occurs three times
        blocks = softmax_blocks(q, self.k, self.v, softmax_scale=SCALE, cache_seqlens=None, causal=True, block_size=16)
        self.sums: BoundSums = bound_sums(blocks, lambda b: np.full_like(b.scores, 0.01), None, 2 * U_BF16)
        self.rates = Rates.of(profile, D, T)
        self.moments = Moments.of(self.sums, self.rates)
        self.likely = Likely.of(self.sums, self.moments, self.k)
        self.column = np.abs(self.v[:, 0]).sum(0)  # [dv]
        scores = SCALE * q[0] @ self.k[:, 0].T
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)  # [h, t]
        self.p: Array = p[:, :, None] * (1 + SURPLUS)
        self.tail = math.sqrt(2 * math.log(2 * (2 * DV) / FAILURE_PROBABILITY)) * math.sqrt(3)

    @property
    def weights(self) -> Array:
        """λ sqrt(Σ p̂²), [h, 1]."""
        return self.tail * self.moments.growth[0] * np.sqrt((self.p**2).sum(1))

    @property
    def values(self) -> Array:
        """λ sqrt(Σ p̂² v²), [h, dv]."""
        return self.tail * self.moments.growth[0] * np.sqrt((self.p**2 * self.v[:, 0] ** 2).sum(1))


@pytest.mark.parametrize("probabilities", ["bfloat16", "float8_e4m3fn"])
def test_rounded_p_where_the_row_sum_is_of_unrounded_weights(probabilities: str) -> None:
    row = Row(Profile.default("bfloat16", probabilities=probabilities))
    np.testing.assert_allclose(row.likely.weights[0], row.weights, rtol=ORDER)
    np.testing.assert_allclose(row.likely.values[0], row.values, rtol=ORDER)
    u = {"bfloat16": U_BF16, "float8_e4m3fn": 2.0**-4}[probabilities]
    lost = underflow(row.moments, row.rates)[0]
    want = u * row.values + lost * row.column
    np.testing.assert_allclose(row.likely.rounded_p(row.moments, row.rates, row.column)[0], want, rtol=ORDER)
    assert (lost * row.column > 1e-3 * want).all() == (probabilities == "float8_e4m3fn")


@pytest.mark.parametrize("probabilities", ["bfloat16", "float8_e4m3fn"])
def test_rounded_p_where_the_row_sum_is_of_rounded_weights(probabilities: str) -> None:
    row = Row(Profile.default("bfloat16", probabilities=probabilities, row_sum="rounded"))
    u = {"bfloat16": U_BF16, "float8_e4m3fn": 2.0**-4}[probabilities]
    lost = underflow(row.moments, row.rates)[0]
    size = np.abs(row.moments.out[0]) + row.moments.moved[0]
    want = (u * (row.values + size * row.weights) + lost * (row.column + T * size)) / (1 - u - T * lost)
    np.testing.assert_allclose(row.likely.rounded_p(row.moments, row.rates, row.column)[0], want, rtol=ORDER)
    np.testing.assert_allclose(
        row.likely.rounded_sum(row.moments, row.rates)[0], u * row.weights + T * lost, rtol=ORDER
    )


@pytest.mark.parametrize(
    ("probabilities", "lost"),
    [("float32", 2.0**-126), ("bfloat16", 2.0**-126), ("float16", 2.0**-25), ("float8_e4m3fn", 2.0**-10)],
)
def test_underflow_flushes_wide_formats_and_rounds_in_narrow_ones(probabilities: str, lost: float) -> None:
    row = Row(Profile.default("bfloat16", probabilities=probabilities))
    np.testing.assert_allclose(
        underflow(row.moments, row.rates), lost * row.moments.inverse / row.moments.row_total, rtol=ORDER
    )
    divided = Row(Profile.default("bfloat16", probabilities=probabilities, row_sum="normalised"))
    assert (underflow(divided.moments, divided.rates) == lost).all()


@pytest.mark.parametrize(("outputs", "judged"), [(0, 1), (1, 1), (2, 2), (7, 7)])
def test_the_probability_is_of_all_outputs(outputs: int, judged: int) -> None:
    row = Row(Profile.default("bfloat16"))
    likely = Likely.of(row.sums, replace(row.moments, out=np.zeros((outputs, 1))), row.k)
    ratio = math.log(2 * judged / FAILURE_PROBABILITY) / math.log(2 * (2 * DV) / FAILURE_PROBABILITY)
    np.testing.assert_allclose(likely.weights[0], row.weights * math.sqrt(ratio), rtol=ORDER)


def test_roundings_of_weights_on_too_few_values_are_not_independent() -> None:
    row = Row(Profile.default("bfloat16"))
    for values, independent in ((SPREAD + 1, True), (SPREAD - 1, False)):
        cells = np.where(np.arange(CELLS) < values, 1 / values, 0.0)
        sums = replace(row.sums, cells=np.broadcast_to(cells, row.sums.cells.shape))
        likely = Likely.of(sums, row.moments, row.k)
        assert np.isfinite(likely.weights).all() == independent
        assert np.isfinite(likely.values).all() == independent


def test_the_most_frequent_key_of_each_group_is_counted() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 3, (2, 7, 4, 1)).astype(float)  # [b, t, g, d]
    got = _repeats(keys)
    want = [[max(Counter(keys[b, :, g, 0]).values()) for g in range(4)] for b in range(2)]
    assert got.tolist() == want
    assert len({tuple(row) for row in want}) > 1
    distinct = np.arange(14.0).reshape(2, 7, 1, 1)
    assert _repeats(distinct).tolist() == [[1.0], [1.0]]
    assert _repeats(np.zeros((5, 2, 3))).tolist() == [5.0, 5.0]
    assert _repeats(np.zeros((0, 2, 3))).tolist() == [1.0, 1.0]
