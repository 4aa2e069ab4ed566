"""The worst-case error of the gradients of a merge, by running error analysis of the backward pass.

With p_i = exp(L_i − lse), dp_i = Σ_d dO_d O_id and D = Σ_i p_i dp_i,

    dO_i = p_i dO,    dL_i = p_i (dp_i − D + dlse).

Two kinds of implementation are covered at once, as in ``attention_backward``. Automatic differentiation of plain steps has D
from the shares, which it may have formed twice, and subtracts the largest LSE. A fused kernel forms the shares anew from the
LSE as it was stored, and D from the output as it was stored.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import overflowed
from mla_spec.bounds.merge import Parts, merge_with_bound
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.running import Bounded, multiply, perhaps_stored, stored
from mla_spec.reference.formats import FORMATS
from mla_spec.reference.merge import merge_backward, part_columns, part_products
from mla_spec.reference.typing import Array, BoolArray

_U64 = FORMATS["float64"].unit_roundoff
_STEPS = 12
"""Roundings of an element of dL that are in no sum, those of log2(e) and ln 2 on the way back among them."""


@np.errstate(over="ignore", invalid="ignore")
def merge_backward_with_bound(
    outs: Array,
    lses: Array,
    out_grad: Array,
    profile: Profile,
    *,
    lse_grad: Array | None = None,
    out_errors: Array | None = None,
    lse_errors: Array | None = None,
) -> tuple[Bounded, Bounded]:
    """``merge_backward`` and its worst-case error: gradients of the outs in the dtype, of the LSEs in float32 or float64.

    Arguments and errors are those of ``merge_backward``; ``out_errors`` and ``lse_errors`` are those of ``merge_with_bound``.
    Errors are 0 in parts without keys.
    """
    outs_grad, lses_grad = merge_backward(outs, lses, out_grad, lse_grad)
    parts = Parts.of(outs, lses, out_errors, lse_errors)
    unrounded = replace(profile, output="float64", output_rounding="nearest")
    merged = merge_with_bound(outs, lses, unrounded, out_errors=out_errors, lse_errors=lse_errors)
    fmt = FORMATS[profile.softmax]
    p = _shares(parts, merged.lse_error.total, profile)
    do = multiply(p.map(part_columns), Bounded(out_grad, np.zeros(())), fmt.unit_roundoff)
    dp = _products(out_grad, Bounded(parts.exact_outs, parts.moved_outs), fmt.unit_roundoff)
    out = perhaps_stored(Bounded(merged.out, merged.out_error.total), profile.output, profile.output_rounding)
    mean = _mean(p, dp, _products(out_grad, out, fmt.unit_roundoff).error, fmt.unit_roundoff)
    dlse = np.zeros(mean.value.shape) if lse_grad is None else lse_grad
    do = Bounded(outs_grad, overflowed(do.error + fmt.smallest_normal))
    dl = Bounded(lses_grad, _error_of_lses(parts, p, dp, mean, np.abs(dlse), profile))
    return (
        _present(stored(do, profile.dtype, profile.output_rounding), part_columns(parts.present)),
        _present(stored(dl, "float64" if profile.dtype == "float64" else "float32"), parts.present),
    )


def _shares(parts: Parts, lse_error: Array, profile: Profile) -> Bounded:
    """p, formed from the LSE itself, which may have been stored, or divided by the sum of all shares."""
    fmt = FORMATS[profile.softmax]
    exponent = parts.exponent_error(fmt.unit_roundoff) + parts.exponent_error(_U64) + parts.moved_lses + lse_error
    relative = (profile.exp_error + 3) * (fmt.unit_roundoff + _U64)
    growth = np.expm1(exponent) * (1 + relative) + relative
    return _present(Bounded(parts.exact_shares, parts.exact_shares * growth + fmt.smallest_normal), parts.present)


def _products(out_grad: Array, outs: Bounded, u: float) -> Bounded:
    """Σ_d dO_d O_d, [..., h, s] of outs [..., s, h, dv]."""
    size, n = np.abs(out_grad), out_grad.shape[-1]
    carried, gauge = (part_products(size, x) for x in (outs.error, np.abs(outs.value) + outs.error))
    return Bounded(part_products(out_grad, outs.value), carried + (gamma(n + 2, u) + gamma(n + 2, _U64)) * gauge)


def _mean(p: Bounded, dp: Bounded, error_of_out: Array, u: float) -> Bounded:
    """D, [..., h, s]: Σ_i p_i dp_i, or Σ_d dO_d out_d with an error of ``error_of_out``; the larger error counts."""
    each, n = multiply(p, dp, u), len(p.value)
    gauge = (np.abs(each.value) + each.error).sum(axis=0)
    error = each.error.sum(axis=0) + (gamma(n + 2, u) + gamma(n + 2, _U64)) * gauge
    return Bounded(each.value.sum(axis=0), np.maximum(error, error_of_out))


def _error_of_lses(parts: Parts, p: Bounded, dp: Bounded, mean: Bounded, dlse: Array, profile: Profile) -> Array:
    """The error of dL before it is stored, [parts, ..., h, s], with the magnitude ``dlse`` of the LSE's gradient."""
    fmt, n = FORMATS[profile.softmax], len(p.value)
    u, weight = fmt.unit_roundoff, p.value + p.error
    products = np.abs(dp.value) + dp.error
    size = products + (weight * products).sum(axis=0) + mean.error + dlse  # of dp, D and dlse
    # p_i dp_i and p_i (D − dlse) may come from shares formed twice, whose errors then do not cancel.
    error = p.error * size + p.value * (dp.error + mean.error) + gamma(_STEPS, u + _U64) * weight * size
    # Plain steps subtract the largest LSE, whose own gradient is 0 but for the rounding of sums.
    of_largest = gamma(2 * n + _STEPS, u) * (weight * size).sum(axis=0)
    error = error + np.where(_may_be_largest(parts, u), of_largest, 0.0)
    return overflowed(error + fmt.smallest_normal * (1 + size))


def _may_be_largest(parts: Parts, u: float) -> BoolArray:
    """Parts whose LSE, as it is computed, may be the largest."""
    below, error = parts.exact_lses - parts.exact_lse, parts.moved_lses + parts.exponent_error(u)
    return np.asarray(below + error >= (below - error).max(axis=0, initial=-np.inf))


def _present(x: Bounded, present: BoolArray) -> Bounded:
    """x where a part has keys, else exactly 0."""
    return Bounded(np.where(present, x.value, 0.0), np.where(present, x.error, 0.0))
