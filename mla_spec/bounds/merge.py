"""The worst-case error of a merge of parts by their LSEs, computed as a profile says.

With M the largest LSE, u the roundoff of the softmax arithmetic and n parts:

    Δ_i = u (|L_i| + max(|M|, |lse|)) + γ_2 (lse − L_i)    error of an exponent L_i − M or L_i − lse, in base e or 2
    e   = log1p(Σ p_i expm1(Δ_i)) + ...                    error of the LSE before it is returned
    ζ_i = expm1(Δ_i + e)(1 + ε) + ε                        relative error of a share p_i = exp(L_i − lse)

Shares may be formed with the LSE itself and not normalised again, as kernels that combine splits do. Their errors then do
not cancel, so they count against |O_i| and not |O_i − out|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound, half_ulp, overflowed
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.merge import merge, merge_weights, part_columns
from mla_spec.reference.typing import Array, BoolArray

_OWN_EXP_ERROR = 4.0


@dataclass(frozen=True)
class BoundedMerge:
    """An exact merge and how far an implementation may be from it.

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
class Parts:
    """Parts as they may reach the merge, [parts, ..., h, s] but for outs: exact numbers, and the largest magnitudes.

    Where a part has no keys, magnitudes and errors are 0.
    """

    present: BoolArray
    exact_outs: Array  # [parts, ..., s, h, dv]
    exact_lses: Array  # −inf where a part has no keys
    exact_shares: Array
    exact_lse: Array  # [..., h, s]
    moved_outs: Array  # how far the outs may be from ``exact_outs``
    moved_lses: Array
    stretch: Array  # 1 + Σ_i p_i expm1(moved_lses), [..., h, s]
    lses: Array
    distances: Array  # lse − L_i
    shares: Array  # exp(L_i − lse)
    outs: Array  # [parts, ..., s, h, dv]
    largest: Array  # |M|, [..., h, s]
    lse: Array  # [..., h, s]
    log_total: Array  # lse − M, [..., h, s]

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, outs: Array, lses: Array, out_errors: Array | None, lse_errors: Array | None) -> Parts:
        """Of the arguments of ``merge_with_bound``."""
        shares, lse = merge_weights(outs, lses)
        present = ~np.isneginf(lses)  # [parts, ..., h, s]
        seen = ~np.isneginf(lse)  # [..., h, s]
        moved_lses = np.where(present, 0.0 if lse_errors is None else lse_errors, 0.0)
        moved_outs = np.where(part_columns(present), 0.0 if out_errors is None else out_errors, 0.0)
        outs = np.where(part_columns(present), outs, 0.0)
        largest_error = moved_lses.max(axis=0, initial=0)  # [..., h, s]
        excess = np.expm1(moved_lses)  # [parts, ..., h, s]
        stretch = 1 + (shares * excess).sum(axis=0)  # [..., h, s]
        return cls(
            present=present,
            exact_outs=outs,
            exact_lses=lses,
            exact_shares=shares,
            exact_lse=lse,
            moved_outs=moved_outs,
            moved_lses=moved_lses,
            stretch=stretch,
            lses=np.where(present, np.abs(lses), 0.0) + moved_lses,
            distances=np.where(present, lse - lses, 0.0) + moved_lses + np.log(stretch),
            shares=shares * (1 + excess) * stretch,
            outs=np.abs(outs) + moved_outs,
            largest=np.abs(np.where(seen, lses.max(axis=0, initial=-np.inf), 0.0)) + largest_error,
            lse=np.abs(np.where(seen, lse, 0.0)) + np.log(stretch),
            log_total=-np.log(shares.max(axis=0, initial=np.finfo(np.float64).tiny)) + largest_error + np.log(stretch),
        )

    @property
    def gauge(self) -> Array:
        """Σ_i p_i |O_i| before summation, [parts, ..., s, h, dv]."""
        return part_columns(self.shares) * self.outs

    def exponent_error(self, u: float) -> Array:
        """Δ: of an exponent L_i − M or L_i − lse in arithmetic with the roundoff u, [parts, ..., h, s].

        In base 2, L_i and M are rounded when multiplied by log2(e), whose own rounding multiplies their difference.
        """
        reach = self.lses + np.maximum(self.largest, self.lse)
        return u * (1 + gamma(2, u)) * reach + gamma(2, u) * self.distances


def merge_with_bound(
    outs: Array,
    lses: Array,
    profile: Profile,
    *,
    out_errors: Array | None = None,
    lse_errors: Array | None = None,
) -> BoundedMerge:
    """``merge`` and the worst-case error of computing it in the profile's softmax arithmetic.

    Args:
        outs, lses: those of ``merge``, exact as stored.
        out_errors, lse_errors: how far the parts that reach the merge may be from them, elementwise; 0 when None.

    Raises:
        ValueError: as ``merge``.
    """
    out, _ = merge(outs, lses)
    size = Parts.of(outs, lses, out_errors, lse_errors)
    with np.errstate(over="ignore", invalid="ignore"):
        # A changed LSE moves weight between parts: softmax is shift invariant, hence O_i − out.
        moved = part_columns(size.exact_shares * np.expm1(size.moved_lses) * size.stretch) * np.abs(
            size.exact_outs - out
        )
        inherited = (moved + part_columns(size.shares) * size.moved_outs).sum(axis=0)
        out_error, lse_error = _declared(size, inherited, np.log(size.stretch), out, profile)
    seen = ~np.isneginf(size.exact_lse)  # [..., h, s]
    return BoundedMerge(
        out=out,
        out_error=out_error.map(lambda x: np.where(part_columns(seen), x, 0.0)),
        lse=size.exact_lse,
        lse_error=lse_error.map(lambda x: np.where(seen, x, 0.0)),
    )


def _declared(
    size: Parts, inherited: Array, inherited_lse: Array, out: Array, profile: Profile
) -> tuple[ErrorBound, ErrorBound]:
    """The errors in the profile's arithmetic and the reference's own."""
    own_weights, own_sum, own_lse = _arithmetic(size, "float64", _OWN_EXP_ERROR)
    weights, weighted_sum, log = _arithmetic(size, profile.softmax, profile.exp_error)
    if profile.merge_shares == "sigmoid":
        weights, weighted_sum, log = _one_after_another(size, profile.softmax, profile.exp_error)
    lse_fmt = format_of(profile.lse)
    # An LSE in base 2 is multiplied by ln 2 before it is returned; log2(e), ln 2 and the product are rounded.
    returned = gamma(3, format_of(profile.softmax).unit_roundoff) * (size.lse + log)
    doubled = 2 if profile.output_rounding == "truncate" else 1
    before = inherited + weights + weighted_sum
    out_error = {
        "error of the parts": inherited,
        f"weights in {profile.softmax}": weights,
        f"weighted sum in {profile.softmax}": weighted_sum,
        f"rounding of the output to {profile.output}": doubled * half_ulp(np.abs(out) + before, profile.output),
        "the reference's own float64": own_weights + own_sum,
    }
    lse_error = {
        "error of the parts": inherited_lse,
        f"log-sum-exp in {profile.softmax}": log + returned,
        f"rounding of the LSE to {profile.lse}": lse_fmt.unit_roundoff * (size.lse + log + returned),
        "the reference's own float64": own_lse,
    }
    both = ({name: overflowed(term) for name, term in terms.items()} for terms in (out_error, lse_error))
    of_out, of_lse = (ErrorBound(terms) for terms in both)
    return of_out, of_lse


def _arithmetic(size: Parts, softmax: str, exp_error: float) -> tuple[Array, Array, Array]:
    """What the shares and the weighted sum cost the output, and the error of the LSE."""
    fmt, n = FORMATS[softmax], len(size.lses)
    u, eps = fmt.unit_roundoff, exp_error * fmt.unit_roundoff
    delta = size.exponent_error(u)
    log = np.log1p((size.shares * np.expm1(delta)).sum(axis=0)) - np.log1p(-eps) - np.log1p(-gamma(n, u))
    log = log + gamma(1, u) * (size.largest + size.lse) + eps * size.log_total  # [..., h, s]
    eps = eps + 3 * u  # the division by the total, or the rounding of 1 / total and of a product
    zeta = np.expm1(delta + log) * (1 + eps) + eps
    weights = (part_columns(zeta) * size.gauge).sum(axis=0)  # [..., s, h, dv]
    # Hardware may flush small weights and products to 0.
    flushed = fmt.smallest_normal * (size.outs.sum(axis=0) + n)
    weighted_sum = gamma(n, u) * (size.gauge.sum(axis=0) + weights) + flushed
    return weights, weighted_sum, log


def _one_after_another(size: Parts, softmax: str, exp_error: float) -> tuple[Array, Array, Array]:
    """The same of out − g (out − out'), lse − logsigmoid(l − l') with g = sigmoid(l' − l), over the parts in any order.

    LSEs of merged parts lie between the smallest of the parts and the lse, and their outputs between those of the parts.

    A difference d of two LSEs is off by u |d|. logsigmoid is off by as much again and by a few roundoffs, the new LSE by u |lse|.
    Errors of earlier LSEs reach the next with a weight of at most 1.

    The slope of g is at most 1/4, and at most 1/(4|d|). So g is off by a quarter of u and of what the LSEs are, and by exp's
    error. It moves out by that share of the difference of two outputs. In out − g (out − out') both outputs are rounded, whatever
    g is.
    """
    fmt, merges = FORMATS[softmax], max(len(size.lses) - 1, 0)
    u = fmt.unit_roundoff
    reach = np.where(size.present, size.distances, 0.0).max(axis=0, initial=0.0)  # [..., h, s]
    each = u * (3 * reach + size.largest + size.lse + exp_error + 4)
    log = merges * each * (1 + merges * u)
    largest = size.outs.max(axis=0, initial=0.0)  # [..., s, h, dv]
    weights = merges * part_columns((log + u) / 4 + (exp_error + 3) * u) * 2 * largest
    flushed = merges * fmt.smallest_normal * (1 + 2 * largest)
    weighted_sum = merges * gamma(3, u) * 2 * (largest + weights) + flushed
    return weights, weighted_sum, log
