"""The error rates that a profile implies, and the weighted sums of one row that the error bound of attention is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention_sums import BoundSums
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.typing import Array

_U64 = FORMATS["float64"].unit_roundoff


@dataclass(frozen=True)
class Rates:
    """The relative errors that a profile implies for keys of width d and t keys."""

    profile: Profile
    t: int
    gamma_qk: float  # Γ_QK
    gamma_pv: float  # Γ_PV, with the rescaling of a narrow accumulator
    kappa: float  # κ: scaling and storing a score
    u: float  # roundoff of the softmax arithmetic
    eps: float  # ε: exp, and the rescaling of an online softmax
    rho: float  # row sum and division
    reference: float  # float64 scores' error as a share of this profile's

    @classmethod
    def of(cls, profile: Profile, d: int, t: int) -> Rates:
        u, u_pv = (format_of(name).unit_roundoff for name in (profile.softmax, profile.value.format))
        rescales = math.ceil(t / profile.tile) if profile.tile else 0
        stored = (1 + format_of(profile.score_format).unit_roundoff) ** profile.score_roundings
        gamma_qk = profile.score.relative_error(d + profile.operand_roundings)
        # ε holds roundings of the factor and of the rescaled sum in the softmax's format
        narrower = gamma(rescales, u_pv) if u_pv > u else 0.0
        return cls(
            profile=profile,
            t=t,
            gamma_qk=gamma_qk,
            gamma_pv=(1 + profile.value.relative_error(t)) * (1 + narrower) - 1,
            kappa=stored * (1 + u) ** 3 - 1,
            u=u,
            eps=gamma(profile.exp_error * (1 + rescales) + 2 * rescales, u),
            rho=gamma(t + 4, u),
            reference=min(1.0, max(gamma(d, _U64) / gamma_qk, _U64 / u)),
        )


@dataclass(frozen=True)
class Moments:
    """Weighted sums over the keys of one row, each [..., g, rows, dv or 1]; p̂ are the perturbed weights."""

    out: Array  # o
    shared: Array  # what Δ has in common for all keys
    surplus: Array  # Σ p expm1(Δ)
    moved: Array  # N
    deviation: Array  # Σ p̂ |v − o|
    inherited: Array  # Σ p̂ e_v
    gauge: Array  # Σ p̂ |v̂|
    growth: Array  # p̂_j ≤ growth · p_j (1 + expm1(Δ_j without its shared part))
    inverse: Array  # 1 / Σ of the perturbed weights, relative to the exact ones
    row_total: Array  # Σ exp(s − m)
    shares: Array  # relative error of the sum of the shares of merged parts

    @classmethod
    def of(cls, sums: BoundSums, rates: Rates) -> Moments:
        o = sums.out
        m = finite(sums.max_score)
        split = _split_error(sums, rates)[..., None]
        off = off_maximum(sums.max_abs_score, rates)[..., None]
        shared = rates.u * (m[..., None] + off) + split
        if rates.profile.row_sum == "lse":  # s − lse is rounded, not s − m
            shared = shared + rates.u * np.abs(finite(sums.lse) - m)[..., None]
        # η = stretch · expm1(Δ − shared) + lift
        stretch = np.exp(shared) * (1 + rates.eps)
        lift = np.expm1(shared) * (1 + rates.eps) + rates.eps
        x, x2 = sums.error[..., None], sums.error_square[..., None]
        surplus = np.exp(shared) * x + np.expm1(shared)
        inverse = (1 + surplus) / np.float64(max(1 - rates.eps, 0.0))
        eta_square = stretch**2 * x2 + 2 * stretch * lift * x + lift**2
        slack = gamma(rates.t + 16, _U64)  # the difference of squares is rounded in float64
        spread = np.maximum(sums.out_square - o * o, 0) + slack * (sums.out_square + o * o)
        moved = np.sqrt(eta_square) * np.sqrt(spread)
        deviation = (np.sqrt(spread) + moved) * inverse
        inherited = (sums.v_error + np.sqrt(eta_square * sums.v_error_square)) * inverse
        return cls(
            out=o,
            shared=shared,
            surplus=surplus,
            moved=moved * inverse,
            deviation=deviation,
            inherited=inherited,
            gauge=np.abs(o) + deviation + inherited,
            growth=stretch * inverse,
            inverse=inverse,
            row_total=np.exp(finite(sums.lse) - m)[..., None] * np.exp(-off),
            shares=np.expm1(split) if rates.profile.merge_shares == "unnormalised" else np.zeros_like(split),
        )


def off_maximum(largest: Array, rates: Rates) -> Array:
    """How far the number that is subtracted from the scores may be from their maximum, of which none exceeds ``largest``.

    inf where weights, the largest of which is then no longer 1, may overflow.
    """
    profile = rates.profile
    if profile.maximum is None:
        return np.zeros_like(largest)
    off = 2 * format_of(profile.maximum).unit_roundoff * largest
    of_weights = format_of(profile.probabilities).max_finite / profile.probabilities_scale
    of_their_sum = format_of(profile.softmax).max_finite / max(rates.t, 1)
    narrow = format_of(profile.value.format).max_finite < of_their_sum
    return np.where(off < math.log(2.0 if narrow else min(of_weights, of_their_sum)), off, np.inf)


def _split_error(sums: BoundSums, rates: Rates) -> Array:
    """Error of the weight exp(lse_part − lse) of a part of the keys, as an error of every score in it."""
    u = max(rates.u, format_of(rates.profile.lse).unit_roundoff)
    each = u * (2 * (sums.max_abs_score + math.log(max(rates.t, 1))) + 2 + rates.profile.exp_error)
    # In one after the other the difference, its sigmoid and logsigmoid, and the new LSE are rounded.
    roundings = 4 if rates.profile.merge_shares == "sigmoid" else 1
    return rates.profile.merges(rates.t) * roundings * each


def finite(x: Array) -> Array:
    """x with the -inf of rows without keys replaced by 0."""
    return np.where(x == -np.inf, 0.0, x)
