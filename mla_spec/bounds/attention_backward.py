"""The worst-case error of the gradients of attention, by running error analysis of the backward pass.

The steps are those of ``backward``. Two kinds of implementation are covered at once. Automatic differentiation of plain
steps has P = softmax(S) from the forward pass and D = Σ_j P_ij dP_ij. A fused kernel forms P = exp(S − lse) anew, from scores
that it may sum in another order and from a stored LSE, and D = Σ_d dO_id O_id from the output as it was stored. Where the two
differ, the larger error counts; so it does where P, dP and dS may, but need not, be rounded to the format that the profile
declares for P, and where the gradients of several heads that share a key may be stored before they are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.attention_moments import Rates, finite, off_maximum
from mla_spec.bounds.operand_rounding import InheritedError, with_roundings, without_query
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.running import (
    Bounded,
    matmul,
    multiply,
    perhaps_stored,
    stored,
)
from mla_spec.reference.attention import (
    SoftmaxBlock,
    heads_to_rows,
    key_block,
    rows_to_heads,
    sink_share,
    softmax_blocks,
)
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.typing import Array, BoolArray, IntArray

Gradients = tuple[Bounded, Bounded, Bounded]
"""Of q, k and v."""

_U64 = FORMATS["float64"].unit_roundoff


def attention_backward_with_bound(
    q: Array,
    k: Array,
    v: Array,
    out_grad: Array,
    *,
    softmax_scale: float,
    profile: Profile,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    inherited: InheritedError | None = None,
    out_grad_error: Array | None = None,
    lse_grad: Array | None = None,
    lse_grad_error: Array | None = None,
) -> Gradients:
    """``attention_backward`` and the worst-case error of computing it as ``profile`` says, rounded to the profile's dtype.

    Arguments, shapes and errors are those of ``attention_backward``; ``inherited`` is what earlier stages may have changed in
    q, k and v, ``out_grad_error`` and ``lse_grad_error`` how far the gradients that arrive may be from ``out_grad`` and
    ``lse_grad``. The errors cover the reference's
    own rounding too; they are 0 for queries that see no key and for keys that no query sees, which must be finite. Memory is
    O(s · h · t).
    """
    attention = BackwardAttention.of(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        profile=profile,
        cache_seqlens=cache_seqlens,
        causal=causal,
        inherited=inherited,
    )
    gradients = attention.gradients(out_grad, out_grad_error, lse_grad, lse_grad_error)
    dq, dk, dv = (stored(x, profile.dtype, profile.output_rounding) for x in gradients)
    return dq, dk, dv


@dataclass(frozen=True)
class BackwardAttention:
    """What the backward pass of one attention needs; rows are (head of group, query) pairs as in ``SoftmaxBlock``."""

    profile: Profile
    softmax_scale: float
    rates: Rates
    query: Bounded  # [..., g, rows, d]
    key: Bounded  # [..., g, t, d]; 0 where no query sees it, and so is value
    value: Bounded  # [..., g, t, dv]
    out: Bounded  # [..., g, rows, dv]
    whole: Bounded  # out before a sink takes its share
    p: Bounded  # [..., g, rows, t], without a sink
    share: Bounded  # of the output, what a sink leaves, [..., g, rows, 1]; 1 without one
    largest: BoolArray  # keys whose computed score may be the row's largest, [..., g, rows, t]
    seen: BoolArray  # [..., 1, rows, t]
    heads: int
    sink_joins: bool = False

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        *,
        softmax_scale: float,
        profile: Profile,
        cache_seqlens: IntArray | int | None = None,
        causal: bool = True,
        inherited: InheritedError | None = None,
        attn_sink: Array | None = None,
        sink_joins: bool = False,
    ) -> BackwardAttention:
        """Of the arguments of ``attention_with_bound``."""
        profile = replace(profile, cache_dequantised=None)  # gradients do not go through a quantised cache
        h, t, g = q.shape[-2], *k.shape[-3:-1]
        inherited = with_roundings(q, k, v, softmax_scale, inherited, profile)
        inherited = inherited or InheritedError(np.zeros_like(q), np.zeros_like(k), np.zeros_like(v))
        profile = without_query(profile)

        def forward(sink: Array | None) -> BoundedAttention:
            return attention_with_bound(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                profile=replace(profile, output="float64", output_rounding="nearest"),
                cache_seqlens=cache_seqlens,
                causal=causal,
                inherited=inherited,
                attn_sink=sink,
                sink_joins=sink_joins,
            )

        def output(x: BoundedAttention) -> Bounded:
            out = Bounded(heads_to_rows(x.out, g), heads_to_rows(x.out_error.total, g))
            return perhaps_stored(out, profile.output, profile.output_rounding)

        attended = forward(None)
        whole = output(attended)
        (block,) = softmax_blocks(
            q, k, v, softmax_scale=softmax_scale, cache_seqlens=cache_seqlens, causal=causal, block_size=max(1, t)
        )
        read: BoolArray = np.asarray(block.visible.any(axis=-2))  # [..., 1, t]
        query = Bounded(heads_to_rows(q, g), heads_to_rows(inherited.q, g))
        key, value = (
            Bounded(key_block(x, block.keys, read), key_block(error, block.keys, read))
            for x, error in ((k, inherited.k), (v, inherited.v))
        )
        rates = Rates.of(profile, q.shape[-1], t)
        delta = _score_error(query, key, softmax_scale, block.scores, rates)
        if profile.maximum is not None:
            largest = np.abs(np.where(block.visible, block.scores, 0.0)).max(axis=-1, keepdims=True, initial=0.0)
            delta = delta + rates.u * off_maximum(largest, rates)
        lse, lse_error = (
            x.reshape(*block.scores.shape[:-1], 1) for x in (finite(attended.lse), attended.lse_error.total)
        )
        highest = np.where(block.visible, block.scores - delta, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
        return cls(
            profile=profile,
            softmax_scale=softmax_scale,
            rates=rates,
            query=query,
            key=key,
            value=value,
            out=whole if attn_sink is None else output(forward(attn_sink)),
            whole=whole,
            p=_weights(block, lse, delta + lse_error, rates),
            share=_share(attn_sink, lse, lse_error, h, rates),
            largest=block.visible & (block.scores + delta >= highest),
            seen=block.visible,
            heads=h,
            sink_joins=sink_joins,
        )

    @np.errstate(over="ignore", invalid="ignore")
    def gradients(
        self,
        out_grad: Array,
        out_grad_error: Array | None = None,
        lse_grad: Array | None = None,
        lse_grad_error: Array | None = None,
    ) -> Gradients:
        """Of q [..., s, h, d], k [..., t, g, d] and v [..., t, g, dv], before they are stored; the heads of a group added."""
        dlse = Bounded(*(self._per_row(x) for x in (lse_grad, lse_grad_error)))
        do, p, dp = self._weighted(out_grad, out_grad_error)
        ds = self._scores(p, dp, do, dlse)  # [..., g, rows, t], times the scale
        dq = matmul(ds, self.key, self._rate(ds.value.shape[-1]))  # [..., g, rows, d]
        s = out_grad.shape[-3]
        dq = _masked(dq, np.asarray(self.seen.any(axis=-1, keepdims=True)))
        by_head = dq.map(lambda x: rows_to_heads(x, s, self.heads))
        return by_head, self._of_keys(ds, self.query, s), self._of_keys(p, do, s)

    @np.errstate(over="ignore", invalid="ignore")
    def sink_gradient(self, out_grad: Array, out_grad_error: Array) -> Bounded:
        """What each query [..., s, h] adds to the gradient of its head's sink: −P_sink D.

        D is that of ``_mean``, or the share of what it is without a sink; P_sink is a weight of the softmax, or what a share leaves
        of 1, and so may have the error of the share, however small it is.
        """
        u = self.rates.u
        do, p, dp = self._weighted(out_grad, out_grad_error)
        mean, share, relative = _row_sum(multiply(p, dp, u), u), self.share.value, self._relative_error_of_share()
        gauge = (p.value * (np.abs(dp.value) + dp.error)).sum(axis=-1, keepdims=True)  # at least |D|
        of_share = share * _row_sum(multiply(do, self.whole, u), u).error + (relative + 4 * u) * gauge
        error = np.maximum.reduce([mean.error, _row_sum(multiply(do, self.out, u), u).error, of_share])
        taken = self._narrow_at_any_share(Bounded(1 - share, self.share.error + 2 * u))
        each = multiply(taken, Bounded(-mean.value, error), 4 * u)
        # The sink may be the largest score; see ``_scores``.
        largest = gamma(2 * p.value.shape[-1] + 10, u) * (3 * gauge + error)
        each = self._perhaps_narrow(Bounded(each.value, each.error + largest))
        return each.map(lambda x: rows_to_heads(x, out_grad.shape[-3], self.heads)[..., 0])

    def _weighted(self, out_grad: Array, out_grad_error: Array | None) -> tuple[Bounded, Bounded, Bounded]:
        """(dO [..., g, rows, dv], P of a row with its sink [..., g, rows, t], dP [..., g, rows, t])."""
        g = self.key.value.shape[-3]
        error = np.zeros_like(out_grad) if out_grad_error is None else out_grad_error
        do = Bounded(heads_to_rows(out_grad, g), heads_to_rows(error, g))
        p = multiply(self.p, self.share, self.rates.u)
        if self.sink_joins:  # beside a large sink a weight may be smaller than any number, and not only its share
            p = Bounded(p.value, p.error + self.seen * format_of(self.profile.softmax).smallest_normal)
        dp = matmul(do, _transposed(self.value), self._rate(do.value.shape[-1]))
        return do, self._narrow_at_any_share(p), self._narrow_at_any_share(dp)

    def _per_row(self, x: Array | None) -> Array:
        """[..., g, rows, 1] of [..., h, s]; 0 for None."""
        shape = self.share.value.shape
        return np.zeros(shape) if x is None else x.reshape(shape)

    def _rate(self, n: int) -> float:
        """The error of a sum of n products, scaled by the roots of the scale or the scale itself."""
        n += self.profile.operand_roundings + 2
        return max(self.profile.score.relative_error(n), self.profile.value.relative_error(n))

    def _narrow_at_any_share(self, x: Bounded) -> Bounded:
        """Perhaps in the format of P; with a sink, perhaps before or after its share, at a size that has other neighbours."""
        name = self.profile.probabilities
        relative = np.where(self._sunk, format_of(name).unit_roundoff, 0.0) * (np.abs(x.value) + x.error)
        return Bounded(x.value, np.maximum(perhaps_stored(x, name).error, x.error + relative))

    @property
    def _sunk(self) -> BoolArray:
        """Rows with a sink, [..., g, rows, 1]."""
        return self.share.error > 0

    def _mean(self, p: Bounded, dp: Bounded, do: Bounded, gauge: Array) -> Bounded:
        """D, [..., g, rows, 1]: Σ_d dO_d O_d of the output as it was stored, or Σ_j P_j dP_j.

        Plain steps see a sink through the LSE: they have D of all weights and subtract what the sink takes of it.
        """
        u = self.rates.u

        def of_weights(weights: Bounded) -> Bounded:
            return _row_sum(multiply(weights, dp, u), u)

        def of_out(out: Bounded) -> Array:
            return _row_sum(multiply(do, out, u), u).error

        mean = of_weights(p)
        error = np.maximum(mean.error, of_out(self.out))
        taken = (1 - self.share.value) * of_out(self.whole)
        taken = taken + (2 * self._relative_error_of_share() + 8 * u) * gauge
        through_lse = of_weights(self._narrow_at_any_share(self.p)).error + taken
        return Bounded(mean.value, np.where(self._sunk, np.maximum(error, through_lse), error))

    def _relative_error_of_share(self) -> Array:
        """[..., g, rows, 1]; 0 without a sink."""
        relative: Array = self.share.error / np.where(self._sunk, self.share.value, 1.0)
        return relative

    def _scores(self, p: Bounded, dp: Bounded, do: Bounded, dlse: Bounded) -> Bounded:
        """Of the scores before they are scaled: σ (P (dP − D) + P dlse), where a sink changes the first P only."""
        u, t = self.rates.u, p.value.shape[-1]
        gauge = (self.p.value * (np.abs(dp.value) + dp.error)).sum(axis=-1, keepdims=True)  # at least |D|
        mean = self._mean(p, dp, do, gauge)
        size = np.abs(dp.value) + dp.error + gauge + mean.error + np.abs(dlse.value) + dlse.error
        centred = Bounded(dp.value - mean.value, dp.error + mean.error + 4 * (u + _U64) * size)
        ds, of_lse = multiply(p, centred, 4 * u), multiply(self.p, dlse, 4 * u)
        if dlse.value.any() or dlse.error.any():
            ds = Bounded(ds.value + of_lse.value, ds.error + of_lse.error)
        # Plain steps subtract the row's largest score, whose own gradient is 0 but for the rounding of sums.
        weighted = ((self.p.value + self.p.error) * size).sum(axis=-1, keepdims=True) * (self.share.value > 0)
        ds = Bounded(ds.value, ds.error + self.largest * gamma(2 * t + 8, u) * weighted)
        scale = Bounded(np.asarray(self.softmax_scale), np.zeros(()))
        scaled = multiply(self._perhaps_narrow(ds), scale, 2 * u)
        return _masked(self._perhaps_narrow(scaled), self.seen)

    def _perhaps_narrow(self, ds: Bounded) -> Bounded:
        """In the format of P, or in that of the scores."""
        for name in dict.fromkeys((self.profile.probabilities, self.profile.score_format)):
            ds = perhaps_stored(ds, name)
        return ds

    def _of_keys(self, weights: Bounded, rows: Bounded, s: int) -> Bounded:
        """Σ_i weights_ij rows_i over the queries and heads that share a key, [..., t, g, d]."""
        heads = self.heads // self.key.value.shape[-3]  # of a group
        weights, rows = (x.map(lambda a: a.reshape(*a.shape[:-2], heads, s, a.shape[-1])) for x in (weights, rows))
        each = matmul(_transposed(weights), rows, self._rate(heads * s))  # [..., g, heads, t, d]
        if heads > 1:
            each = perhaps_stored(each, self.profile.dtype, self.profile.output_rounding)
        size = (np.abs(each.value) + each.error).sum(axis=-3)
        error = each.error.sum(axis=-3) + (gamma(heads - 1, self.rates.u) + gamma(heads, _U64)) * size
        total = _masked(Bounded(each.value.sum(axis=-3), error), np.asarray(self.seen.any(axis=-2))[..., None])
        return total.map(lambda x: np.moveaxis(x, -3, -2))


def _score_error(query: Bounded, key: Bounded, softmax_scale: float, scores: Array, rates: Rates) -> Array:
    """Δ of ``bounds``, but for what subtracting the largest score rounds."""
    product = matmul(query, _transposed(key), rates.gamma_qk)
    return (1 + rates.kappa) * abs(softmax_scale) * product.error + rates.kappa * np.abs(scores)


def _weights(block: SoftmaxBlock, lse: Array, exponent_error: Array, rates: Rates) -> Bounded:
    """P, normalised or formed anew as exp(S − lse); ``exponent_error`` is that of S and of the LSE."""
    total = block.weights.sum(axis=-1, keepdims=True)
    p = block.weights / np.where(total == 0, 1.0, total)
    subtracted = rates.u * (np.abs(block.scores - lse) + 3 * np.abs(lse))  # in base 2 too
    growth = np.expm1(exponent_error + subtracted) * (1 + rates.eps) + rates.eps + 2 * rates.u  # ζ
    lost = format_of(rates.profile.softmax).smallest_normal
    return _masked(Bounded(p, p * growth * (1 + rates.reference) + lost), block.visible)


def _share(attn_sink: Array | None, lse: Array, lse_error: Array, heads: int, rates: Rates) -> Bounded:
    """1 / (1 + exp(attn_sink − lse)), [..., g, rows, 1]; its error follows that of the LSE by a share of what is not left."""
    if attn_sink is None:
        return Bounded(np.ones(lse.shape), np.zeros(lse.shape))
    groups, s = lse.shape[-3], lse.shape[-3] * lse.shape[-2] // heads
    sink = heads_to_rows(np.broadcast_to(attn_sink[:, None], (s, heads, 1)), groups)
    share = sink_share(lse, sink)
    size = np.abs(lse) + np.where(np.isinf(sink), 0.0, np.abs(sink))
    relative = (1 - share) * np.expm1(lse_error + 4 * rates.u * size) + rates.eps + 4 * (rates.u + _U64)
    return Bounded(share, share * relative)


def _row_sum(x: Bounded, u: float) -> Bounded:
    """The sum of each row, [..., rows, 1], in arithmetic with the roundoff u."""
    n = x.value.shape[-1]
    size = (np.abs(x.value) + x.error).sum(axis=-1, keepdims=True)
    error = x.error.sum(axis=-1, keepdims=True) + (gamma(n + 2, u) + gamma(n + 8, _U64)) * size
    return Bounded(x.value.sum(axis=-1, keepdims=True), error)


def _transposed(x: Bounded) -> Bounded:
    return x.map(lambda a: np.swapaxes(a, -1, -2))


def _masked(x: Bounded, seen: BoolArray) -> Bounded:
    """x where something is seen, else exactly 0."""
    return Bounded(np.where(seen, x.value, 0.0), np.where(seen, x.error, 0.0))
