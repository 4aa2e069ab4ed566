"""What rounding the weights P to a narrow format moves: in the worst case, and where the roundings are independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention_moments import Moments, Rates
from mla_spec.bounds.attention_sums import BoundSums
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array

FAILURE_PROBABILITY = 1e-9
"""That any element of one call lies outside its probable error."""

SPREAD = 8.0
"""Least exp(entropy) of the distribution of weight over distinct values of P for which roundings count as independent."""


def underflow(moments: Moments, rates: Rates) -> Array:
    """What one weight may lose below the normal range of the format of P, relative to the row sum."""
    p = format_of(rates.profile.probabilities)
    # Hardware may flush subnormals of wide formats; those of narrow ones are in reach, and kept.
    lost = p.smallest_subnormal / 2 if p.min_exponent > -100 else p.smallest_normal
    lost = lost / rates.profile.probabilities_scale
    if rates.profile.row_sum in ("normalised", "lse"):
        return np.full_like(moments.inverse, lost)
    return lost * moments.inverse / moments.row_total


def rounded_p(moments: Moments, rates: Rates, column: Array) -> tuple[Array, Array]:
    """R: what rounding P moves the output by, and, relatively, the row sum where it adds the rounded weights.

    With errors d_j of the weights, |d_j| ≤ u_p p̂_j + lost, and a row sum that adds the rounded ones, the output moves by
    Σ d_j (v̂_j − ô)/(1 + Σ d_j), where ô = Σ p̂_j v̂_j.

    Args:
        column: Σ_j |v̂_j|, for the underflow of weights.
    """
    u_p = format_of(rates.profile.probabilities).unit_roundoff
    lost = underflow(moments, rates)
    if rates.profile.row_sum != "rounded":
        return u_p * moments.gauge + lost * column, np.zeros_like(lost)
    off = moments.moved + moments.inherited  # how far the mean that the perturbed values deviate from may be from o
    spread = moments.deviation + moments.inherited + off
    change = u_p * spread + lost * (column + rates.t * (np.abs(moments.out) + off))
    relative = u_p + rates.t * lost
    return change / np.maximum(1 - relative, 0), relative


def beside_a_sink(moments: Moments, rates: Rates, column: Array) -> Array:
    """What weights lose below the normal range of P where a sink is one of the scores: the sum of all is then at least 1."""
    lost = underflow(moments, rates)
    if rates.profile.row_sum not in ("normalised", "lse"):
        lost = lost * moments.row_total
    of_sum = rates.t * np.abs(moments.out) if rates.profile.row_sum == "rounded" else 0.0
    return lost * (column + of_sum)


@dataclass(frozen=True)
class Likely:
    """What independent roundings of the weights add up to, but with a small probability that is asked for.

    A sum of independent errors of at most u x_j exceeds sqrt(2 ln(2/δ)) · u · sqrt(Σ x_j²) with probability δ (Hoeffding).
    Equal keys have equal weights and errors, so they count as often as they occur. The rounding of a weight is taken as
    independent of the others' where the weight of the row spreads over ``SPREAD`` distinct values of P.
    """

    weights: Array  # λ sqrt(Σ p̂²), [..., g, rows, 1]; inf where the roundings are not independent
    values: Array  # λ sqrt(Σ p̂² v̂²), [..., g, rows, dv]

    @classmethod
    def of(cls, sums: BoundSums, moments: Moments, k: Array, failure: float = FAILURE_PROBABILITY) -> Likely:
        """That of one call, of whose elements any exceeds it with the probability ``failure``."""
        judged = max(1, moments.out.size)
        tail = math.sqrt(2 * math.log(2 * judged / failure))
        mass = np.where(sums.cells > 0, sums.cells, 1.0)
        spread = np.exp(-(mass * np.log(mass)).sum(axis=-1)) >= SPREAD  # [..., g, rows]
        repeats = np.sqrt(_repeats(k))[..., None]  # [..., g, 1]
        rate = np.where(spread, tail * repeats, np.inf)[..., None] * moments.growth
        return cls(rate * np.sqrt(sums.weight_square)[..., None], rate * np.sqrt(sums.value_square))

    def rounded_p(self, moments: Moments, rates: Rates, column: Array) -> Array:
        """R, for ``rounded_p``."""
        u_p = format_of(rates.profile.probabilities).unit_roundoff
        lost = underflow(moments, rates)
        if rates.profile.row_sum != "rounded":
            return u_p * self.values + lost * column
        size = np.abs(moments.out) + moments.moved + moments.inherited
        change = u_p * (self.values + size * self.weights) + lost * (column + rates.t * size)
        return change / np.maximum(1 - u_p - rates.t * lost, 0)

    def rounded_sum(self, moments: Moments, rates: Rates) -> Array:
        """The relative error of a sum of rounded weights."""
        u_p = format_of(rates.profile.probabilities).unit_roundoff
        return u_p * self.weights + rates.t * underflow(moments, rates)


def _repeats(k: Array) -> Array:
    """How often the most frequent key of [..., t, g, d] occurs, [..., g]."""
    # Equal keys have equal sums; unequal ones may too, which only makes the count larger.
    key = np.sort(np.moveaxis(k, -2, -3).sum(axis=-1), axis=-1)  # [..., g, t]
    index = np.arange(key.shape[-1])
    starts = np.concatenate([np.ones_like(key[..., :1], dtype=bool), key[..., 1:] != key[..., :-1]], axis=-1)
    runs = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1) + 1
    longest: Array = runs.max(axis=-1, initial=1).astype(np.float64)
    return longest
