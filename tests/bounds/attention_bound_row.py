"""The bound of attention for one row and value dim, in floats and loops, from docs/bounds.md alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.reference.formats import format_of

U64 = 2.0**-53


def unit(name: str) -> float:
    return format_of(name).unit_roundoff


def gamma(n: float, u: float) -> float:
    return n * u / (1 - n * u)


def dot_error(accumulator: Accumulator, n: int) -> float:
    """Γ of n products."""
    if accumulator.operands is None:
        return sum_error(accumulator, n)
    u, parts = unit(accumulator.operands), range(accumulator.operand_parts)
    u *= 2 if accumulator.operand_rounding == "truncate" else 1
    left, size = [u**i for i in range(len(parts) + 1)], [(1 + u) * u**i for i in parts]
    kept = [size[i] * size[j] for i in parts for j in parts if i + j < len(parts)]
    missing = left[-1] + math.fsum(size[i] * left[len(parts) - i] for i in parts)
    return missing + sum_error(accumulator, n * len(kept)) * math.fsum(kept)


def sum_error(accumulator: Accumulator, n: int) -> float:
    u, blocks = unit(accumulator.format), math.ceil(n / accumulator.block)
    return {
        "sequential": gamma(n, u),
        "blocked": gamma(accumulator.block + blocks, u),
        "tensor-core": blocks * (4 * (accumulator.block + 1) * 2.0**-accumulator.fraction_bits + 2.0**-23),
    }[accumulator.order]


def half_ulp(x: float, name: str) -> float:
    """Half the distance of the numbers of a format around x."""
    fmt = format_of(name)
    binade = max(math.frexp(x)[1] - 1, fmt.min_exponent) if x else fmt.min_exponent
    return math.ldexp(fmt.unit_roundoff, binade)


def dequantised(x: float, profile: Profile) -> float:
    """What rounding code times scale, x, to the format of the cache's rows changes."""
    if profile.cache_dequantised is None:
        return 0.0
    fmt = format_of(profile.cache_dequantised)
    if math.ldexp(math.frexp(x)[0], fmt.precision).is_integer():
        return 0.0
    return (fmt.unit_roundoff + 2 * unit(profile.softmax)) * abs(x) + fmt.smallest_subnormal / 2


def query_error(x: float, sharing: list[float], scale: float, profile: Profile) -> float:
    """What rounding an element x of q changes, where ``sharing`` have one scale with it."""
    fmt, u = format_of(profile.query), unit(profile.softmax)
    least = fmt.smallest_subnormal / 2
    if profile.query_scale != "none":
        least *= 2 * max(abs(y) for y in sharing) / fmt.max_finite
    elif profile.query_times_scale:
        least /= abs(scale)
    elif math.ldexp(math.frexp(x)[0], fmt.precision).is_integer():
        return 0.0
    error = max(abs(x) * fmt.unit_roundoff, least)
    if profile.query_scale == "none" and not profile.query_times_scale:
        return error
    return error + 4 * u * (abs(x) + error)


@dataclass(frozen=True)
class Row:
    """One query of one head; of the first ``seen`` of t keys those from ``first`` on are visible to it."""

    profile: Profile
    q: list[float]  # [d]
    k: list[list[float]]  # [t][d]
    v: list[list[float]]  # [t][dv]
    e_q: list[float]  # inherited errors, shaped as the operands
    e_k: list[list[float]]
    e_v: list[list[float]]
    seen: int
    scale: float  # σ
    sink: float
    outputs: int  # of the whole call
    first: int = 0

    @cached_property
    def t(self) -> int:
        return len(self.k)

    @cached_property
    def own(self) -> slice:
        """The visible keys."""
        return slice(self.first, self.seen)

    @cached_property
    def s(self) -> list[float]:
        return [self.scale * math.fsum(a * b for a, b in zip(self.q, key, strict=True)) for key in self.k[self.own]]

    @cached_property
    def m(self) -> float:
        return max(self.s)

    @cached_property
    def total(self) -> float:
        return math.fsum(math.exp(s - self.m) for s in self.s)

    @cached_property
    def lse(self) -> float:
        return self.m + math.log(self.total)

    @cached_property
    def p(self) -> list[float]:
        return [math.exp(s - self.m) / self.total for s in self.s]

    def mean(self, x: list[float]) -> float:
        """Σ p_j x_j."""
        return math.fsum(p * y for p, y in zip(self.p, x, strict=True))

    def column(self, d: int) -> list[float]:
        return [row[d] for row in self.v[self.own]]

    def out(self, d: int) -> float:
        return self.mean(self.column(d))

    # Rates

    @cached_property
    def u(self) -> float:
        return unit(self.profile.softmax)

    @cached_property
    def kappa(self) -> float:
        return (1 + unit(self.profile.score_format)) ** self.profile.score_roundings * (1 + self.u) ** 3 - 1

    @cached_property
    def gamma_qk(self) -> float:
        return dot_error(self.profile.score, len(self.q) + self.profile.operand_roundings)

    @cached_property
    def rescales(self) -> int:
        return math.ceil(self.t / self.profile.tile) if self.profile.tile else 0

    @cached_property
    def eps(self) -> float:
        return gamma(self.profile.exp_error * (1 + self.rescales) + 2 * self.rescales, self.u)

    @cached_property
    def gamma_pv(self) -> float:
        u_pv = unit(self.profile.value.format)
        narrower = gamma(self.rescales, u_pv) if u_pv > self.u else 0.0
        return (1 + dot_error(self.profile.value, self.t)) * (1 + narrower) - 1

    @cached_property
    def merges(self) -> int:
        every = self.profile.merge_every
        ring = self.profile.merge_shares == "sigmoid"
        splits = max(self.profile.splits - 1, 0) if ring else 1 if self.profile.splits > 1 else 0
        return splits + (math.ceil(self.t / every) if every else 0)

    @cached_property
    def split(self) -> float:
        """Error of the exponent lse of a part − lse."""
        u = max(self.u, unit(self.profile.lse))
        largest = max(abs(s) for s in self.s)
        steps = 4 if self.profile.merge_shares == "sigmoid" else 1
        return steps * self.merges * u * (2 * (largest + math.log(self.t)) + 2 + self.profile.exp_error)

    @cached_property
    def off(self) -> float:
        """How far a rounded maximum may be from the maximum."""
        return 0.0 if self.profile.maximum is None else 2 * unit(self.profile.maximum) * max(abs(s) for s in self.s)

    @cached_property
    def subtracted(self) -> float:
        """What rounding s − lse, or s − a rounded maximum, instead of s − m adds."""
        return self.u * (self.off + (self.lse - self.m if self.profile.row_sum == "lse" else 0.0))

    @cached_property
    def reference(self) -> float:
        """Errors of float64 scores as a share of those of the profile's."""
        return min(1.0, max(gamma(len(self.q), U64) / self.gamma_qk, U64 / self.u))

    # Weights

    @cached_property
    def delta(self) -> list[float]:
        """Δ_j."""
        found = []
        for s, key, e_key in zip(self.s, self.k[self.own], self.e_k[self.own], strict=True):
            gauge = inherited = 0.0
            for a, b, e_a, e_b in zip(self.q, key, self.e_q, e_key, strict=True):
                gauge += abs(self.scale) * (abs(a) + e_a) * (abs(b) + e_b)
                inherited += abs(self.scale) * (e_a * (abs(b) + e_b) + abs(a) * e_b)
            of_score = (1 + self.kappa) * (self.gamma_qk * gauge + inherited) + self.kappa * abs(s)
            found.append(of_score + self.u * (self.m - s) + self.subtracted + self.split)
        return found

    @cached_property
    def eta(self) -> list[float]:
        """η_j."""
        return [math.expm1(delta) * (1 + self.eps) + self.eps for delta in self.delta]

    @cached_property
    def surplus(self) -> float:
        """Σ p expm1(Δ)."""
        return self.mean([math.expm1(delta) for delta in self.delta])

    @cached_property
    def inverse(self) -> float:
        """1 over the least sum of the perturbed weights."""
        return (1 + self.surplus) / (1 - self.eps)

    @cached_property
    def lost(self) -> float:
        """What underflow takes from one weight, relative to the row sum: wide formats flush subnormals, narrow ones round."""
        fmt = format_of(self.profile.probabilities)
        wide = fmt.name in ("float64", "float32", "bfloat16")
        lost = fmt.smallest_normal if wide else fmt.smallest_subnormal / 2
        lost /= self.profile.probabilities_scale
        return (
            lost
            if self.profile.row_sum in ("normalised", "lse")
            else lost * self.inverse / self.total * math.exp(self.off)
        )

    @cached_property
    def u_p(self) -> float:
        return unit(self.profile.probabilities)

    @cached_property
    def rounded_sum(self) -> float:
        """Relative error of the row sum from rounding P."""
        return self.u_p + self.t * self.lost if self.profile.row_sum == "rounded" else 0.0

    def rounded_p(self, d: int) -> float:
        """R."""
        column = self.root_column(d)
        if self.profile.row_sum != "rounded":
            return self.u_p * self.gauge(d) + self.lost * column
        off = self.moved(d) + self.inherited(d)  # of the mean of the perturbed weights
        spread = self.u_p * (self.deviation(d) + self.inherited(d) + off)
        return (spread + self.lost * (column + self.t * (abs(self.out(d)) + off))) / (1 - self.rounded_sum)

    @cached_property
    def tail(self) -> float:
        """λ, for the most frequent key."""
        repeats = max(Counter(map(tuple, self.k)).values())
        return math.sqrt(2 * math.log(2 * self.outputs / 1e-9)) * math.sqrt(repeats)

    @cached_property
    def spreads(self) -> bool:
        """Whether exp(entropy) of the weight over distinct values of P is at least 8."""
        cells = Counter[int]()
        for s, p in zip(self.s, self.p, strict=True):
            cells[math.floor(s / (2 * self.u_p)) % 256] += p  # type: ignore[assignment]
        return math.exp(-math.fsum(mass * math.log(mass) for mass in cells.values())) >= 8

    def norm(self, sizes: list[float]) -> float:
        """λ sqrt(Σ p̂² x²)."""
        grown = [p * (1 + eta) * self.inverse for p, eta in zip(self.p, self.eta, strict=True)]
        return self.tail * math.sqrt(math.fsum((p * x) ** 2 for p, x in zip(grown, sizes[self.own], strict=True)))

    def probable_p(self, d: int) -> float:
        """R, where the roundings of the weights are independent."""
        moved, column = self.norm(self.sizes(d)), self.root_column(d)
        if self.profile.row_sum != "rounded":
            return self.u_p * moved + self.lost * column
        size = abs(self.out(d)) + self.moved(d) + self.inherited(d)
        moved += size * self.norm([1.0] * self.t)
        return (self.u_p * moved + self.lost * (column + self.t * size)) / (1 - self.rounded_sum)

    @cached_property
    def probable_sum(self) -> float:
        rounded = self.u_p * self.norm([1.0] * self.t) + self.t * self.lost
        return rounded if self.profile.row_sum == "rounded" else 0.0

    # Sums of one value dim

    def sizes(self, d: int) -> list[float]:
        """|v̂| of all keys."""
        return [abs(row[d]) + e_row[d] for row, e_row in zip(self.v, self.e_v, strict=True)]

    def root_column(self, d: int) -> float:
        """At least Σ |v̂|."""
        return math.sqrt(self.t * math.fsum(x * x for x in self.sizes(d)))

    def root_spread(self, d: int) -> float:
        """sqrt(Σ p (v − o)²), which the reference takes from a difference of squares."""
        v, o = self.column(d), self.out(d)
        slack = gamma(self.t + 16, U64) * (self.mean([x * x for x in v]) + o * o)
        return math.sqrt(self.mean([(x - o) ** 2 for x in v]) + slack)

    @cached_property
    def root_eta(self) -> float:
        """sqrt(Σ p η²)."""
        return math.sqrt(self.mean([eta * eta for eta in self.eta]))

    def moved(self, d: int) -> float:
        """N."""
        moved = self.root_eta * self.root_spread(d) * self.inverse
        return moved if self.profile.query is None else min(moved, self.moved_with_query(d))

    def moved_with_query(self, d: int) -> float:
        """N, with what an error of q that all keys share moves to first order."""
        channels = range(len(self.q))
        mean = [self.mean([key[i] for key in self.k[self.own]]) for i in channels]
        away = [[key[i] - mean[i] for i in channels] for key in self.k[self.own]]
        e = [abs(self.scale) * x for x in self.e_q]
        from_o = [x - self.out(d) for x in self.column(d)]
        linear = math.fsum(
            e[i] * abs(self.mean([a[i] * x for a, x in zip(away, from_o, strict=True)])) for i in channels
        )
        further = []
        for a, s, key, e_key in zip(away, self.s, self.k[self.own], self.e_k[self.own], strict=True):
            reach = math.fsum(x * abs(y) for x, y in zip(e, a, strict=True))
            gauge = inherited = 0.0
            for x, y, e_x, e_y in zip(self.q, key, self.e_q, e_key, strict=True):
                gauge += abs(self.scale) * (abs(x) + e_x) * (abs(y) + e_y)
                inherited += abs(self.scale) * (abs(x) + e_x) * e_y
            delta = (1 + self.kappa) * (self.gamma_qk * gauge + inherited) + self.kappa * abs(s)
            largest = math.fsum(x * max(abs(row[i]) for row in self.k) for i, x in enumerate(e))
            delta += (self.kappa + 2 * self.u) * largest + self.u * (self.m - s) + self.subtracted + self.split
            eta = math.expm1(delta) * (1 + self.eps) + self.eps
            further.append(math.exp(reach) - 1 - reach + math.exp(reach) * eta)
        rest = math.sqrt(self.mean([x * x for x in further]) * self.mean([x * x for x in from_o]))
        return (linear + rest) * (1 + 2.0**-30) * self.inverse

    def deviation(self, d: int) -> float:
        """Σ p̂|v − o|."""
        return (1 + self.root_eta) * self.root_spread(d) * self.inverse

    def inherited(self, d: int) -> float:
        """Σ p̂ e_v."""
        e = [row[d] for row in self.e_v[self.own]]
        return (self.mean(e) + self.root_eta * math.sqrt(self.mean([x * x for x in e]))) * self.inverse

    def gauge(self, d: int) -> float:
        """Σ p̂|v̂|."""
        return abs(self.out(d)) + self.deviation(d) + self.inherited(d)

    # Terms

    def lse_terms(self, rounded_sum: float) -> dict[str, float]:
        scores = math.log1p(self.surplus) - math.log1p(-self.eps) - math.log1p(-rounded_sum)
        size = 3 * abs(self.lse) + 2 * (abs(self.m) + self.off) + 2
        return {
            "error of the scores": scores,
            "row sum": -math.log1p(-gamma(self.t + 4, self.u)),
            "logarithm and its rounding": max(self.u, unit(self.profile.lse)) * size,
            "the reference's own float64": self.reference * scores + gamma(self.t + 16, U64) * size,
        }

    @cached_property
    def share(self) -> float:
        """What a sink leaves of the output."""
        return math.exp(self.lse) / (math.exp(self.lse) + math.exp(self.sink))

    @cached_property
    def shift(self) -> float:
        """Relative error of exp(s − sink), where the sink is the largest score, beside that of exp(s − m)."""
        further = max(self.sink - self.m, 0.0) + self.off_sink
        return math.expm1(self.u * further) if math.isfinite(self.sink) else 0.0

    @cached_property
    def off_sink(self) -> float:
        """How far a rounded maximum may be from that of the scores and the sink."""
        largest = max(abs(x) for x in (*self.s, self.sink))
        return 0.0 if self.profile.maximum is None else 2 * unit(self.profile.maximum) * largest

    def flushed(self, d: int) -> float:
        """What underflow takes from all weights together, where the sink is one of at least 1 in all."""
        if math.isinf(self.sink):
            return 0.0
        sizes = self.root_column(d)
        if self.profile.row_sum in ("normalised", "lse"):
            return self.lost * math.exp(self.off_sink) * sizes
        beside = self.lost * self.total * math.exp(self.off_sink - self.off)
        return beside * (sizes + (self.t * abs(self.out(d)) if self.profile.row_sum == "rounded" else 0.0))

    def share_error(self, lse_error: float) -> float:
        if math.isinf(self.sink):  # all, or none
            return 0.0 if self.sink > 0 else 4 * self.u + 4 * U64
        distance = lse_error + 4 * self.u * (abs(self.lse) + abs(self.sink))
        moved = math.expm1(distance) + self.profile.exp_error * self.u
        return (1 - self.share) * moved + 4 * self.u + 4 * U64

    def out_terms(self, d: int, rounding: float, lse_error: float, sink: bool) -> dict[str, float]:
        profile, o = self.profile, abs(self.out(d))
        accumulated = (1 + self.u_p) * self.gamma_pv * self.gauge(d)
        error = self.moved(d) + self.inherited(d) + rounding + accumulated
        parts = max(2, min(profile.splits, self.t))
        stored = unit(profile.split_format) + gamma(parts + 1, self.u)
        of_part = self.gauge(d)
        if profile.merge_shares == "sigmoid":
            stored += gamma(6, self.u)
            of_part = max(self.sizes(d))
        merged = self.merges * stored * (of_part + error)
        if profile.merge_shares == "unnormalised":
            merged += math.expm1(self.split) * (o + error)
        error += merged
        rho = gamma(self.t + 4, self.u)
        divided = rho / (1 - rho) * (o + error)
        if profile.row_sum == "lse":
            of_lse = self.u * (3 * abs(self.lse) + 2 * (abs(self.m) + self.off) + 2)
            divided = math.expm1(of_lse - math.log1p(-rho) - math.log1p(-self.eps)) * (o + error)
        error += divided
        share, share_error = (self.share, self.share_error(lse_error)) if sink else (1.0, 0.0)
        sunk = share * (share_error * (o + error) + 2 * self.shift * self.gauge(d)) + self.flushed(d) if sink else 0.0
        own = self.reference * self.moved(d) + gamma(self.t + 16, U64) * self.gauge(d)
        ulps = 1 if profile.output_rounding == "truncate" else 0.5
        terms = {
            "error of the scores": share * self.moved(d),
            "error of the operands": share * self.inherited(d),
            f"rounding of P to {profile.probabilities}": share * rounding,
            "accumulation of P·V": share * accumulated,
            "merging of parts by LSE": share * merged,
            "row sum and division": share * divided,
            "attention sink": sunk,
            "the reference's own float64": share * own,
            f"rounding of the output to {profile.output}": 2
            * ulps
            * half_ulp(share * (o + error) + sunk, profile.output),
        }
        return dict.fromkeys(terms, 0.0) if sink and self.sink == math.inf else terms
