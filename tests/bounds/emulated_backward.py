"""Backward passes of attention in low precision, emulated in NumPy: what honest implementations do within a profile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.proof.emulated import (
    EmulatedAttention,
    Schedule,
    multiply_add,
    rounded,
)
from mla_spec.reference.attention import heads_to_rows, key_block, rows_to_heads
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class EmulatedBackward:
    """A backward pass in the arithmetic of ``profile``.

    Attributes:
        style: "plain" steps have P from the softmax, and D from P and dP; a "fused" pass forms P anew from the LSE, and D from
            the output. "softmax" is plain with the softmax itself in steps, whose largest score has a gradient too.
        narrow: which of "p", "dp", "ds" and "scaled" ds are rounded to the format of P.
        heads_stored: gradients of heads that share a key are stored before they are added.
        schedule: of sums and exponentials.
    """

    profile: Profile
    style: Literal["plain", "softmax", "fused"] = "plain"
    narrow: tuple[str, ...] = ()
    heads_stored: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    def gradients(
        self,
        q: Array,
        k: Array,
        v: Array,
        out_grad: Array,
        *,
        softmax_scale: float,
        seen: Array,
        lse_grad: Array | None,
    ) -> tuple[Array, Array, Array]:
        """Of q [s, h, d], k [t, g, d] and v [t, g, dv], with query i seeing ``seen[i]`` keys; lse_grad [h, s]."""
        (s, h), (t, g) = q.shape[:2], k.shape[:2]
        forward = EmulatedAttention(self.profile, self.schedule)
        visible = np.tile(np.arange(t) < seen[:, None], (h // g, 1))  # [rows, t]
        query, do = heads_to_rows(q, g), heads_to_rows(out_grad, g)
        key, value = key_block(k, slice(None)), key_block(v, slice(None))
        scores = np.where(visible, forward.scores(query, key, softmax_scale), -np.inf)
        out, lse = forward.merged(scores, value)
        out = round_to(out, self.profile.output, rounding=self.profile.output_rounding)
        dlse = np.zeros((*lse.shape, 1)) if lse_grad is None else lse_grad.reshape(*lse.shape, 1)
        dp = self.stored("dp", self.product(do, np.swapaxes(value, -1, -2)))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            p, ds = self.scores_grad(forward, scores, out, rounded(lse, self.profile.lse), do, dp, dlse)
        p, ds = (np.where(visible, x, 0.0) for x in (p, ds))
        if self.schedule.exp2:  # the scale of the scores holds log2(e)
            ds = self.round(ds)
        ds = self.stored("scaled", self.round(self.stored("ds", ds) * self.round(softmax_scale)))
        return (
            self.result(rows_to_heads(self.product(ds, key), s, h)),
            self.of_keys(ds, query, s),
            self.of_keys(self.stored("p", p), do, s),
        )

    def scores_grad(
        self, forward: EmulatedAttention, scores: Array, out: Array, lse: Array, do: Array, dp: Array, dlse: Array
    ) -> tuple[Array, Array]:
        """(P, dS)."""
        if self.style == "fused":
            p = forward.exp(self.round(scores - np.where(np.isneginf(lse), 0.0, lse)[..., None]))
            mean = self.row_sum(self.round(do * out))
            return p, self.round(p * self.round(self.round(dp - mean) + dlse))
        m = scores.max(axis=-1, keepdims=True)
        m = np.where(np.isneginf(m), 0.0, m)
        weights = forward.exp(self.round(scores - m))
        total = self.row_sum(weights)
        total = np.where(total == 0, 1.0, total)
        p = self.round(weights / total)
        if self.style == "plain":
            mean = self.row_sum(self.round(p * dp))
            return p, self.round(self.round(p * self.round(dp - mean)) + self.round(p * dlse))
        # quotient, sum and logarithm, exponential, difference from the largest
        of_weights = self.round(dp / total)
        of_total = self.round(-self.row_sum(self.round(self.round(dp * weights) / self.round(total * total))))
        of_total = self.round(of_total + self.round(dlse / total))
        ds = self.round(self.round(of_weights + of_total) * weights)
        of_max = self.round(dlse - self.row_sum(ds))
        first = np.arange(ds.shape[-1]) == scores.argmax(axis=-1)[..., None]
        return p, np.where(first, self.round(ds + of_max), ds)

    def round(self, x: Any) -> Array:
        return rounded(np.asarray(x, dtype=float), self.profile.softmax)

    def stored(self, what: str, x: Array) -> Array:
        return rounded(x, self.profile.probabilities) if what in self.narrow else x

    def result(self, x: Array) -> Array:
        return round_to(x, self.profile.dtype, rounding=self.profile.output_rounding)

    def product(self, a: Array, b: Array) -> Array:
        zero = np.zeros((*a.shape[:-1], b.shape[-1]))
        return multiply_add(zero, a, b, self.profile.value, stepwise=self.schedule.stepwise)

    def row_sum(self, x: Array) -> Array:
        total: Array = x.sum(axis=-1, keepdims=True) * 0.0
        for i in range(x.shape[-1]):
            total = self.round(total + x[..., i : i + 1])
        return total

    def of_keys(self, weights: Array, rows: Array, s: int) -> Array:
        """Σ_i weights_ij rows_i, [t, g, d]."""
        weights, rows = (x.reshape(*x.shape[:-2], -1, s, x.shape[-1]) for x in (weights, rows))
        each = self.product(np.swapaxes(weights, -1, -2), rows)  # [g, heads, t, d]
        if self.heads_stored:
            each = self.result(each)
        total = np.zeros(each[:, 0].shape)
        for head in range(each.shape[1]):
            total = self.round(total + each[:, head])
        return self.result(np.moveaxis(total, -3, -2))
