"""Tests of many outputs at once, for errors that every single output may have: p-values of plain arrays.

A rounding to nearest errs as often up as down, so an error that always points one way is a fault although each element lies
within its worst-case bound. The unit of independence is the (row, head): all value dims of a row share the rounded P.

No p-value here rests on a normal approximation, whose far tail is not known to hold: each is an upper bound for every sample
size. `docs/statistics.md` derives the hypotheses.
"""

from __future__ import annotations

import math

import numpy as np

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.reference.typing import Array

FAMILY_ALPHA = 1e-6
"""Probability that a subject which is what it declares fails any statistical test of a run."""

STAKES = np.linspace(0.02, 0.98, 25)
"""Shares of the capital that ``excess_p_value`` bets on each unit."""


def require_allowance(allowance: Array) -> None:
    """Raise InvalidBound unless every element is finite and 0 or more."""
    wrong = ~(np.isfinite(allowance) & (allowance >= 0))
    if wrong.any():
        raise InvalidBound(
            f"what the profile allows is no finite number in {int(wrong.sum())} of {wrong.size} rows, so any error would pass"
        )


def bias_p_value(errors: Array, allowance: Array) -> float:
    """How probable so large a sum of errors is, if each is a part of at most ``allowance`` and a symmetric rest.

    With z the rest, the signs of z are fair coins whatever its sizes, so that Σz ≥ T sqrt(Σz²) has a probability of at most
    exp(−T²/2) (Hoeffding 1963; Efron 1969 for Student's t).

    Args:
        errors: any shape, of independent units.
        allowance: of the same shape, what a bias of each may be; not negative.

    Returns:
        An upper bound of the two-sided p-value; 0 where an error is not finite.

    Raises:
        InvalidBound: an allowance is negative, infinite or NaN, by which no error could be judged.
    """
    if not np.isfinite(errors).all():
        return 0.0
    require_allowance(allowance)
    surplus = np.abs(np.sum(errors)) - np.sum(allowance)
    if not surplus > 0:
        return 1.0
    size = np.sum((np.abs(errors) + allowance) ** 2)
    return min(1.0, 2 * math.exp(-(surplus**2) / (2 * size)))


def excess_p_value(ratios: Array) -> float:
    """How probable so large ratios are, if each is independent, not negative, and 1 or less on average.

    Bet the share λ of a capital of 1 on each ratio. In the end it is Π(1 − λ + λ ratio), which is 1 or less on average. So it
    exceeds 1/α with a probability of at most α (Markov; Ville 1939; Waudby-Smith and Ramdas 2024).

    Args:
        ratios: any shape, of independent units.

    Returns:
        An upper bound of the one-sided p-value, which small ratios never make small; 0 where a ratio is not finite.
    """
    if not np.isfinite(ratios).all():
        return 0.0
    log_capital = np.log1p(STAKES[:, None] * (np.ravel(ratios) - 1)).sum(axis=-1)  # [stakes]
    return min(1.0, len(STAKES) * math.exp(-max(0.0, np.logaddexp.reduce(log_capital))))
