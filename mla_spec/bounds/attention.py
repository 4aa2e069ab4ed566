"""The error of attention computed as a profile says, next to the exact result.

Per row and value dim, with σ the softmax scale, s_j = σ q·k_j, m = max s, p = softmax(s), o = Σ p_j v_j, all exact:

    G_j = |σ| Σ_i |q_i| |k_ji|                              gauge of a score
    Δ_j = Γ_QK G_j + κ |s_j| + u (m − s_j) + inherited      error of a score
    η_j = expm1(Δ_j)(1 + ε) + ε                             relative error of a weight exp(s_j − m)
    N   = Σ p_j η_j |v_j − o| · (1 + Σ p_j expm1(Δ_j))/(1 − ε)

N is the effect on o: softmax is shift invariant, hence v − o, and Σ p_j exp(−Δ_j) ≥ 1/(1 + Σ p_j expm1(Δ_j)), so it stays
finite for errors of any size. For the same reason log(1 + Σ p_j expm1(Δ_j)) − log(1 − ε) is the effect on the LSE. Sums of
|v − o| have no product form; by Cauchy-Schwarz Σ p η |v − o| is at most sqrt(Σ p η²) · sqrt(Σ p (v − o)²), which needs the
products of p with v and v² alone.

Every inequality is worst case: a result outside the bound proves that the arithmetic is not what the profile declares.
Where the roundings of many weights to a narrow format spread, their sum is far below the worst case; the probable error
(``weight_rounding.Likely``) says where it stays but with a stated probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.attention_moments import Moments, Rates, finite, off_maximum
from mla_spec.bounds.attention_sums import BoundSums, bound_sums
from mla_spec.bounds.error_bound import ErrorBound, half_ulp, overflowed
from mla_spec.bounds.operand_rounding import InheritedError, with_roundings
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.shared_query import moved_by_query
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY, Likely, beside_a_sink, rounded_p
from mla_spec.reference.attention import (
    BLOCK_SIZE,
    SoftmaxBlock,
    heads_to_rows,
    key_block,
    rows_to_heads,
    rows_to_lse,
    softmax_blocks,
)
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.typing import Array, BoolArray, IntArray

_U64 = FORMATS["float64"].unit_roundoff


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

    def judged_by(self, profile: Profile) -> BoundedAttention:
        """The same with the errors by which outputs are judged: the probable ones where P is so coarse that the worst case says
        nothing.
        """
        if not profile.coarse:
            return self
        return replace(self, out_error=self.out_error_probable, lse_error=self.lse_error_probable)

    def map(self, of_out: Callable[[Array], Array], of_lse: Callable[[Array], Array]) -> BoundedAttention:
        """The same with ``of_out`` applied to all that is shaped as out, and ``of_lse`` to all that is shaped as lse."""
        return BoundedAttention(
            out=of_out(self.out),
            out_error=self.out_error.map(of_out),
            lse=of_lse(self.lse),
            lse_error=self.lse_error.map(of_lse),
            out_error_probable=self.out_error_probable.map(of_out),
            lse_error_probable=self.lse_error_probable.map(of_lse),
        )


def attention_with_bound(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    profile: Profile,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    window: int | None = None,
    inherited: InheritedError | None = None,
    query_error: Array | None = None,
    attn_sink: Array | None = None,
    sink_joins: bool = False,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
    block_size: int = BLOCK_SIZE,
) -> BoundedAttention:
    """``attention`` and the error of computing it as ``profile`` says.

    Arguments and errors are those of ``attention``; ``inherited`` is what earlier stages may have changed in q, k and v.
    Rows of k and v that no query sees must be finite. The errors cover the reference's own rounding too.

    Args:
        query_error: what rounding q as the profile says may move, shaped as q; None where one scale is that of no more than
            this call.
        attn_sink: that of ``attention``, exact as stored. One of +inf leaves an out of exactly 0.
        sink_joins: whether the sink may be one of the scores, rather than what multiplies out at the end.
        probable: asks for the probable error beside the worst case.
        failure: that any element of the call lies outside its probable error.
    """
    inherited = with_roundings(q, k, v, softmax_scale, inherited, profile, query_error)
    blocks = softmax_blocks(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        window=window,
        accurate=False,
        block_size=block_size,
    )
    u_p = format_of(profile.probabilities).unit_roundoff
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rates = Rates.of(profile, q.shape[-1], k.shape[-3])
        sums = bound_sums(
            blocks,
            _score_error(q, k, inherited, softmax_scale, rates),
            None if inherited is None else inherited.v,
            2 * u_p if probable else None,
        )
        moments = Moments.of(sums, rates)
        if profile.query is not None and inherited is not None:
            t = max(1, k.shape[-3])
            (block,) = softmax_blocks(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                cache_seqlens=cache_seqlens,
                causal=causal,
                window=window,
                block_size=t,
            )
            delta = _without_query(q, k, inherited, softmax_scale, rates)(block) + moments.shared
            moved = moved_by_query(block, k, inherited.q, softmax_scale, delta, moments, rates)
            moments = replace(moments, moved=np.minimum(moments.moved, moved))
        size = v if inherited is None else np.abs(v) + inherited.v
        # Σ_j |v_j| ≤ sqrt(t Σ_j v_j²), which needs no copy of v
        largest = np.abs(size).max(axis=-3, initial=0.0)[..., None, :]  # [..., g, 1, dv]
        column = np.sqrt(k.shape[-3] * np.einsum("...tgd,...tgd->...gd", size, size))[..., None, :]  # [..., g, 1, dv]
        roundings = [rounded_p(moments, rates, column)]
        if probable:
            likely = Likely.of(sums, moments, k, failure)
            pair = likely.rounded_p(moments, rates, column), likely.rounded_sum(moments, rates)
            roundings.append((np.minimum(roundings[0][0], pair[0]), np.minimum(roundings[0][1], pair[1])))
        lse_errors = [_lse_error(sums, moments, rates, rounded_sum) for _, rounded_sum in roundings]
        sinks = [_Sink.of(attn_sink, sums, lse_error, rates, q.shape[-3], k.shape[-2]) for lse_error in lse_errors]
        if sink_joins:
            lost = beside_a_sink(moments, rates, column)
            sinks = [sink.joined(sums, rates, lost) for sink in sinks]
        log_domain = _log_domain_error(sums, rates) if profile.row_sum == "lse" else None
        out_errors = [
            _out_error(moments, rates, r, sink, largest, log_domain)
            for (r, _), sink in zip(roundings, sinks, strict=True)
        ]
    seen = ~np.isneginf(sums.max_score)
    s, h = q.shape[-3:-1]
    some = seen[..., None] & ~np.isposinf(sinks[0].sink)  # one of +inf leaves exactly nothing
    out_errors = [e.map(lambda x: rows_to_heads(_kept(x, some), s, h)) for e in out_errors]
    lse_errors = [e.map(lambda x: rows_to_lse(_kept(x, seen), s, h)) for e in lse_errors]
    return BoundedAttention(
        out=rows_to_heads(sinks[0].share * moments.out, s, h),
        out_error=out_errors[0],
        lse=rows_to_lse(sums.lse, s, h),
        lse_error=lse_errors[0],
        out_error_probable=out_errors[-1],
        lse_error_probable=lse_errors[-1],
    )


def _kept(x: Array, where: BoolArray) -> Array:
    """x, with 0 elsewhere."""
    return x if where.all() else np.where(where, x, 0.0)


def _score_error(
    q: Array, k: Array, inherited: InheritedError | None, softmax_scale: float, rates: Rates
) -> Callable[[SoftmaxBlock], Array]:
    """Δ without its part u·m that all keys of a row share."""
    groups = k.shape[-2]
    size = (1 + rates.kappa) * abs(softmax_scale)  # a scale may be negative
    q_size = np.abs(q) if inherited is None else np.abs(q) + inherited.q
    q_rows = heads_to_rows(size * rates.gamma_qk * q_size, groups)  # [..., g, rows, d]
    if inherited is not None:
        # |σ| (e_q·(|k| + e_k) + |q|·e_k) as one product of twice the width
        pair_rows = heads_to_rows(size * np.concatenate([inherited.q, np.abs(q)], axis=-1), groups)

    def error(block: SoftmaxBlock) -> Array:
        k_size = np.abs(key_block(k, block.keys))
        k_error = None if inherited is None else key_block(inherited.k, block.keys)
        if k_error is not None:
            k_size = k_size + k_error
        delta = q_rows @ np.swapaxes(k_size, -1, -2)  # [..., g, rows, block]: Γ (1 + κ) times the gauge G
        # κ |s| − u s
        delta += np.maximum((rates.kappa - rates.u) * block.scores, -(rates.kappa + rates.u) * block.scores)
        if k_error is not None:
            delta += pair_rows @ np.swapaxes(np.concatenate([k_size, k_error], axis=-1), -1, -2)
        return delta

    return error


def _without_query(
    q: Array, k: Array, inherited: InheritedError, softmax_scale: float, rates: Rates
) -> Callable[[SoftmaxBlock], Array]:
    """Δ, likewise, of scores of the q that was computed, which is off by no more than ``inherited`` says."""
    size = np.abs(q) + inherited.q
    of_size = _score_error(size, k, replace(inherited, q=np.zeros_like(q)), softmax_scale, rates)
    largest = np.abs(k).max(axis=-3, keepdims=True, initial=0.0)  # [..., 1, g, d]
    reach = heads_to_rows(abs(softmax_scale) * inherited.q, k.shape[-2]) @ np.swapaxes(
        key_block(largest, slice(None)), -1, -2
    )  # how far a score may be off, [..., g, rows, 1]
    return lambda block: of_size(block) + (rates.kappa + 2 * rates.u) * reach


@dataclass(frozen=True)
class _Sink:
    """What an attention sink leaves of the output: share = 1/(1 + exp(sink − lse)), and its relative error."""

    sink: Array  # [..., g, rows, 1]
    share: Array
    error: Array
    shift: Array  # relative error of weights whose exponents are taken from the sink, and of their sum
    lost: Array  # what they lose to underflow beside it, [..., g, rows, dv]

    @classmethod
    def of(
        cls,
        attn_sink: Array | None,
        sums: BoundSums,
        lse_error: ErrorBound,
        rates: Rates,
        s: int,
        groups: int,
    ) -> _Sink:
        if attn_sink is None:
            return cls(np.full((), -np.inf), np.ones(()), *np.zeros((3, 1)))
        sink = heads_to_rows(np.broadcast_to(attn_sink[:, None], (s, *attn_sink.shape, 1)), groups)[..., 0]
        distance = finite(sums.lse) - sink  # [..., g, rows]
        share = 1 / (1 + np.exp(-distance))
        # The share changes by (1 − share) times what the distance does, and by a few roundings of its own.
        size = np.abs(finite(sums.lse)) + np.where(np.isinf(sink), 0.0, np.abs(sink))
        moved = np.expm1(lse_error.total + 4 * rates.u * size) + rates.profile.exp_error * rates.u
        error = np.exp(-distance) * share * moved + 4 * rates.u + 4 * _U64
        error = np.where(share > 0, error, 0.0)
        return cls(sink[..., None], share[..., None], error[..., None], *np.zeros((2, 1)))

    def joined(self, sums: BoundSums, rates: Rates, lost: Array) -> _Sink:
        """The same where it may be one of the scores, and then the largest."""
        some = np.isfinite(self.sink)
        sink = np.where(some, self.sink, 0.0)
        larger = np.maximum(sink - finite(sums.max_score)[..., None], 0.0)
        off = off_maximum(np.maximum(sums.max_abs_score[..., None], np.abs(sink)), rates)
        shift = np.where(some, 2 * np.expm1(rates.u * (larger + off)), 0.0)
        return replace(self, shift=shift, lost=np.where(some, lost * np.exp(off), 0.0))


def _out_error(
    moments: Moments, rates: Rates, rounding: Array, sink: _Sink, largest: Array, log_domain: Array | None
) -> ErrorBound:
    """E_d.

    Args:
        largest: largest magnitude of a value dim over all keys.
        log_domain: error of the LSE that normalises the weights; None where they are divided by their sum.
    """
    profile, o = rates.profile, np.abs(moments.out)
    u_p = format_of(profile.probabilities).unit_roundoff
    accumulated = (1 + u_p) * rates.gamma_pv * moments.gauge
    before_merge = moments.moved + moments.inherited + rounding + accumulated
    # Each merge stores the parts and forms a weighted sum of them, of two or of all the splits at once.
    parts = max(2, min(profile.splits, rates.t))
    u_merge = format_of(profile.split_format).unit_roundoff + gamma(parts + 1, rates.u)
    # In out − share (out − part) a part counts in full, however small its share.
    of_part = largest if profile.merge_shares == "sigmoid" else moments.gauge
    u_merge = u_merge + (gamma(6, rates.u) if profile.merge_shares == "sigmoid" else 0.0)
    merged = profile.merges(rates.t) * u_merge * (of_part + before_merge)
    # Shares exp(lse_part − lse) need not be divided by their sum again, and then need not add up to 1.
    merged = merged + moments.shares * (o + before_merge)
    before_division = before_merge + merged
    divided = (rates.rho / (1 - rates.rho) if rates.rho < 1 else math.inf) * (o + before_division)
    if log_domain is not None:
        divided = np.expm1(log_domain) * (o + before_division)
    before_sink = before_division + divided
    sunk = sink.share * (sink.error * (o + before_sink) + sink.shift * moments.gauge) + sink.lost
    doubled = 2 if profile.output_rounding == "truncate" else 1
    stored = doubled * half_ulp(sink.share * (o + before_sink) + sunk, profile.output)
    terms = {
        "error of the scores": moments.moved,
        "error of the operands": moments.inherited,
        f"rounding of P to {profile.probabilities}": rounding,
        "accumulation of P·V": accumulated,
        "merging of parts by LSE": merged,
        "row sum and division": divided,
        "the reference's own float64": rates.reference * moments.moved + gamma(rates.t + 16, _U64) * moments.gauge,
    }
    scaled = {name: overflowed(sink.share * term) for name, term in terms.items()}
    return ErrorBound(scaled | {"attention sink": overflowed(sunk)}).plus(
        f"rounding of the output to {profile.output}", stored
    )


def _log_domain_error(sums: BoundSums, rates: Rates) -> Array:
    """How far log Σ exp ŝ of the computed scores is off, by which all weights exp(ŝ − lse) grow; [..., g, rows, 1]."""
    size = _lse_size(sums, rates)
    error: Array = rates.u * size - np.log(max(1 - rates.rho, 0.0)) - np.log(max(1 - rates.eps, 0.0))
    return error[..., None]


def _lse_size(sums: BoundSums, rates: Rates) -> Array:
    """The numbers that m + log Σ adds and rounds, [..., g, rows]."""
    off = off_maximum(sums.max_abs_score, rates)
    size: Array = 3 * np.abs(finite(sums.lse)) + 2 * (np.abs(finite(sums.max_score)) + off) + 2
    return size


def _lse_error(sums: BoundSums, moments: Moments, rates: Rates, rounded_sum: Array) -> ErrorBound:
    """Error of m + log Σ exp(s − m)."""
    profile = rates.profile
    # The least sum of the perturbed weights is further from 1 than the largest: 1/(1 − ε) > 1 + ε.
    log_total = np.log1p(moments.surplus[..., 0]) - np.log(max(1 - rates.eps, 0.0))
    log_total = log_total - np.log1p(-np.minimum(rounded_sum[..., 0], 1.0))
    u = max(rates.u, format_of(profile.lse).unit_roundoff)
    size = _lse_size(sums, rates)
    terms = {
        "error of the scores": log_total,
        "row sum": np.full_like(log_total, -np.log(max(1 - rates.rho, 0.0))),
        "logarithm and its rounding": u * size,
        "the reference's own float64": rates.reference * log_total + gamma(rates.t + 16, _U64) * size,
    }
    return ErrorBound({name: overflowed(term) for name, term in terms.items()})
