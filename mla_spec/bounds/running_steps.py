"""The steps of a layer between its projections and attention, each with its worst-case error; forwards only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.running import Bounded, multiply, rounded
from mla_spec.reference.config import Llama4Scaling, RopeConfig
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.mla import rms_norm, sigmoid
from mla_spec.reference.typing import Array, IntArray

_U64 = FORMATS["float64"].unit_roundoff


@dataclass(frozen=True)
class BoundedRms:
    """The rms of x [..., n] over its last axis, [..., 1]. It is 1-Lipschitz in x/√n.

    Attributes:
        rms: the exact one.
        shift: how far a computed one may be from it; at most the rms, as a larger one only makes x / rms smaller.
        least: the smallest that it may be.
    """

    rms: Array
    shift: Array
    least: Array

    @classmethod
    def of(cls, x: Bounded, eps: float) -> BoundedRms:
        rms = np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
        shift = np.minimum(np.sqrt(np.mean(x.error**2, axis=-1, keepdims=True)), rms)
        return cls(rms, shift, np.maximum(rms - shift, np.sqrt(eps)))

    def divide(self, x: Bounded) -> Array:
        """The error of x / rms, the division itself being exact."""
        error: Array = x.error / self.least + np.abs(x.value) * self.shift / (self.rms * self.least)
        return error


def norm_error(n: int, profile: Profile) -> float:
    """The relative error of one result of RMSNorm over n elements, computed and once stored in the profile's dtype."""
    u = format_of(profile.norm).unit_roundoff
    return gamma(n + 8, u) + gamma(n + 8, _U64) + format_of(profile.dtype).unit_roundoff


def bounded_rms_norm(x: Bounded, weight: Array, eps: float, profile: Profile) -> Bounded:
    """RMSNorm, rounded after normalising and after the weight."""
    value = rms_norm(x.value, weight, eps)
    carried = np.abs(weight) * BoundedRms.of(x, eps).divide(x)
    relative, stored = norm_error(x.value.shape[-1], profile), format_of(profile.dtype)
    error = carried + relative * (np.abs(value) + carried) + np.abs(weight) * stored.smallest_subnormal / 2
    return rounded(Bounded(value, error), profile.dtype)


def bounded_sigmoid(g: Bounded, profile: Profile) -> Bounded:
    """sigmoid(g), stored.

    The sigmoid is monotone, so that an error of g moves it no further than at g ± e. Computing it takes exp of −g, perhaps as a
    power of 2 whose exponent is rounded, which counts by 1 − sigmoid(g), an addition and a division.
    """
    u, value = format_of(profile.softmax).unit_roundoff, sigmoid(g.value)
    moved = np.maximum(sigmoid(g.value + g.error) - value, value - sigmoid(g.value - g.error))
    size = np.abs(g.value) + g.error
    taken = sigmoid(g.error - g.value)  # at most, of 1
    relative = (1 + 4 * u) / np.maximum(1 - taken * np.expm1(u * (size + profile.exp_error)), 0.0) - 1
    return rounded(Bounded(value, moved + (relative + 8 * _U64) * (value + moved)), profile.dtype)


def spread(gate: Bounded, width: int) -> Bounded:
    """A gate of heads or elements [..., h or h·v] as one of elements, [..., h·v = width]."""
    of_each = width // gate.value.shape[-1]
    assert of_each * gate.value.shape[-1] == width
    return Bounded(*(np.repeat(x, of_each, axis=-1) for x in (gate.value, gate.error)))


def bounded_gate(out: Bounded, g: Bounded, profile: Profile) -> Bounded:
    """out [..., h·v] times sigmoid(g), g having a number for each head or for each element; both are stored."""
    gate = spread(bounded_sigmoid(g, profile), out.value.shape[-1])
    return rounded(multiply(out, gate, format_of(profile.softmax).unit_roundoff), profile.dtype)


def foldable(x: Bounded, factor: float, dtype: str) -> Bounded:
    """A normalised latent before it is multiplied by ``factor``, which may be folded into the norm's weight instead.

    Folding rounds the product with the weight, and then the latent at its final size (vLLM, models/longcat_flash.py);
    roundoffs relative to x, unlike halves of an ulp, bound the latter at either size.
    """
    if factor == 1.0:
        return x
    u, least = FORMATS[dtype].unit_roundoff, FORMATS[dtype].smallest_subnormal / 2
    return Bounded(x.value, x.error + 2 * u * (np.abs(x.value) + x.error) + least * max(1.0, 1 / factor))


def scaled(x: Bounded, factor: Array | float, relative: float, dtype: str) -> Bounded:
    """x times a factor that is computed to the error ``relative``; a factor of 1 rounds nothing."""
    value, error = factor * x.value, factor * x.error
    error = error + relative * (np.abs(value) + error)
    stored = rounded(Bounded(value, error), dtype)
    one = np.asarray(factor) == 1.0
    return Bounded(value, np.where(one, x.error, stored.error))


def scaled_by_config(x: Bounded, factor: float, profile: Profile) -> Bounded:
    """x times a factor that the configuration states, rounded as it is stated and as it multiplies."""
    return scaled(x, factor, 2 * format_of(profile.norm).unit_roundoff + 3 * _U64, profile.dtype)


def temperature(q: Bounded, positions: IntArray, scaling: Llama4Scaling | None, profile: Profile) -> Bounded:
    """Queries [..., s, h, ·] times the factor of their position, which is itself rounded to the dtype (transformers)."""
    if scaling is None:
        return q
    factor = scaling.factor(positions)[..., None, None]  # [..., s, 1, 1]
    u = format_of(profile.rope.angle).unit_roundoff
    # beta and each of ln, product and sum are rounded, all of them positive; the reference's own likewise.
    relative = 8 * (u + _U64) + format_of(profile.dtype).unit_roundoff
    return scaled(q, factor, relative, profile.dtype)


def rotated(x: Bounded, positions: IntArray, rope: RopeConfig | None, profile: Profile) -> Bounded:
    """``apply_rope``; x itself where nothing is rotated."""
    if rope is None:
        return x
    value, bound = rope_with_bound(x.value, positions, rope, profile.rope, output=profile.dtype, x_error=x.error)
    return Bounded(value, bound.total)
