"""What a subject rounds of its operands before attention begins: the query, and the rows of a quantized cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import format_of, holds, round_to
from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class InheritedError:
    """How far the operands that reach the attention may be from the exact q, k, v, elementwise; shaped as they are."""

    q: Array
    k: Array
    v: Array


SHARED_AXES = {"tensor": None, "token": (-2, -1), "head": (-1,)}
"""Axes of q [..., s, h, d] over which one scale holds."""


def query_error(q: Array, softmax_scale: float, profile: Profile) -> Array:
    """How far the profile's rounding of q [..., s, h, d] may move each element.

    With a scale a = max|q| / largest code, or up to twice that where it is a power of two, an element is code · a, off by
    u |q|, or half the smallest code times a. The quotient, the product and the scale itself are rounded in the softmax's
    format. Without one it is off by u |q| and by half the smallest number, over σ where q is multiplied by σ first.
    """
    if profile.query is None:
        return np.zeros_like(q)
    fmt = format_of(profile.query)
    u = format_of(profile.softmax).unit_roundoff
    least = fmt.smallest_subnormal / 2
    if profile.query_scale == "none":
        factor = abs(softmax_scale) if profile.query_times_scale else 1.0
        error = np.maximum(fmt.unit_roundoff * np.abs(q), least / factor)
        error = np.where(factor * np.abs(q) > fmt.max_finite, np.inf, error)
        if not profile.query_times_scale:
            return np.where(round_to(q, fmt.name) == q, 0.0, error)
    else:
        largest = np.abs(q).max(axis=SHARED_AXES[profile.query_scale], keepdims=True, initial=0.0)
        error = np.maximum(fmt.unit_roundoff * np.abs(q), least * 2 * largest / fmt.max_finite)
    rounded: Array = error + 4 * u * (np.abs(q) + error)
    return rounded


def without_query(profile: Profile) -> Profile:
    """The profile of what follows once q is rounded."""
    return replace(profile, query=None, query_scale="none", query_times_scale=False)


def with_roundings(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float,
    inherited: InheritedError | None,
    profile: Profile,
    of_query: Array | None = None,
) -> InheritedError | None:
    """``inherited`` and what rounding the query, and the dequantised rows of the cache, adds.

    Args:
        of_query: what rounding the query adds; None where it follows from these arguments.
    """
    if profile.query is not None:
        inherited = inherited or InheritedError(np.zeros_like(q), np.zeros_like(k), np.zeros_like(v))
        rounding = query_error(np.abs(q) + inherited.q, softmax_scale, profile) if of_query is None else of_query
        inherited = replace(inherited, q=inherited.q + rounding)
    if profile.cache_dequantised is None:
        return inherited
    fmt = format_of(profile.cache_dequantised)
    # code times scale is rounded to the arithmetic's format first
    rate = fmt.unit_roundoff + 2 * format_of(profile.softmax).unit_roundoff

    def error(x: Array) -> Array:
        if holds(x, fmt.name):
            return np.zeros_like(x)
        exact = round_to(x, fmt.name) == x
        return np.where(exact, 0.0, rate * np.abs(x) + fmt.smallest_subnormal / 2)

    of_k, width = error(k), v.shape[-1]
    same = v.shape[:-1] == k.shape[:-1] and np.array_equal(v, k[..., :width])  # as in the absorbed form
    of_v = of_k[..., :width] if same else error(v)
    if not (of_k.any() or of_v.any()):  # as where the cache holds the format itself; bounds without errors cost half
        return inherited
    if inherited is None:
        return InheritedError(np.zeros_like(q), of_k, of_v)
    return InheritedError(inherited.q, inherited.k + of_k, inherited.v + of_v)
