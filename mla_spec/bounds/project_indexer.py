"""The worst-case error of the indexer's operands computed from hidden states, by running error analysis.

As in ``layer_bound``, every intermediate counts as rounded to the profile's dtype; only the weights of the heads are kept in
the arithmetic of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.running import Bounded, product, rounded
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.indexer import IndexerConfig, check_indexer_weights, layer_norm, project_indexer
from mla_spec.reference.mla import Weights
from mla_spec.reference.typing import Array, IntArray

_U64 = FORMATS["float64"].unit_roundoff


@dataclass(frozen=True)
class BoundedIndexer:
    """Exact operands of the indexer and the errors of computed ones; shapes as ``project_indexer`` returns them."""

    q: Array
    q_error: ErrorBound
    k: Array
    k_error: ErrorBound
    weights: Array
    weights_error: ErrorBound


def project_indexer_with_bound(
    hidden: Array, q_latent: Array, positions: IntArray, weights: Weights, config: IndexerConfig, profile: Profile
) -> BoundedIndexer:
    """``project_indexer`` and the worst-case error of computing it as ``profile`` says; arguments are exact as stored."""
    check_indexer_weights(weights, config)
    x, c_q = (Bounded(a, np.zeros_like(a)) for a in (hidden, q_latent))
    q = product("oc,...c->...o", weights["wq_b"], c_q, profile)
    q = q.reshape(*q_latent.shape[:-1], config.index_n_heads, config.index_head_dim)
    k = product("oe,...e->...o", weights["wk"], x, profile)
    k = layer_norm_with_bound(k, weights["k_norm.weight"], weights["k_norm.bias"], config.k_norm_eps, profile)
    values = project_indexer(hidden, q_latent, positions, weights, config)
    return BoundedIndexer(
        values[0],
        _rotated(q, positions, config, profile),
        values[1],
        _rotated(k, positions, config, profile),
        values[2],
        _weights_error(hidden, values[2], weights["weights_proj"], config, profile),
    )


def layer_norm_with_bound(x: Bounded, weight: Array, bias: Array, eps: float, profile: Profile) -> Bounded:
    """LayerNorm in the profile's ``norm`` format, rounded after normalising and after weight and bias.

    Centring is an orthogonal projection, so it makes no error larger in the mean square, and the deviation is 1-Lipschitz
    in x/√n. The variance may be the mean of squares less the square of the mean, which cancels: its error is relative to
    the mean of squares.
    """
    n, u, stored = x.value.shape[-1], format_of(profile.norm).unit_roundoff, format_of(profile.dtype)

    def mean(a: Array) -> Array:
        average: Array = np.mean(a, axis=-1, keepdims=True)
        return average

    centred = x.value - mean(x.value)
    deviation = np.sqrt(mean(centred**2) + eps)
    size = np.abs(x.value) + x.error
    # of the exact mean and deviation of the computed x
    moved = x.error + mean(x.error)
    shift = np.sqrt(mean(x.error**2))
    least = np.maximum(deviation - shift, np.sqrt(eps))
    # of the computed mean, a sum of n numbers, and of the computed variance
    moved = moved + _gamma(n + 1, u) * mean(size)
    variance = _gamma(4 * n + 8, u) * mean(size**2) / least**2
    with np.errstate(divide="ignore"):
        growth = np.expm1(-0.5 * np.log1p(-np.minimum(variance, 1.0)))  # 1/sqrt(1 − variance) − 1
    exact = centred / deviation
    carried = moved / least + np.abs(exact) * shift / least
    relative = growth + (1 + growth) * (_gamma(8, u) + stored.unit_roundoff)
    normalised = carried + relative * (np.abs(exact) + carried) + stored.smallest_subnormal / 2
    error = np.abs(weight) * normalised
    error = error + _gamma(2, u) * (np.abs(weight) * np.abs(exact) + np.abs(bias) + error)
    return rounded(Bounded(layer_norm(x.value, weight, bias, eps), error), profile.dtype)


def _gamma(n: int, u: float) -> float:
    """Of the computed result and of the reference's own float64."""
    return gamma(n, u) + gamma(n, _U64)


def _rotated(x: Bounded, positions: IntArray, config: IndexerConfig, profile: Profile) -> ErrorBound:
    before = ErrorBound({"projection and norm": x.error})
    if config.rope is None:
        return before
    part = x[..., : config.rope_dim]
    _, bound = rope_with_bound(
        part.value, positions, config.rope, profile.rope, output=profile.dtype, x_error=part.error
    )
    rest = x.error[..., config.rope_dim :]
    terms = bound.map(lambda term: np.concatenate([term, np.zeros_like(rest)], axis=-1))
    return terms.plus("projection and norm", np.concatenate([np.zeros_like(part.error), rest], axis=-1))


def _weights_error(hidden: Array, exact: Array, weight: Array, config: IndexerConfig, profile: Profile) -> ErrorBound:
    """Summed as a projection, times a factor or two of three roundoffs each, and never rounded to the dtype."""
    u, e = format_of(profile.softmax).unit_roundoff, hidden.shape[-1]
    gauge = config.weight_scale * np.einsum("oe,...e->...o", np.abs(weight), np.abs(hidden))
    accumulated = (profile.linear.relative_error(e) + gamma(e, _U64)) * gauge
    return ErrorBound(
        {
            "accumulation of the projection": accumulated,
            f"scaling in {profile.softmax}": _gamma(8, u) * (np.abs(exact) + accumulated),
        }
    )
