"""The merge of parts, against attention over all keys and in extreme cases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mla_spec.reference.attention import attention
from mla_spec.reference.merge import merge
from mla_spec.reference.typing import Array

RNG = np.random.default_rng(7)
EPS = np.finfo(np.float64).eps


def parts(lses: list[float], width: int = 3) -> tuple[Array, Array]:
    """One row per part: outs [parts, 1, 1, width] and lses [parts, 1, 1]."""
    lse = np.array(lses).reshape(-1, 1, 1)
    return RNG.standard_normal((len(lses), 1, 1, width)), lse


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 0, 3, 3, 8, 9)])
def test_parts_of_the_keys_merge_to_attention_over_all(cuts: tuple[int, ...]) -> None:
    q, k, v = (RNG.standard_normal((2, t, 4, d)) for t, d in ((5, 6), (9, 6), (9, 3)))
    pieces = [attention(q, k[:, i:j], v[:, i:j], softmax_scale=2.0, causal=False) for i, j in pairwise(cuts)]
    out, lse = merge(np.stack([o for o, _ in pieces]), np.stack([x for _, x in pieces]))
    want, want_lse = attention(q, k, v, softmax_scale=2.0, causal=False)
    assert np.abs(out - want).max() < 64 * EPS
    assert np.abs(lse - want_lse).max() < 64 * EPS * np.abs(want_lse).max()


def test_empty_parts_have_no_weight_and_are_not_read() -> None:
    outs, lses = parts([-np.inf, 1.5, -np.inf])
    outs[[0, 2]] = np.nan
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, lses[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_keys_the_row_is_empty(count: int) -> None:
    out, lse = merge(np.full((count, 1, 1, 2), np.nan), np.full((count, 1, 1), -np.inf))
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("mean", [1e300, -1e300, 5e4, 0.0])
def test_equal_lses_average_at_any_magnitude(mean: float) -> None:
    outs, lses = parts([mean, mean])
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs.mean(axis=0))
    assert lse == mean + np.log(2)


def test_a_part_of_far_greater_mass_is_the_result() -> None:
    outs, lses = parts([-800.0, 1.0, -1e5])
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    assert lse == 1.0


def test_heads_and_queries_are_not_confused() -> None:
    outs, lses = RNG.standard_normal((2, 3, 5, 4, 6)), RNG.standard_normal((2, 3, 4, 5))
    out, lse = merge(outs, lses)
    for b, s, h in ((0, 0, 0), (2, 4, 1), (1, 2, 3)):
        weights = np.exp(lses[:, b, h, s])
        want = weights @ outs[:, b, s, h] / weights.sum()
        assert np.abs(out[b, s, h] - want).max() < 8 * EPS
        assert abs(lse[b, h, s] - np.log(weights.sum())) < 8 * EPS


@pytest.mark.parametrize(
    ("outs", "lses"),
    [((2, 5, 4, 3), (2, 5, 4)), ((2, 5, 4, 3), (1, 4, 5)), ((5, 4, 3), (4, 5))],
)
def test_shapes_must_fit(outs: tuple[int, ...], lses: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fit, got"):
        merge(np.zeros(outs), np.zeros(lses))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_lses_must_be_numbers_or_minus_infinity(bad: float) -> None:
    outs, lses = parts([0.0, bad])
    with pytest.raises(ValueError, match=r"^lses must be finite or -inf"):
        merge(outs, lses)
