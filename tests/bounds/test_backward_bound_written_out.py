"""The bound of attention's gradients, against the same written out for one head, row and key at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.attention_backward import BackwardAttention, attention_backward_with_bound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Accumulator, Profile, gamma
from mla_spec.bounds.running import Bounded
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.typing import Array
from tests.bounds.written_out import (
    U64,
    Number,
    assert_same,
    dot,
    exact,
    numbers,
    perhaps_stored,
    size,
    stored,
    times,
    total,
)


@dataclass(frozen=True)
class Case:
    """Operands [s or t, heads, dims], how many keys each query sees, and how far the operands may be off."""

    q: Array
    k: Array
    v: Array
    out_grad: Array
    seen: list[int]
    error: float = 0.0
    scale: float = 0.4
    lse_grad: Array | None = None  # [h, s]
    sink: Array | None = None  # [h]

    def bounded(self, x: Array) -> Bounded:
        return Bounded(x, self.error * np.abs(x))

    @property
    def inherited(self) -> InheritedError:
        return InheritedError(*(self.bounded(x).error for x in (self.q, self.k, self.v)))


@dataclass(frozen=True)
class Row:
    """One query of one head; D, dS and P of docs/bounds.md, with the numbers of each key it sees."""

    case: Case
    profile: Profile
    query: int
    head: int

    @cached_property
    def group(self) -> int:
        return self.head * self.case.k.shape[1] // self.case.q.shape[1]

    @cached_property
    def seen(self) -> int:
        return self.case.seen[self.query]

    @cached_property
    def u(self) -> float:
        return FORMATS[self.profile.softmax].unit_roundoff

    @cached_property
    def eps(self) -> float:
        """Of exp, and of an online softmax, which rescales at each tile."""
        tiles = math.ceil(len(self.case.k) / self.profile.tile) if self.profile.tile else 0
        return gamma(self.profile.exp_error * (1 + tiles) + 2 * tiles, self.u)

    @cached_property
    def kappa(self) -> float:
        stored_score = FORMATS[self.profile.score_format].unit_roundoff
        return float((1 + stored_score) ** self.profile.score_roundings * (1 + self.u) ** 3 - 1)

    def rate(self, n: int) -> float:
        """Of n products, and of the scale before or after them."""
        n += self.profile.operand_roundings + 2
        return max(self.profile.score.relative_error(n), self.profile.value.relative_error(n))

    @cached_property
    def q(self) -> list[Number]:
        rows: list[Number] = numbers(self.case.bounded(self.case.q))[self.query][self.head]
        return rows

    @cached_property
    def keys(self) -> list[list[Number]]:
        return [row[self.group] for row in numbers(self.case.bounded(self.case.k))[: self.seen]]

    @cached_property
    def values(self) -> list[list[Number]]:
        return [row[self.group] for row in numbers(self.case.bounded(self.case.v))[: self.seen]]

    @cached_property
    def do(self) -> list[Number]:
        rows: list[Number] = numbers(self.case.bounded(self.case.out_grad))[self.query][self.head]
        return rows

    @cached_property
    def scores(self) -> list[Number]:
        """Δ, but for what subtracting the maximum or the LSE rounds."""
        gamma_qk = self.profile.score.relative_error(len(self.q) + self.profile.operand_roundings)
        products = [dot(self.q, key, gamma_qk) for key in self.keys]
        scale = self.case.scale
        return [
            (scale * value, (1 + self.kappa) * abs(scale) * error + self.kappa * abs(scale * value))
            for value, error in products
        ]

    def forward(self, sink: Array | None) -> tuple[Number, list[Number]]:
        """(LSE, out before it is stored), of the bound of attention itself."""
        case, (i, a, b) = self.case, (self.query, self.head, self.group)
        off = case.inherited
        got = attention_with_bound(
            case.q[i : i + 1, a : a + 1],
            case.k[:, b : b + 1],
            case.v[:, b : b + 1],
            softmax_scale=case.scale,
            profile=replace(self.profile, output="float64", output_rounding="nearest"),
            cache_seqlens=self.seen,
            causal=False,
            inherited=InheritedError(off.q[i : i + 1, a : a + 1], off.k[:, b : b + 1], off.v[:, b : b + 1]),
            attn_sink=None if sink is None else sink[a : a + 1],
        )
        out = numbers(Bounded(got.out, got.out_error.total))[0][0]
        return (float(got.lse[0, 0]), float(got.lse_error.total[0, 0])), out

    @cached_property
    def lse(self) -> Number:
        return self.forward(None)[0]

    def out(self, sink: Array | None) -> list[Number]:
        """As it may be stored."""
        return [perhaps_stored(x, self.profile.output, self.profile.output_rounding) for x in self.forward(sink)[1]]

    @cached_property
    def weights(self) -> list[Number]:
        """P without a sink, off by ζ, and by what underflows."""
        gamma_qk = self.profile.score.relative_error(len(self.q) + self.profile.operand_roundings)
        own = min(1.0, max(gamma(len(self.q), U64) / gamma_qk, U64 / self.u))  # float64 as a share of the profile's
        lse, off = self.lse
        result = []
        for s, delta in self.scores:
            p = math.exp(s - lse)
            exponent = delta + off + self.u * (abs(s - lse) + 3 * abs(lse))
            zeta = math.expm1(exponent) * (1 + self.eps) + self.eps + 2 * self.u
            result.append((p, p * zeta * (1 + own) + FORMATS[self.profile.softmax].smallest_normal))
        return result

    @cached_property
    def share(self) -> Number:
        """What a sink leaves of the row; its error is that of the LSE times what the sink takes, and a few roundoffs."""
        if self.case.sink is None:
            return exact(1.0)
        sink, (lse, off) = float(self.case.sink[self.head]), self.lse
        share = 1 / (1 + math.exp(sink - lse)) if sink < math.inf else 0.0
        sizes = abs(lse) + (abs(sink) if math.isfinite(sink) else 0.0)
        relative = (1 - share) * math.expm1(off + 4 * self.u * sizes) + self.eps + 4 * (self.u + U64)
        return share, share * relative

    def narrow(self, x: Number) -> Number:
        """Perhaps in the format of P; with a sink perhaps at another size, where neighbours are u apart, relatively."""
        name = self.profile.probabilities
        once = perhaps_stored(x, name)
        if self.share[1] == 0:
            return once
        return x[0], max(once[1], x[1] + FORMATS[name].unit_roundoff * size(x))

    @cached_property
    def p(self) -> list[Number]:
        return [self.narrow(times(p, self.share, self.u)) for p in self.weights]

    @cached_property
    def dp(self) -> list[Number]:
        return [self.narrow(dot(self.do, value, self.rate(len(self.do)))) for value in self.values]

    @cached_property
    def gauge(self) -> float:
        """Σ P|dP|, at least |D| whether a sink has taken its share or not."""
        return sum(p * size(dp) for (p, _), dp in zip(self.weights, self.dp, strict=True))

    def row_sum(self, products: list[Number], n: int) -> Number:
        return total(products, gamma(n + 2, self.u) + gamma(n + 8, U64))

    @cached_property
    def mean(self) -> Number:
        """D; the keys that the row does not see count as terms of its sums."""
        t, (share, off) = len(self.case.k), self.share

        def of_weights(weights: list[Number]) -> Number:
            return self.row_sum([times(p, dp, self.u) for p, dp in zip(weights, self.dp, strict=True)], t)

        def of_out(sink: Array | None) -> float:
            products = [times(a, b, self.u) for a, b in zip(self.do, self.out(sink), strict=True)]
            return self.row_sum(products, len(products))[1]

        value, error = of_weights(self.p)
        error = max(error, of_out(self.case.sink))
        if off > 0:
            taken = (1 - share) * of_out(None) + (2 * off / share + 8 * self.u) * self.gauge
            error = max(error, of_weights([self.narrow(p) for p in self.weights])[1] + taken)
        return value, error

    @cached_property
    def dlse(self) -> Number:
        if self.case.lse_grad is None:
            return exact(0.0)
        value = float(self.case.lse_grad[self.head, self.query])
        return value, self.case.error * abs(value)

    @cached_property
    def ds(self) -> list[Number]:
        """Times the scale."""
        highest = max(s - delta for s, delta in self.scores)
        sizes = [size(dp) + self.gauge + self.mean[1] + size(self.dlse) for dp in self.dp]
        # Plain steps subtract the row's largest score, whose own gradient is 0 but for rounding.
        of_largest = sum(size(p) * each for p, each in zip(self.weights, sizes, strict=True)) * (self.share[0] > 0)
        result = []
        for j, (s, delta) in enumerate(self.scores):
            dp, p = self.dp[j], self.weights[j]
            centred = dp[0] - self.mean[0], dp[1] + self.mean[1] + 4 * (self.u + U64) * sizes[j]
            value, error = times(self.p[j], centred, 4 * self.u)
            if self.case.lse_grad is not None:
                of_lse = times(p, self.dlse, 4 * self.u)
                value, error = value + of_lse[0], error + of_lse[1]
            if s + delta >= highest:
                error += gamma(2 * len(self.case.k) + 8, self.u) * of_largest
            scaled = times(self.of_format((value, error)), exact(self.case.scale), 2 * self.u)
            result.append(self.of_format(scaled))
        return result

    def of_format(self, x: Number) -> Number:
        """Perhaps in that of P, and perhaps in that of the scores."""
        once = perhaps_stored(x, self.profile.probabilities)
        same = self.profile.score_format == self.profile.probabilities
        return once if same else perhaps_stored(once, self.profile.score_format)

    @cached_property
    def dq(self) -> list[Number]:
        """Of keys that the row does not see, dS is exactly 0."""
        if self.seen == 0:
            return [exact(0.0)] * len(self.q)
        t = len(self.case.k)
        unseen = [exact(0.0)] * (t - self.seen)
        return [dot(self.ds + unseen, [key[i] for key in self.keys] + unseen, self.rate(t)) for i in range(len(self.q))]


def of_keys(rows: list[list[Row]], case: Case, profile: Profile, which: str) -> Any:
    """DK or dV before it is stored: Σ over the queries of each head, then over the heads that share the key.

    ``rows`` are those of each query of each head.
    """
    s, h, d = (case.q if which == "k" else case.out_grad).shape
    t, g = case.k.shape[:2]
    heads = h // g

    def of_head(a: int, j: int, i: int) -> Number:
        weights = [
            exact(0.0) if j >= row.seen else (row.ds if which == "k" else row.p)[j]
            for row in (rows[a][x] for x in range(s))
        ]
        others = [(row.q if which == "k" else row.do)[i] for row in rows[a]]
        each = dot(weights, others, rows[a][0].rate(heads * s))
        return perhaps_stored(each, profile.dtype, profile.output_rounding) if heads > 1 else each

    def of_key(j: int, b: int, i: int) -> Number:
        if j >= max(case.seen):
            return exact(0.0)
        each = [of_head(a, j, i) for a in range(b * heads, (b + 1) * heads)]
        return total(each, gamma(heads - 1, rows[0][0].u) + gamma(heads, U64))

    return [[[of_key(j, b, i) for i in range(d)] for b in range(g)] for j in range(t)]


def written_out(case: Case, profile: Profile) -> tuple[Any, Any, Any]:
    """(dQ, dK, dV) before they are stored."""
    s, h = case.q.shape[:2]
    rows = [[Row(case, profile, i, a) for i in range(s)] for a in range(h)]
    dq = [[rows[a][i].dq for a in range(h)] for i in range(s)]
    return dq, of_keys(rows, case, profile, "k"), of_keys(rows, case, profile, "v")


def case(dtype: str = "bfloat16", h: int = 2, g: int = 2, causal: bool = True, **changes: Any) -> Case:
    """Three queries of five keys, dims of four and three."""
    rng = np.random.default_rng(3)
    s, t, d, dv = 3, 5, 4, 3
    q, k, v, out_grad = (
        round_to(rng.standard_normal(shape), dtype) for shape in ((s, h, d), (t, g, d), (t, g, dv), (s, h, dv))
    )
    seen = [max(0, t - s + 1 + i) for i in range(s)] if causal else [t] * s
    return replace(Case(q, k, v, out_grad, seen), **changes)


def options(case: Case) -> dict[str, Any]:
    return {
        "softmax_scale": case.scale,
        "cache_seqlens": max(case.seen),
        "causal": len(set(case.seen)) > 1,
        "inherited": case.inherited if case.error else None,
        "out_grad_error": case.bounded(case.out_grad).error if case.error else None,
        "lse_grad_error": None if case.lse_grad is None or not case.error else case.bounded(case.lse_grad).error,
    }


def gradients(case: Case, profile: Profile) -> tuple[Bounded, Bounded, Bounded]:
    arguments = options(case)
    errors = {name: arguments.pop(name) for name in ("out_grad_error", "lse_grad_error")}
    attention = BackwardAttention.of(case.q, case.k, case.v, profile=profile, attn_sink=case.sink, **arguments)
    return attention.gradients(case.out_grad, lse_grad=case.lse_grad, **errors)


LSE_GRAD = np.array([[0.5, -1.0, 0.0], [2.0, 0.25, -0.125]])


def with_a_far_key(case: Case) -> Case:
    """The errors of key 2's weights are about as large as the smallest normal number of float32."""
    q, k = case.q.copy(), case.k.copy()
    q[..., 0], k[2, :, 0] = 4.0, -46.0
    return replace(case, q=q, k=k)


CASES = {
    "plain": case(),
    "not causal": case(causal=False),
    "gradient of the LSE": case(lse_grad=LSE_GRAD),
    "shared heads": case(h=4, g=2, lse_grad=np.concatenate([LSE_GRAD, -LSE_GRAD])),
    "one group": case(h=2, g=1),
    "rows without keys": case(seen=[0, 0, 1]),
    "errors of operands": case(error=2.0**-9, lse_grad=LSE_GRAD),
    "negative scale": case(scale=-0.4, error=2.0**-9, lse_grad=LSE_GRAD),
    "negative scale and sink": case(scale=-0.4, sink=np.array([0.5, 3.0]), causal=False),
    "sink": case(sink=np.array([0.5, 3.0]), causal=False),
    "infinite sinks": case(sink=np.array([np.inf, -np.inf]), causal=False, lse_grad=LSE_GRAD),
    "sink of shared heads": case(h=4, g=2, sink=np.array([0.5, -3.0, 2.0, 9.0]), causal=False),
    "weights that underflow": with_a_far_key(case(causal=False)),
}
PROFILES = {
    "float64": Profile.default("float64"),
    "float32": Profile.default("float32"),
    "bfloat16": Profile.default("bfloat16"),
    "float16": Profile.default("float16"),
    "wide P": Profile.default("bfloat16", probabilities="float32"),
    "narrow scores": Profile.default("float16", score_format="bfloat16", score_roundings=2),
    "truncated": Profile.default("bfloat16", output_rounding="truncate", output="float16"),
    "tiles": Profile.default("float32", tile=2, exp_error=64.0, lse="bfloat16"),
    "scaled operands": Profile.default(
        "float32",
        operand_roundings=4,
        score=Accumulator(order="blocked", block=4),
        value=Accumulator(order="tensor-core", block=4),
    ),
    "bfloat16 throughout": Profile.default(
        "bfloat16", softmax="bfloat16", score=Accumulator(format="bfloat16"), value=Accumulator(format="bfloat16")
    ),
    "sums of scores are coarser": Profile.default("float32", score=Accumulator(order="tensor-core", block=2)),
}


@pytest.mark.parametrize(
    ("name", "profile"),
    dict.fromkeys(
        [
            *itertools.product(CASES, ["float64", "bfloat16"]),
            *itertools.product(["gradient of the LSE", "sink"], PROFILES),
            *itertools.product(["shared heads"], ["truncated", "bfloat16 throughout"]),
            ("weights that underflow", "float32"),
        ]
    ),
)
def test_bound_of_the_gradients_written_out(name: str, profile: str) -> None:
    for got, want in zip(
        gradients(CASES[name], PROFILES[profile]), written_out(CASES[name], PROFILES[profile]), strict=True
    ):
        assert_same(got, want, rtol=1e-9 if profile == "float64" else 1e-6)


@pytest.mark.parametrize("profile", ["bfloat16", "truncated"])
@pytest.mark.parametrize("name", ["errors of operands", "rows without keys", "not causal"])
def test_gradients_are_stored_once(name: str, profile: str) -> None:
    case, declared = CASES[name], PROFILES[profile]
    got = attention_backward_with_bound(
        case.q, case.k, case.v, case.out_grad, profile=declared, lse_grad=case.lse_grad, **options(case)
    )
    for x, unstored in zip(got, gradients(case, declared), strict=True):
        want = [stored(n, "bfloat16", declared.output_rounding) for n in numbers(unstored.reshape(-1))]
        assert_same(x.reshape(-1), want)


def test_queries_are_causal_and_see_all_keys_unless_told_otherwise() -> None:
    case, declared = CASES["plain"], PROFILES["bfloat16"]
    got = attention_backward_with_bound(
        case.q, case.k, case.v, case.out_grad, profile=declared, softmax_scale=case.scale
    )
    for x, unstored in zip(got, gradients(case, declared), strict=True):
        np.testing.assert_array_equal(x.value, unstored.value)


def test_what_no_query_sees_has_no_error_whatever_is_unknown_of_the_rest() -> None:
    case = CASES["rows without keys"]
    attention = BackwardAttention.of(
        case.q, case.k, case.v, profile=PROFILES["bfloat16"], softmax_scale=case.scale, cache_seqlens=1
    )
    with np.errstate(invalid="ignore"):
        dq, dk, dv = attention.gradients(case.out_grad, np.full(case.out_grad.shape, np.inf))
    for unseen in (dq[:2], dk[1:], dv[1:]):
        assert not unseen.error.any()
    assert not np.isfinite(dv.error[0]).any()
