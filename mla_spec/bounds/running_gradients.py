"""The steps of a layer's backward pass around attention, each with its worst-case error.

Every gradient may be rounded to the profile's dtype or not, whichever is worse. Sums over tokens and heads
are accumulated as a projection is, and what each sequence or head adds to them may be rounded first: that is what automatic
differentiation does where an operand was broadcast.
"""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound, half_ulp
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.running import (
    Bounded,
    matmul,
    multiply,
    perhaps_stored,
)
from mla_spec.bounds.running_steps import BoundedRms, bounded_sigmoid, spread
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.typing import Array

_U64 = FORMATS["float64"].unit_roundoff

Gradient = tuple[Array, ErrorBound]
"""A gradient that is an output of the backward pass, and its bound."""


def added(*parts: Bounded, profile: Profile) -> Bounded:
    """The sum of the gradients of several uses of one operand, added in any order and rounded on the way."""
    value, error = (np.sum([getattr(x, name) for x in parts], axis=0) for name in ("value", "error"))
    size = np.sum([np.abs(x.value) + x.error for x in parts], axis=0)  # of no sum on the way more
    between = (len(parts) - 2) * (half_ulp(size, profile.dtype) + _U64 * size)
    return perhaps_stored(Bounded(value, error + between + _U64 * np.abs(value)), profile.dtype)


def summed_over_heads(x: Bounded, profile: Profile) -> Bounded:
    """[..., i] of the gradients [..., h, i] that the heads, or other users, of one operand give it, as they may be stored."""
    heads = x.value.shape[-2]
    rate = profile.linear.relative_error(heads) + gamma(heads, _U64)
    error = x.error.sum(axis=-2) + rate * (np.abs(x.value) + x.error).sum(axis=-2)
    return perhaps_stored(Bounded(x.value.sum(axis=-2), error), profile.dtype)


def summed_over_tokens(each: Bounded, profile: Profile) -> Gradient:
    """[n] of the gradients [..., s, n] that the tokens of each sequence give a weight that all share."""
    rate = profile.linear.relative_error(each.value[..., 0].size) + gamma(each.value.size, _U64)
    error = (each.error + rate * (np.abs(each.value) + each.error)).sum(axis=-2)
    return _over_sequences(Bounded(each.value.sum(axis=-2), error), 1, profile)


def gate_gradients(out: Bounded, g: Bounded, grad: Bounded, profile: Profile) -> tuple[Bounded, Bounded]:
    """(∂out [..., h·v], ∂g [..., h or h·v]) of out · y with y = sigmoid(g), given the gradient of the product.

    ∂g = ∂y · y (1 − y) in any order; 1 − y has the error of y as it was stored, however small it is.
    """
    u, width = format_of(profile.softmax).unit_roundoff, out.value.shape[-1]
    y, dtype = bounded_sigmoid(g, profile), profile.dtype
    y_grad = perhaps_stored(multiply(grad, out, u), dtype)
    if g.value.shape[-1] < width:
        by_head = y_grad.map(lambda x: np.swapaxes(x.reshape(*g.value.shape, -1), -1, -2))  # [..., v, h]
        y_grad = summed_over_heads(by_head, profile)
    left = perhaps_stored(Bounded(1 - y.value, y.error + u), dtype)
    slope = perhaps_stored(multiply(y, left, u), dtype)
    return (
        perhaps_stored(multiply(grad, spread(y, width), u), dtype),
        perhaps_stored(multiply(y_grad, slope, 2 * u), dtype),
    )


def weight_gradient(grad: Bounded, x: Bounded, profile: Profile) -> Gradient:
    """∂W [o, i] of y = W x: Σ over tokens of ∂y xᵀ, for ∂y [..., s, o] and x [..., s, i] of each sequence."""
    tokens = grad.value[..., 0].size
    transposed = Bounded(np.swapaxes(grad.value, -1, -2), np.swapaxes(grad.error, -1, -2))
    return _over_sequences(matmul(transposed, x, profile.linear.relative_error(tokens)), 2, profile)


def weight_gradient_by_head(grad: Bounded, x: Bounded, profile: Profile) -> Gradient:
    """∂W [h, o, i] of y = W x of each head, for ∂y [..., s, h, o] and x [..., s, h or 1, i]."""
    tokens = grad.value[..., 0, 0].size
    by_head = Bounded(*(np.moveaxis(a, -3, -1) for a in (grad.value, grad.error)))  # [..., h, o, s]
    rows = Bounded(*(np.moveaxis(a, -3, -2) for a in (x.value, x.error)))  # [..., h or 1, s, i]
    return _over_sequences(matmul(by_head, rows, profile.linear.relative_error(tokens)), 3, profile)


def _over_sequences(parts: Bounded, axes: int, profile: Profile) -> Gradient:
    """The sum over all but the last ``axes`` axes; each part, and each sum of several, may be rounded."""
    shape = parts.value.shape[-axes:]
    parts = Bounded(parts.value.reshape(-1, *shape), parts.error.reshape(-1, *shape))
    value, carried = parts.value.sum(axis=0), parts.error.sum(axis=0)
    apart = np.zeros(shape)
    if len(parts.value) > 1:
        each = perhaps_stored(parts, profile.dtype)
        largest = (np.abs(each.value) + each.error).sum(axis=0)
        between = len(parts.value) - 2
        grown = largest * (1 + format_of(profile.dtype).unit_roundoff) ** between  # by the roundings before
        sums = between * half_ulp(grown, profile.dtype) + gamma(len(parts.value), _U64) * largest
        apart = each.error.sum(axis=0) - carried + sums
    total = Bounded(value, carried + apart)
    # A term of the bound, which adds up to the whole but for the roundings of its own sum.
    rounding = (1 + 8 * _U64) * perhaps_stored(total, profile.dtype).error - total.error
    return value, ErrorBound(
        {
            "error of earlier stages, accumulation over tokens": carried,
            "sequences rounded before they are added": apart,
            f"rounding to {profile.dtype}": rounding,
        }
    )


def rms_norm_gradients(
    x: Bounded, weight: Array, eps: float, grad: Bounded, profile: Profile
) -> tuple[Bounded, Gradient]:
    """(∂x, ∂weight) of ``rms_norm``, as in ``layer_backward.rms_norm_backward``.

    ∂x = (y − x̂ · mean(x̂ · y)) / rms with y = weight·∂: any order of these products and divisions is covered.
    """
    n, u = x.value.shape[-1], format_of(profile.norm).unit_roundoff
    rms = BoundedRms.of(x, eps)
    rate = gamma(3 * n + 16, u) + gamma(3 * n + 16, _U64)
    unit = Bounded(x.value / rms.rms, rms.divide(x))
    unit = perhaps_stored(Bounded(unit.value, unit.error + rate * (np.abs(unit.value) + unit.error)), profile.dtype)
    each = perhaps_stored(multiply(grad, unit, u), profile.dtype)  # [..., s, n]
    y = perhaps_stored(multiply(grad, Bounded(weight, np.zeros_like(weight)), u), profile.dtype)
    along = multiply(unit, y, 0.0)
    size = np.mean(np.abs(along.value) + along.error, axis=-1, keepdims=True)
    mean = Bounded(along.value.mean(axis=-1, keepdims=True), along.error.mean(axis=-1, keepdims=True))
    parallel = multiply(unit, mean, 0.0)
    inner = Bounded(y.value - parallel.value, y.error + parallel.error)
    error = (
        rms.divide(inner) + rate * (np.abs(y.value) + y.error + (np.abs(unit.value) + unit.error) * size) / rms.least
    )
    return perhaps_stored(Bounded(inner.value / rms.rms, error), profile.dtype), summed_over_tokens(each, profile)
