"""What a profile says of the errors of many rows: which part may be biased, and how large the rest is.

Per row, with s_j, p_j, o, η_j, A_d = sqrt(Σ p_j v_jd²) as in ``mla_spec.bounds.attention``, a result is cast(o + β + ν):

* ν is what rounding P to nearest adds. It is symmetric, with variance at most u_p²/3 · Σ p_j² v_jd² (v − o where the row sum
  adds the rounded weights).
* β is everything else, of unknown direction: |⟨β, w⟩| ≤ Σ p_j η_j |⟨v_j − o, w⟩| + ρ Σ A_d |w_d| for every direction w.

A sum of n float32 roundings enters β with 2 √n roundoffs, not n: they go up as often as down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mla_spec.bounds.operand_rounding import query_error
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.formats import FORMATS, format_of, round_to
from mla_spec.reference.typing import Array, IntArray

STAGNATION = 2.0**-6
"""Roundoffs times summands from which a sum may stagnate, so that its roundings no longer go up as often as down."""


def spread_error(accumulator: Accumulator, n: int) -> float:
    """Error of a sum of n products relative to the sum of their magnitudes, where its roundings are independent.

    More than 3 standard deviations of n roundings, none larger than the sum itself; the worst case where the format is too
    narrow for that, and on tensor cores, which truncate. Operands that are rounded are the same for many rows, so that
    counts as a bias.
    """
    worst = accumulator.relative_error(n)
    u = format_of(accumulator.format).unit_roundoff
    if accumulator.order == "tensor-core" or n * u > STAGNATION:
        return worst
    products = n * accumulator.operand_parts**2
    return min(worst, accumulator.operand_error + 2 * math.sqrt(products) * u * (1 + accumulator.operand_roundoff) ** 2)


@dataclass(frozen=True)
class ErrorModel:
    """Decode with one query per sequence, every row with keys, and its errors under a profile.

    Arrays are [b, h, ·]; keys of a shorter sequence have weight 0.
    """

    profile: Profile
    rows: Array  # [b, t, c+r], 0 past the length
    v: Array  # [b, t, c]
    scores: Array  # [b, h, t], -inf past the length
    gauge: Array  # [b, h, t]
    query: Array  # how far rounding q may move a score, [b, h, t]

    @classmethod
    def of(
        cls,
        q: Array,
        kv_cache: Array,
        block_table: IntArray,
        cache_seqlens: IntArray,
        *,
        head_dim_v: int,
        softmax_scale: float,
        profile: Profile,
    ) -> ErrorModel:
        """The model of ``decode`` of q [b, 1, h, c+r]; arguments are those of ``paged_decode``."""
        rows = gather_rows(kv_cache, block_table, cache_seqlens)  # [b, t, c+r]
        q_error = query_error(q, softmax_scale, profile)[:, 0] * abs(softmax_scale)  # [b, h, c+r]
        q = q[:, 0] * softmax_scale  # [b, h, c+r]
        seen = np.arange(rows.shape[1]) < cache_seqlens[:, None]  # [b, t]
        return cls(
            profile=profile,
            rows=rows,
            v=rows[..., :head_dim_v],
            scores=np.where(seen[:, None], q @ rows.swapaxes(1, 2), -np.inf),
            gauge=np.abs(q) @ np.abs(rows).swapaxes(1, 2),
            query=q_error @ np.abs(rows).swapaxes(1, 2),
        )

    @property
    def u(self) -> float:
        """Roundoff of the softmax arithmetic, and the reference's own."""
        return format_of(self.profile.softmax).unit_roundoff + FORMATS["float64"].unit_roundoff

    @property
    def u_p(self) -> float:
        return format_of(self.profile.probabilities).unit_roundoff

    @property
    def keys(self) -> int:
        return int(self.v.shape[1])

    @cached_property
    def max_score(self) -> Array:
        """[b, h, 1]."""
        highest: Array = self.scores.max(axis=-1, keepdims=True)
        return highest

    @cached_property
    def weights(self) -> Array:
        """exp(s − m), [b, h, t]."""
        return np.exp(self.scores - self.max_score)

    @cached_property
    def total(self) -> Array:
        """The row sum, [b, h, 1]."""
        total: Array = self.weights.sum(axis=-1, keepdims=True)
        return total

    @cached_property
    def p(self) -> Array:
        return self.weights / self.total

    @cached_property
    def out(self) -> Array:
        return self.p @ self.v

    @cached_property
    def lse(self) -> Array:
        """[b, h]."""
        lse: Array = (self.max_score + np.log(self.total))[..., 0]
        return lse

    @cached_property
    def magnitude(self) -> Array:
        """A, [b, h, c]."""
        return np.sqrt(self.p @ self.v**2)

    @cached_property
    def weight_bias(self) -> Array:
        """How far scores, exp, rescaling and underflow may move a weight, relative to the row sum: p η, [b, h, t]."""
        profile, u = self.profile, self.u
        size = np.where(np.isneginf(self.scores), 0.0, np.abs(self.scores))
        stored = (1 + format_of(profile.score_format).unit_roundoff) ** profile.score_roundings
        kappa = stored * (1 + u) ** 3 - 1
        products = spread_error(profile.score, self.rows.shape[-1] + profile.operand_roundings)
        products = products + self.u + self._row_rounding
        u_lse = max(u, format_of(profile.lse).unit_roundoff)
        parts = profile.merges(self.keys) * u_lse * (2 * (size.max(axis=-1, keepdims=True) + math.log(self.keys)) + 2)
        parts = parts * (4 if profile.merge_shares == "sigmoid" else 1) + self._log_domain
        below = np.where(np.isneginf(self.scores), 0.0, self.max_score - self.scores)
        delta = (1 + kappa) * (products * (self.gauge + self.query) + self.query) + kappa * size + u * below + parts
        rescales = math.ceil(self.keys / profile.tile) if profile.tile else 0
        eps = (profile.exp_error * (1 + rescales) + 2 * rescales) * u
        with np.errstate(over="ignore"):
            moved = self.p * (np.expm1(delta) * (1 + eps) + eps)
        moved = moved + self.underflow
        left = 1 - moved.sum(-1, keepdims=True)
        return np.where(left > 0, moved / left, np.inf)

    @cached_property
    def underflow(self) -> Array:
        """What each weight may lose below the normal range of the format of P, relative to the row sum; [b, h, t]."""
        p = format_of(self.profile.probabilities)
        # Hardware may flush subnormals of wide formats; those of narrow ones are in reach, and kept.
        lost = p.smallest_subnormal / 2 if p.min_exponent > -100 else p.smallest_normal
        lost = lost / self.profile.probabilities_scale
        divided_first = self.profile.row_sum in ("normalised", "lse")
        return np.minimum(self.p, lost if divided_first else lost / self.total)

    @property
    def _log_domain(self) -> Array:
        """What weights exp(s − lse) are off by, together: their LSE, and its subtraction; [b, h, 1]."""
        if self.profile.row_sum != "lse":
            return np.zeros((1, 1, 1))
        above = np.abs(self.lse[..., None] - self.max_score)
        error: Array = self.u * (3 * np.abs(self.lse[..., None]) + 2 * np.abs(self.max_score) + 2 + above)
        return error

    @property
    def _row_rounding(self) -> float:
        """Roundoff of the rows of a quantized cache where they are rounded before use, else 0.

        All heads read the same rounded row. Its error is one and the same for them, so it counts as a bias.
        """
        cache, dtype = (format_of(name or self.profile.dtype) for name in (self.profile.cache_dequantised, None))
        return cache.unit_roundoff if cache.precision < dtype.precision else 0.0

    @property
    def _rounding_bias(self) -> float:
        """How far rounding P to nearest may move the mean of many weights, relatively.

        Rounding to nearest errs up as often as down, but for two things. Weights are not spread evenly within one spacing of
        the format: that moves the mean by u_p². And the largest weight of each row, or tile, is exp(0). Where the kernel's exp
        does not give exactly 1 there, all of them are rounded in one direction, by no more than u_p or the error of exp.
        """
        return self.u_p**2 + min(self.u_p, self.profile.exp_error * self.u)

    @property
    def _row_sum(self) -> float:
        return spread_error(Accumulator(format=self.profile.softmax), self.keys) + 4 * self.u + self._rounding_bias

    @property
    def relative(self) -> Array:
        """ρ: rounding of V, accumulation of P·V, row sum and division, and merging of parts; [b, h, 1]."""
        profile = self.profile
        rescales = math.ceil(self.keys / profile.tile) if profile.tile else 0
        u_value = format_of(profile.value.format).unit_roundoff
        accumulated = spread_error(profile.value, self.keys) + (rescales * u_value if u_value > self.u else 0.0)
        merged = profile.merges(self.keys) * (format_of(profile.split_format).unit_roundoff + 3 * self.u)
        return self._row_rounding + accumulated + merged + self._row_sum + self._log_domain

    def bias(self, direction: Array) -> Array:
        """Largest |⟨β, w⟩| of each row, for w [b, h, c]; [b, h]. What a truncated output loses is counted with it."""
        along = np.abs(direction @ self.v.swapaxes(1, 2) - (direction * self.out).sum(-1, keepdims=True))  # [b, h, t]
        moved = (self.weight_bias * along).sum(-1)
        # What underflows is missing from P·V; where the row sum has it nevertheless, o itself shrinks.
        shrinkage = self.underflow.sum(-1, keepdims=True) * (self.profile.row_sum != "rounded")
        size = (self.relative + shrinkage) * self.magnitude
        if self.profile.output_rounding == "truncate":
            size = size + self.spacing / 2  # 0 where the kernel is better than it says, one spacing where it is not
        bias: Array = moved + (size * np.abs(direction)).sum(-1)
        return bias

    @property
    def lse_bias(self) -> Array:
        """Largest bias of the LSE, [b, h]."""
        size = 3 * np.abs(self.lse) + 2 * np.abs(self.max_score[..., 0]) + 2
        bias: Array = np.log1p(self.weight_bias.sum(-1)) + self._row_sum + self.u * size
        return bias

    @cached_property
    def rounded_out(self) -> Array:
        """The exact result as the profile's output rounds it."""
        return round_to(self.out, self.profile.output, rounding=self.profile.output_rounding)

    @property
    def spacing(self) -> Array:
        """Distance of neighbouring numbers of the output's format at o, [b, h, c]."""
        fmt = format_of(self.profile.output)
        exponent = np.frexp(self.out)[1]
        spacing: Array = np.ldexp(1.0, np.maximum(exponent - fmt.precision, fmt.min_exponent - fmt.precision + 1))
        return spacing

    @cached_property
    def mean_square(self) -> Array:
        """Largest mean square of cast(o + ε) − cast(o), each row's sum over its value dims; [b, h].

        For |ε| = e it is e² + f (h − f), with h the spacing and f what e has beyond a multiple of h.
        """
        square = (self.u_p * self.p) ** 2 / 3 + self.underflow**2  # of the error of a weight
        values = square @ self.v**2
        if self.profile.row_sum == "rounded":
            values = values - 2 * self.out * (square @ self.v) + self.out**2 * square.sum(-1, keepdims=True)
        nu = np.sqrt(np.maximum(values, 0))
        spread = np.sqrt(np.maximum(self.magnitude**2 - self.out**2, 0))
        eta = self.weight_bias / np.where(self.p > 0, self.p, 1.0)
        with np.errstate(invalid="ignore"):
            moved = np.sqrt((self.p * eta**2).sum(-1, keepdims=True)) * spread
        e, h = nu + moved + self.relative * self.magnitude, self.spacing
        total = e**2 + np.minimum(h**2 / 4, h * e)
        if self.profile.output_rounding == "truncate":
            total = total + h**2 / 2  # rounded to nearest after all
        mean_square: Array = np.where(np.isnan(total), np.inf, total).sum(-1)
        return mean_square

    def error(self, out: Array) -> Array:
        """Of an output [b, 1, h, c], against the rounded exact result: its own rounding is not an error; [b, h, c]."""
        error: Array = out[:, 0] - self.rounded_out
        return error

    def lse_error(self, lse: Array) -> Array:
        """Of an LSE [b, h, 1]; [b, h]."""
        error: Array = lse[..., 0] - round_to(self.lse, self.profile.lse)
        return error
