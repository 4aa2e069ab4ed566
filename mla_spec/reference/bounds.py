"""The error of attention computed as a profile says, next to the exact result.

Per row and value dim, with σ the softmax scale, s_j = σ q·k_j, m = max s, p = softmax(s), o = Σ p_j v_j, all exact:

    G_j = σ Σ_i |q_i| |k_ji|                                gauge of a score
    Δ_j = Γ_QK G_j + κ |s_j| + u (m − s_j) + inherited      error of a score
    η_j = expm1(Δ_j)(1 + ε) + ε                             relative error of a weight exp(s_j − m)
    η̄   = Σ p_j η_j
    N   = Σ p_j η_j |v_j − o| · (1 + Σ p_j expm1(Δ_j))/(1 − ε)

N is the effect on o: softmax is shift invariant, hence v − o, and Σ p_j exp(−Δ_j) ≥ 1/(1 + Σ p_j expm1(Δ_j)), so it stays
finite for errors of any size. Sums of |v − o| have no product form; by Cauchy-Schwarz Σ p η |v − o| is at most
sqrt(Σ p η²) · sqrt(Σ p (v − o)²), which needs the products of p with v and v² alone.

Every inequality is worst case: a result outside the bound proves that the arithmetic is not what the profile declares.
Where the roundings of many weights to a narrow format spread, their sum is far below the worst case; ``probable_error`` says
how far it stays but with the probability ``FAILURE_PROBABILITY`` (Hoeffding's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.attention import (
    SoftmaxBlock,
    heads_to_rows,
    key_block,
    rows_to_heads,
    rows_to_lse,
    softmax_blocks,
)
from mla_spec.reference.bound_sums import BoundSums, bound_sums
from mla_spec.reference.error_bound import ErrorBound, half_ulp
from mla_spec.reference.formats import FORMATS, format_of, round_to
from mla_spec.reference.profile import Profile, gamma
from mla_spec.reference.typing import Array, IntArray

_U64 = FORMATS["float64"].unit_roundoff

FAILURE_PROBABILITY = 1e-9
"""That any element of one call lies outside its probable error."""

SPREAD = 8.0
"""Least exp(entropy) of the distribution of weight over distinct values of P for which roundings count as independent."""


@dataclass(frozen=True)
class BoundedAttention:
    """Exact attention and how far an implementation may be from it.

    Attributes:
        out, out_error: [..., s, h, dv].
        lse, lse_error: [..., h, s].
        out_error_probable, lse_error_probable: at most the worst case; the same unless asked for.

    All errors are 0 in rows without keys, whose value is exact.
    """

    out: Array
    out_error: ErrorBound
    lse: Array
    lse_error: ErrorBound
    out_error_probable: ErrorBound
    lse_error_probable: ErrorBound


@dataclass(frozen=True)
class InheritedError:
    """How far the operands that reach the attention may be from the exact q, k, v, elementwise; shaped as they are."""

    q: Array
    k: Array
    v: Array


def attention_with_bound(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    profile: Profile,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    inherited: InheritedError | None = None,
    probable: bool = False,
    block_size: int = 512,
) -> BoundedAttention:
    """``attention`` and the error of computing it as ``profile`` says.

    Arguments and errors are those of ``attention``; ``inherited`` is what earlier stages may have changed in q, k and v;
    ``probable`` asks for the probable error beside the worst case. Both cover the reference's own rounding too. Rows of k
    and v that no query sees must be finite.
    """
    inherited = _with_dequantisation(q, k, v, inherited, profile)
    blocks = softmax_blocks(
        q, k, v, softmax_scale=softmax_scale, cache_seqlens=cache_seqlens, causal=causal, block_size=block_size
    )
    u_p = format_of(profile.probabilities).unit_roundoff
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rates = _Rates.of(profile, q.shape[-1], k.shape[-3])
        sums = bound_sums(
            blocks,
            _score_error(q, k, inherited, softmax_scale, rates),
            None if inherited is None else inherited.v,
            2 * u_p if probable else None,
        )
        moments = _Moments.of(sums, rates)
        size = v if inherited is None else np.abs(v) + inherited.v
        # Σ_j |v_j| ≤ sqrt(t Σ_j v_j²), which needs no copy of v
        column = np.sqrt(k.shape[-3] * np.einsum("...tgd,...tgd->...gd", size, size))[..., None, :]  # [..., g, 1, dv]
        rounded, rounded_sum = _rounded_p(moments, rates, column)
        errors = [_out_error(moments, rates, rounded), _lse_error(sums, moments, rates, rounded_sum)]
        if probable:
            likely = _Likely.of(sums, moments, rates, k)
            errors += [
                _out_error(moments, rates, np.minimum(rounded, likely.rounded_p(moments, rates, column))),
                _lse_error(sums, moments, rates, np.minimum(rounded_sum, likely.rounded_sum(moments, rates))),
            ]
    seen = ~np.isneginf(sums.max_score)
    s, h = q.shape[-3:-1]
    out_errors = [e.map(lambda x: rows_to_heads(np.where(seen[..., None], x, 0.0), s, h)) for e in errors[::2]]
    lse_errors = [e.map(lambda x: rows_to_lse(np.where(seen, x, 0.0), s, h)) for e in errors[1::2]]
    return BoundedAttention(
        out=rows_to_heads(moments.out, s, h),
        out_error=out_errors[0],
        lse=rows_to_lse(sums.lse, s, h),
        lse_error=lse_errors[0],
        out_error_probable=out_errors[-1],
        lse_error_probable=lse_errors[-1],
    )


def _with_dequantisation(
    q: Array, k: Array, v: Array, inherited: InheritedError | None, profile: Profile
) -> InheritedError | None:
    """``inherited`` and what rounding the dequantised rows of the cache to the profile's format adds."""
    if profile.cache_dequantised is None:
        return inherited
    fmt = format_of(profile.cache_dequantised)
    # code times scale is rounded to the arithmetic's format first
    rate = fmt.unit_roundoff + 2 * format_of(profile.softmax).unit_roundoff

    def error(x: Array) -> Array:
        exact = round_to(x, fmt.name) == x
        return np.where(exact, 0.0, rate * np.abs(x) + fmt.smallest_subnormal / 2)

    if inherited is None:
        return InheritedError(np.zeros_like(q), error(k), error(v))
    return InheritedError(inherited.q, inherited.k + error(k), inherited.v + error(v))


@dataclass(frozen=True)
class _Rates:
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
    def of(cls, profile: Profile, d: int, t: int) -> _Rates:
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
            eps=(profile.exp_error * (1 + rescales) + 2 * rescales) * u,
            rho=gamma(t + 4, u),
            reference=min(1.0, max(gamma(d, _U64) / gamma_qk, _U64 / u)),
        )


def _score_error(
    q: Array, k: Array, inherited: InheritedError | None, softmax_scale: float, rates: _Rates
) -> Callable[[SoftmaxBlock], Array]:
    """Δ without its part u·m that all keys of a row share."""
    groups = k.shape[-2]
    q_size = np.abs(q) if inherited is None else np.abs(q) + inherited.q
    q_rows = heads_to_rows(q_size * softmax_scale, groups)  # [..., g, rows, d]
    if inherited is not None:
        # σ (e_q·(|k| + e_k) + |q|·e_k) as one product of twice the width
        q_pair = np.concatenate([inherited.q, np.abs(q)], axis=-1) * softmax_scale
        pair_rows = heads_to_rows(q_pair, groups)

    def error(block: SoftmaxBlock) -> Array:
        k_size = np.abs(key_block(k, block.keys))
        k_error = None if inherited is None else key_block(inherited.k, block.keys)
        if k_error is not None:
            k_size = k_size + k_error
        delta = q_rows @ np.swapaxes(k_size, -1, -2)  # [..., g, rows, block]: the gauge G
        delta *= rates.gamma_qk * (1 + rates.kappa)
        delta += rates.kappa * np.abs(block.scores) - rates.u * block.scores
        if k_error is not None:
            k_pair = np.concatenate([k_size, k_error], axis=-1)
            delta += (1 + rates.kappa) * (pair_rows @ np.swapaxes(k_pair, -1, -2))
        return delta

    return error


@dataclass(frozen=True)
class _Moments:
    """Weighted sums over the keys of one row, each [..., g, rows, dv or 1]; p̂ are the perturbed weights."""

    out: Array  # o
    eta: Array  # η̄
    moved: Array  # N
    deviation: Array  # Σ p̂ |v − o|
    inherited: Array  # Σ p̂ e_v
    gauge: Array  # Σ p̂ |v̂|
    growth: Array  # p̂_j ≤ growth · p_j (1 + expm1(Δ_j without its shared part))
    inverse: Array  # 1 / Σ of the perturbed weights, relative to the exact ones
    row_total: Array  # Σ exp(s − m)

    @classmethod
    def of(cls, sums: BoundSums, rates: _Rates) -> _Moments:
        o = sums.out
        m = _finite(sums.max_score)
        shared = (rates.u * m + _split_error(sums, rates))[..., None]
        # η = stretch · expm1(Δ − shared) + lift
        stretch = np.exp(shared) * (1 + rates.eps)
        lift = np.expm1(shared) * (1 + rates.eps) + rates.eps
        x, x2 = sums.error[..., None], sums.error_square[..., None]
        inverse = (1 + np.maximum(np.exp(shared) * x + np.expm1(shared), 0)) / (1 - rates.eps)
        eta = np.maximum(stretch * x + lift, 0)
        slack = gamma(rates.t + 16, _U64)  # the differences of squares below are rounded in float64
        eta_square = np.maximum(stretch**2 * x2 + 2 * stretch * lift * x + lift**2, 0)
        eta_square = eta_square + slack * (stretch**2 * x2 + 2 * np.abs(stretch * lift) * x + lift**2)
        spread = np.maximum(sums.out_square - o * o, 0) + slack * (sums.out_square + o * o)
        moved = np.sqrt(eta_square) * np.sqrt(spread)
        deviation = (np.sqrt(spread) + moved) * inverse
        inherited = (sums.v_error + np.sqrt(eta_square * sums.v_error_square)) * inverse
        return cls(
            out=o,
            eta=eta,
            moved=moved * inverse,
            deviation=deviation,
            inherited=inherited,
            gauge=np.abs(o) + deviation + inherited,
            growth=stretch * inverse,
            inverse=inverse,
            row_total=np.exp(np.clip(_finite(sums.lse) - m, 0, 700))[..., None],
        )


def _split_error(sums: BoundSums, rates: _Rates) -> Array:
    """Error of the weight exp(lse_part − lse) of a part of the keys, as an error of every score in it."""
    u = max(rates.u, format_of(rates.profile.lse).unit_roundoff)
    each = u * (2 * (sums.max_abs_score + math.log(max(rates.t, 1))) + 2)
    return rates.profile.merges(rates.t) * each


def _underflow(moments: _Moments, rates: _Rates) -> Array:
    """What one weight may lose below the normal range of the format of P, relative to the row sum."""
    p = format_of(rates.profile.probabilities)
    # Hardware may flush subnormals of wide formats; those of narrow ones are in reach, and kept.
    lost = p.smallest_subnormal / 2 if p.min_exponent > -100 else p.smallest_normal
    return lost * moments.inverse / moments.row_total


def _rounded_p(moments: _Moments, rates: _Rates, column: Array) -> tuple[Array, Array]:
    """R: what rounding P moves the output by, and, relatively, the row sum where it adds the rounded weights.

    ``column`` is Σ_j |v_j|, for the underflow of weights.
    """
    u_p = format_of(rates.profile.probabilities).unit_roundoff
    lost = _underflow(moments, rates)
    if rates.profile.row_sum == "unrounded":
        return u_p * moments.gauge + lost * column, np.zeros_like(lost)
    moved = u_p / (1 - u_p) * (moments.deviation + moments.moved)
    moved = moved + lost * (column + rates.t * (np.abs(moments.out) + moments.moved))
    return moved, u_p + rates.t * lost


@dataclass(frozen=True)
class _Likely:
    """What independent roundings of the weights add up to, but with the probability ``FAILURE_PROBABILITY``.

    A sum of independent errors of at most u x_j exceeds sqrt(2 ln(2/δ)) · u · sqrt(Σ x_j²) with probability δ (Hoeffding).
    Equal keys have equal weights and errors, so they count as often as they occur. The rounding of a weight is taken as
    independent of the others' where the weight of the row spreads over ``SPREAD`` distinct values of P.
    """

    weights: Array  # λ sqrt(Σ p̂²), [..., g, rows, 1]; inf where the roundings are not independent
    values: Array  # λ sqrt(Σ p̂² v̂²), [..., g, rows, dv]

    @classmethod
    def of(cls, sums: BoundSums, moments: _Moments, rates: _Rates, k: Array) -> _Likely:
        judged = max(2, moments.out.size)
        tail = math.sqrt(2 * math.log(2 * judged / FAILURE_PROBABILITY))
        mass = np.where(sums.cells > 0, sums.cells, 1.0)
        spread = np.exp(-(mass * np.log(mass)).sum(axis=-1)) >= SPREAD  # [..., g, rows]
        repeats = np.sqrt(_repeats(k))[..., None]  # [..., g, 1]
        rate = np.where(spread, tail * repeats, np.inf)[..., None] * moments.growth
        return cls(rate * np.sqrt(sums.weight_square)[..., None], rate * np.sqrt(sums.value_square))

    def rounded_p(self, moments: _Moments, rates: _Rates, column: Array) -> Array:
        """R, for ``_rounded_p``."""
        u_p = format_of(rates.profile.probabilities).unit_roundoff
        lost = _underflow(moments, rates)
        if rates.profile.row_sum == "unrounded":
            return u_p * self.values + lost * column
        moved = u_p / (1 - u_p) * (self.values + (np.abs(moments.out) + moments.moved) * self.weights)
        return moved + lost * (column + rates.t * (np.abs(moments.out) + moments.moved))

    def rounded_sum(self, moments: _Moments, rates: _Rates) -> Array:
        """The relative error of a sum of rounded weights."""
        u_p = format_of(rates.profile.probabilities).unit_roundoff
        return u_p * self.weights + rates.t * _underflow(moments, rates)


def _repeats(k: Array) -> Array:
    """How often the most frequent key of [..., t, g, d] occurs, [..., g]."""
    # Equal keys have equal sums; unequal ones may too, which only makes the count larger.
    key = np.sort(np.moveaxis(k, -2, -3).sum(axis=-1), axis=-1)  # [..., g, t]
    index = np.arange(key.shape[-1])
    starts = np.concatenate([np.ones_like(key[..., :1], dtype=bool), key[..., 1:] != key[..., :-1]], axis=-1)
    runs = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1) + 1
    longest: Array = runs.max(axis=-1, initial=1).astype(np.float64)
    return longest


def _out_error(moments: _Moments, rates: _Rates, rounded_p: Array) -> ErrorBound:
    """E_d."""
    profile, o = rates.profile, np.abs(moments.out)
    u_p = format_of(profile.probabilities).unit_roundoff
    accumulated = (1 + u_p) * rates.gamma_pv * moments.gauge
    before_merge = moments.moved + moments.inherited + rounded_p + accumulated
    # Each merge stores the parts and forms a weighted sum of two: two products and an addition.
    u_merge = format_of(profile.split_format).unit_roundoff + 3 * rates.u
    merged = profile.merges(rates.t) * u_merge * (moments.gauge + before_merge)
    before_division = before_merge + merged
    divided = rates.rho / (1 - rates.rho) * (o + before_division)
    doubled = 2 if profile.output_rounding == "truncate" else 1
    return ErrorBound(
        {
            "error of the scores": moments.moved,
            "error of the operands": moments.inherited,
            f"rounding of P to {profile.probabilities}": rounded_p,
            "accumulation of P·V": accumulated,
            "merging of parts by LSE": merged,
            "row sum and division": divided,
            f"rounding of the output to {profile.output}": doubled
            * half_ulp(o + before_division + divided, profile.output),
            "the reference's own float64": rates.reference * moments.moved + gamma(rates.t + 16, _U64) * moments.gauge,
        }
    )


def _lse_error(sums: BoundSums, moments: _Moments, rates: _Rates, rounded_sum: Array) -> ErrorBound:
    """Error of m + log Σ exp(s − m)."""
    profile = rates.profile
    log_total = np.log1p(moments.eta[..., 0]) - math.log1p(-rates.eps)
    log_total = log_total - np.log1p(-np.minimum(rounded_sum[..., 0], 0.5))
    u = max(rates.u, format_of(profile.lse).unit_roundoff)
    size = 3 * np.abs(_finite(sums.lse)) + 2 * np.abs(_finite(sums.max_score)) + 2
    return ErrorBound(
        {
            "error of the scores": log_total,
            "row sum": np.full_like(log_total, -math.log1p(-rates.rho)),
            "logarithm and its rounding": u * size,
            "the reference's own float64": rates.reference * log_total + gamma(rates.t + 16, _U64) * size,
        }
    )


def _finite(x: Array) -> Array:
    """X with the -inf of rows without keys replaced by 0."""
    return np.where(np.isneginf(x), 0.0, x)
