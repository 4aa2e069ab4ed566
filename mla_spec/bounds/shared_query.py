"""What an error of q moves an output by, given that all keys of a row meet the same wrong q.

With δ_j = σ Σ_i ε_i k_ji, |ε| ≤ e, and δ'_j = δ_j − Σ p δ, the weights relative to the exact ones are w_j = e^{δ'_j} (1 + η_j),
where η are the errors of all else. From e^x = 1 + x + r, |r| ≤ e^|x| − 1 − |x|, and Σ p (v − o) = 0,

    ô − o = [ Σ_i σ ε_i Cov_p(k_i, v) + Σ_j p_j (r_j + e^{δ'_j} η_j)(v_j − o) ] / Σ p w.

The first term is linear, and small where keys and values vary independently. |δ'_j| is at most σ Σ_i e_i |k_ji − k̄_i|, with the
mean key k̄ = Σ p k, and Σ p w is no less than without an error of q, since the mean of δ' is 0.
"""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.attention_moments import Moments, Rates
from mla_spec.reference.attention import SoftmaxBlock, heads_to_rows, key_block
from mla_spec.reference.typing import Array

PRODUCTS = 2**33
"""Products that the covariances of one call may take; beyond, they are bounded by standard deviations."""


def moved_by_query(
    block: SoftmaxBlock, k: Array, error: Array, softmax_scale: float, delta: Array, moments: Moments, rates: Rates
) -> Array:
    """N for a wrong q and all other errors of the scores together, [..., g, rows, dv].

    Args:
        block: all keys.
        k: [..., t, g, d].
        error: e of q, [..., s, h, d].
        delta: errors of the scores but for those of q, [..., g, rows, t].
    """
    e = heads_to_rows(abs(softmax_scale) * error, k.shape[-2])  # [..., g, rows, d]
    keys = key_block(k, slice(None))  # [..., g, t, d]
    lead = np.broadcast_shapes(e.shape[:-2], keys.shape[:-2], block.weights.shape[:-2])
    e, keys, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (e, keys, block.v))
    weights, delta = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (block.weights, delta))
    out = np.broadcast_to(moments.out, (*lead, *moments.out.shape[-2:]))
    exactly = e.shape[-2] * keys[..., 0].size * keys.shape[-1] * v.shape[-1] <= PRODUCTS
    moved = np.zeros(out.shape)
    for index in np.ndindex(weights.shape[:-1]):
        if weights[index].any():
            row = (weights[index], keys[index[:-1]], v[index[:-1]], e[index], delta[index], out[index])
            moved[index] = _of_row(*row, rates.eps, exactly=exactly)
    result: Array = moved * moments.inverse
    return result


def _of_row(
    weights: Array, k: Array, v: Array, e: Array, delta: Array, o: Array, eps: float, *, exactly: bool
) -> Array:
    """The numerator, [dv]: weights [t], k [t, d], v [t, dv], e [d], delta [t], o [dv]."""
    p = weights / weights.sum()
    away, deviation = k - p @ k, v - o
    spread = np.sqrt(p @ deviation**2)
    covariance = np.abs((p[:, None] * away).T @ deviation) if exactly else np.sqrt(p @ away**2)[:, None] * spread
    reach = np.abs(away) @ e  # of δ'
    eta = np.expm1(delta) * (1 + eps) + eps
    rest = np.expm1(reach) - reach + np.exp(reach) * eta
    size = np.where(p > 0, rest, 0.0)
    moved: Array = e @ covariance + np.sqrt(p @ size**2) * spread
    return moved * (1 + 2.0**-30)  # float64 rounds the differences
