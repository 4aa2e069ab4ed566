"""The worst-case error of attention computed as a profile says, next to the exact result.

Per row and value dim, with σ the softmax scale, s_j = σ q·k_j, m = max s, p = softmax(s), o = Σ p_j v_j, all exact:

    G_j = σ Σ_i |q_i| |k_ji|                                gauge of a score
    Δ_j = Γ_QK G_j + κ |s_j| + u (m − s_j) + inherited      error of a score
    η_j = expm1(Δ_j)(1 + ε) + ε                             relative error of a weight exp(s_j − m)
    η̄   = Σ p_j η_j
    N   = Σ p_j η_j |v_j − o| · (1 + Σ p_j expm1(Δ_j))/(1 − ε)

N is the effect on o: softmax is shift invariant, hence v − o, and Σ p_j exp(−Δ_j) ≥ 1/(1 + Σ p_j expm1(Δ_j)), so it stays
finite for errors of any size. Sums of |v − o| have no product form; by Cauchy-Schwarz Σ p η |v − o| is at most
sqrt(Σ p η · Σ p η (v − o)²), which matrix products give.

Every inequality is worst case: a result outside the bound proves that the arithmetic is not what the profile declares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from mla_spec.reference.attention import (
    ScoreError,
    SoftmaxSums,
    heads_to_rows,
    key_block,
    rows_to_heads,
    rows_to_lse,
    softmax_sums,
)
from mla_spec.reference.error_bound import ErrorBound
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.profile import Profile, gamma
from mla_spec.reference.typing import Array, IntArray

_U64 = FORMATS["float64"].unit_roundoff


@dataclass(frozen=True)
class BoundedAttention:
    """Exact attention and how far an implementation may be from it.

    Attributes:
        out, out_error: [..., s, h, dv].
        lse, lse_error: [..., h, s].

    Both errors are 0 in rows without keys, whose value is exact.
    """

    out: Array
    out_error: ErrorBound
    lse: Array
    lse_error: ErrorBound


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
    block_size: int = 512,
) -> BoundedAttention:
    """``attention`` and the worst-case error of computing it as ``profile`` says.

    Arguments and errors are those of ``attention``; ``inherited`` is what earlier stages may have changed in q, k and v.
    The bound covers the reference's own rounding too. Rows of k and v that no query sees must be finite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rates = _Rates.of(profile, q.shape[-1], k.shape[-3])
        sums = softmax_sums(
            q,
            k,
            v if inherited is None else np.concatenate([v, inherited.v], axis=-1),
            softmax_scale=softmax_scale,
            cache_seqlens=cache_seqlens,
            causal=causal,
            block_size=block_size,
            columns=partial(_with_squares, dv=v.shape[-1]),
            score_error=_score_error(q, k, inherited, softmax_scale, rates),
        )
        moments = _Moments.of(sums, rates, v.shape[-1])
        size = v if inherited is None else np.abs(v) + inherited.v
        # Σ_j |v_j| ≤ sqrt(t Σ_j v_j²), which needs no copy of v
        column = np.sqrt(k.shape[-3] * np.einsum("...tgd,...tgd->...gd", size, size))[..., None, :]  # [..., g, 1, dv]
        out_error = _out_error(moments, rates, column)
        lse_error = _lse_error(sums, moments, rates)
    seen = ~np.isneginf(sums.max_score)
    s, h = q.shape[-3:-1]
    return BoundedAttention(
        out=rows_to_heads(moments.out, s, h),
        out_error=out_error.map(lambda x: rows_to_heads(np.where(seen[..., None], x, 0.0), s, h)),
        lse=rows_to_lse(sums.lse, s, h),
        lse_error=lse_error.map(lambda x: rows_to_lse(np.where(seen, x, 0.0), s, h)),
    )


def _with_squares(v: Array, dv: int) -> Array:
    """[v, v², whatever follows the dv elements of v in its rows]."""
    return np.concatenate([v[..., :dv], v[..., :dv] ** 2, v[..., dv:]], axis=-1)


@dataclass(frozen=True)
class _Rates:
    """The relative errors that a profile implies for keys of width d and t keys."""

    profile: Profile
    t: int
    gamma_qk: float  # Γ_QK
    kappa: float  # κ: scaling and storing a score
    u: float  # roundoff of the softmax arithmetic
    eps: float  # ε: exp, and the rescaling of an online softmax
    rho: float  # row sum and division
    reference: float  # float64 scores' error as a share of this profile's

    @classmethod
    def of(cls, profile: Profile, d: int, t: int) -> _Rates:
        u = format_of(profile.softmax).unit_roundoff
        rescales = math.ceil(t / profile.tile) if profile.tile else 0
        stored = (1 + format_of(profile.score_format).unit_roundoff) ** profile.score_roundings
        gamma_qk = profile.score.relative_error(d + profile.operand_roundings)
        return cls(
            profile=profile,
            t=t,
            gamma_qk=gamma_qk,
            kappa=stored * (1 + u) ** 3 - 1,
            u=u,
            eps=(profile.exp_error * (1 + rescales) + 2 * rescales) * u,
            rho=gamma(t + 4, u),
            reference=min(1.0, max(gamma(d, _U64) / gamma_qk, _U64 / u)),
        )


def _score_error(
    q: Array, k: Array, inherited: InheritedError | None, softmax_scale: float, rates: _Rates
) -> ScoreError:
    """Δ without its part u·m that all keys of a row share."""
    groups = k.shape[-2]
    q_size = np.abs(q) if inherited is None else np.abs(q) + inherited.q
    q_rows = heads_to_rows(q_size * softmax_scale, groups)  # [..., g, rows, d]
    if inherited is not None:
        # σ (e_q·(|k| + e_k) + |q|·e_k) as one product of twice the width
        q_pair = np.concatenate([inherited.q, np.abs(q)], axis=-1) * softmax_scale
        pair_rows = heads_to_rows(q_pair, groups)

    def error(scores: Array, keys: slice) -> Array:
        k_size = np.abs(key_block(k, keys))
        k_error = None if inherited is None else key_block(inherited.k, keys)
        if k_error is not None:
            k_size = k_size + k_error
        gauge = q_rows @ np.swapaxes(k_size, -1, -2)  # [..., g, rows, block]
        delta = rates.gamma_qk * (1 + rates.kappa) * gauge + rates.kappa * np.abs(scores) - rates.u * scores
        if k_error is not None:
            k_pair = np.concatenate([k_size, k_error], axis=-1)
            delta = delta + (1 + rates.kappa) * (pair_rows @ np.swapaxes(k_pair, -1, -2))
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
    inverse: Array  # 1 / Σ of the perturbed weights, relative to the exact ones
    row_total: Array  # Σ exp(s − m)

    @classmethod
    def of(cls, sums: SoftmaxSums, rates: _Rates, dv: int) -> _Moments:
        o, p2, v_error = np.split(sums.mean, [dv, 2 * dv], axis=-1)
        e1, e2, v_error_excess = np.split(sums.excess, [dv, 2 * dv], axis=-1)
        e0 = sums.excess_total[..., None]
        m = _finite(sums.max_score)
        shared = (rates.u * m + _split_error(sums, rates))[..., None]
        # Σ p η x = stretch · Σ p expm1(Δ − shared) x + lift · Σ p x
        stretch = np.exp(shared) * (1 + rates.eps)
        lift = np.expm1(shared) * (1 + rates.eps) + rates.eps
        inverse = (1 + np.maximum(np.exp(shared) * e0 + np.expm1(shared), 0)) / (1 - rates.eps)
        eta = np.maximum(stretch * e0 + lift, 0)
        q1, q2 = stretch * e1 + lift * o, stretch * e2 + lift * p2
        slack = gamma(rates.t + 16, _U64)  # the differences of squares below are rounded in float64
        eta_spread = np.maximum(q2 - 2 * o * q1 + o * o * eta, 0)
        eta_spread = eta_spread + slack * (np.abs(q2) + 2 * np.abs(o * q1) + o * o * eta)
        spread = np.maximum(p2 - o * o, 0) + slack * (p2 + o * o)
        moved = np.sqrt(eta * eta_spread)
        deviation = (np.sqrt(spread) + moved) * inverse
        inherited = np.zeros_like(o)
        if v_error.shape[-1]:
            inherited = ((1 + lift) * v_error + stretch * v_error_excess) * inverse
        return cls(
            out=o,
            eta=eta,
            moved=moved * inverse,
            deviation=deviation,
            inherited=inherited,
            gauge=np.abs(o) + deviation + inherited,
            inverse=inverse,
            row_total=np.exp(np.clip(_finite(sums.lse) - m, 0, 700))[..., None],
        )


def _split_error(sums: SoftmaxSums, rates: _Rates) -> Array:
    """Error of the weight exp(lse_part − lse) of a part of the keys, as an error of every score in it."""
    each = rates.u * (2 * (sums.max_abs_score + math.log(max(rates.t, 1))) + 2)
    return rates.profile.merges(rates.t) * each


def _underflow(moments: _Moments, rates: _Rates) -> Array:
    """What one weight may lose below the normal range of the format of P, relative to the row sum."""
    p = format_of(rates.profile.probabilities)
    # Hardware may flush subnormals of wide formats; those of float16 are in reach, and kept.
    lost = p.smallest_subnormal / 2 if p.name == "float16" else p.smallest_normal
    return lost * moments.inverse / moments.row_total


def _out_error(moments: _Moments, rates: _Rates, column: Array) -> ErrorBound:
    """E_d. ``column`` is Σ_j |v_j|, for the underflow of weights."""
    profile, o = rates.profile, np.abs(moments.out)
    u_p = format_of(profile.probabilities).unit_roundoff
    lost = _underflow(moments, rates)
    if profile.row_sum == "unrounded":
        rounded_p = u_p * moments.gauge + lost * column
    else:
        rounded_p = u_p / (1 - u_p) * (moments.deviation + moments.moved)
        rounded_p = rounded_p + lost * (column + rates.t * (o + moments.moved))
    accumulated = (1 + u_p) * profile.value.relative_error(rates.t) * moments.gauge
    before_merge = moments.moved + moments.inherited + rounded_p + accumulated
    # Each merge stores the parts and forms a weighted sum of two: two products and an addition.
    u_merge = format_of(profile.split_format).unit_roundoff + 3 * rates.u
    merged = profile.merges(rates.t) * u_merge * (moments.gauge + before_merge)
    before_division = before_merge + merged
    divided = rates.rho / (1 - rates.rho) * (o + before_division)
    out = format_of(profile.output)
    doubled = 2 if profile.output_rounding == "truncate" else 1
    u_o = doubled * out.unit_roundoff
    return ErrorBound(
        {
            "error of the scores": moments.moved,
            "error of the operands": moments.inherited,
            f"rounding of P to {profile.probabilities}": rounded_p,
            "accumulation of P·V": accumulated,
            "merging of parts by LSE": merged,
            "row sum and division": divided,
            f"rounding of the output to {profile.output}": u_o * (o + before_division + divided)
            + doubled * out.smallest_subnormal / 2,
            "the reference's own float64": rates.reference * moments.moved + gamma(rates.t + 16, _U64) * moments.gauge,
        }
    )


def _lse_error(sums: SoftmaxSums, moments: _Moments, rates: _Rates) -> ErrorBound:
    """Error of m + log Σ exp(s − m)."""
    profile = rates.profile
    log_total = np.log1p(moments.eta[..., 0]) - math.log1p(-rates.eps)
    if profile.row_sum == "rounded":
        u_p = format_of(profile.probabilities).unit_roundoff
        log_total = log_total - np.log1p(-np.minimum(u_p + rates.t * _underflow(moments, rates)[..., 0], 0.5))
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
