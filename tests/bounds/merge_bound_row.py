"""The bound of a merge written out for one row in plain floats, and rows to try it on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import FORMATS
from mla_spec.reference.typing import Array
from tests.bounds.bound_terms import UNIT_ROUNDOFF, gamma, half_ulp

FLOAT32, FLOAT16 = Profile.default("float32"), Profile.default("float16")
PROFILES = {
    "float64": Profile.default("float64"),
    "float32": FLOAT32,
    "bfloat16": Profile.default("bfloat16", exp_error=1.5),
    "truncated output": replace(FLOAT16, output_rounding="truncate"),
    "softmax in float16": replace(
        FLOAT16, softmax="float16", exp_error=2.0
    ),  # whose smallest weights are not negligible
    "softmax in bfloat16": replace(FLOAT32, softmax="bfloat16", exp_error=0.5),
    "LSE in bfloat16": replace(FLOAT16, lse="bfloat16"),
    "ring": replace(FLOAT32, merge_shares="sigmoid"),
    "ring in float16": replace(FLOAT16, merge_shares="sigmoid", softmax="float16"),
}
INF = math.inf
ROWS = {  # LSEs of the four parts
    "near": [0.3, -1.2, 0.9, 0.1],
    "far below": [-5e2, -5.01e2, -7e2, -5e2],
    "far above": [3e2, 2e2, 3.01e2, -1e2],
    "one": [-INF, -INF, 2.5, -INF],
    "some": [0.25, -INF, -INF, -3.0],
    "none": [-INF, -INF, -INF, -INF],
}
S, H, DV = 2, 3, 5


def operands() -> tuple[Array, Array, Array, Array]:
    """Outs [4, s, h, dv] and lses [4, h, s] of ``ROWS``, and errors of both."""
    rng = np.random.default_rng(1)
    lses = np.array(list(ROWS.values())).T.reshape(4, H, S)
    outs = rng.standard_normal((4, S, H, DV)) * np.exp(rng.standard_normal((4, S, H, DV)))
    return outs, lses, rng.uniform(0, 0.1, outs.shape), rng.uniform(0, 0.2, lses.shape)


class Row:
    """The bound of one row, from docs/bounds.md: outs and errors [parts][dv], LSEs and errors [parts]."""

    def __init__(
        self,
        outs: list[list[float]],
        lses: list[float],
        out_errors: list[list[float]],
        lse_errors: list[float],
        out: list[float],
        lse: float,
    ) -> None:
        self.n, self.out = len(lses), out
        self.parts = [i for i in range(self.n) if lses[i] > -INF]
        m = max(lses[i] for i in self.parts)
        total = sum(math.exp(lses[i] - m) for i in self.parts)
        share = {i: math.exp(lses[i] - m) / total for i in self.parts}
        # Of the parts: their outputs' weighted errors, and weight that moves between them.
        stretch = 1 + sum(share[i] * math.expm1(lse_errors[i]) for i in self.parts)
        grown = {i: share[i] * math.exp(lse_errors[i]) * stretch for i in self.parts}
        self.inherited_lse = math.log(stretch)
        self.inherited = [
            sum(
                grown[i] * out_errors[i][d] + share[i] * math.expm1(lse_errors[i]) * stretch * abs(outs[i][d] - out[d])
                for i in self.parts
            )
            for d in range(len(out))
        ]
        # The largest that anything may be when it reaches the merge.
        largest_error = max(lse_errors[i] for i in self.parts)
        self.share = grown
        self.outs = {i: [abs(x) + e for x, e in zip(outs[i], out_errors[i], strict=True)] for i in self.parts}
        self.lses = {i: abs(lses[i]) + lse_errors[i] for i in self.parts}
        self.below = {i: lse - lses[i] + lse_errors[i] + self.inherited_lse for i in self.parts}  # lse − L_i
        self.largest = abs(m) + largest_error
        self.lse = abs(lse) + self.inherited_lse
        self.log_total = math.log(total) + self.inherited_lse + largest_error  # lse − M

    def exponents(self, u: float) -> dict[int, float]:
        """Δ of docs/bounds.md, of each part."""
        return {
            i: u * (1 + gamma(2, u)) * (self.lses[i] + max(self.largest, self.lse)) + gamma(2, u) * self.below[i]
            for i in self.parts
        }

    def arithmetic(self, softmax: str, exp_error: float) -> tuple[list[float], list[float], float]:
        """(error of the shares, of the weighted sum, of the LSE before it is returned)."""
        u = UNIT_ROUNDOFF[softmax]
        eps = exp_error * u
        exponent = self.exponents(u)  # 1.
        log = (  # 2.
            math.log1p(sum(self.share[i] * math.expm1(exponent[i]) for i in self.parts))
            - math.log1p(-eps)
            - math.log1p(-gamma(self.n, u))
            + gamma(1, u) * (self.largest + self.lse)
            + eps * self.log_total
        )
        eps += 3 * u
        zeta = {i: math.expm1(exponent[i] + log) * (1 + eps) + eps for i in self.parts}  # 3.
        moved = [sum(zeta[i] * self.share[i] * self.outs[i][d] for i in self.parts) for d in range(len(self.out))]
        summed = []  # 4.
        for d, error in enumerate(moved):
            gauge = sum(self.share[i] * self.outs[i][d] for i in self.parts)
            lost = FORMATS[softmax].smallest_normal * (self.n + sum(self.outs[i][d] for i in self.parts))
            summed.append(gamma(self.n, u) * (gauge + error) + lost)
        return moved, summed, log

    def ring(self, softmax: str, exp_error: float) -> tuple[list[float], list[float], float]:
        """The same where parts are merged one after the other by sigmoids."""
        u, merges = UNIT_ROUNDOFF[softmax], self.n - 1
        reach = max(self.below.values())
        each = 3 * u * reach + u * self.largest + u * self.lse + (exp_error + 4) * u
        log = merges * (1 + merges * u) * each
        share = log / 4 + u / 4 + (exp_error + 3) * u
        largest = [max(self.outs[i][d] for i in self.parts) for d in range(len(self.out))]
        moved = [merges * share * 2 * x for x in largest]
        least = FORMATS[softmax].smallest_normal
        summed = [
            merges * (2 * gamma(3, u) * (x + error) + least * (1 + 2 * x))
            for x, error in zip(largest, moved, strict=True)
        ]
        return moved, summed, log

    def terms(self, profile: Profile) -> tuple[dict[str, list[float]], dict[str, float]]:
        by = self.ring if profile.merge_shares == "sigmoid" else self.arithmetic
        moved, summed, log = by(profile.softmax, profile.exp_error)
        own_moved, own_summed, own_log = self.arithmetic("float64", 4.0)
        before = [sum(x) for x in zip(self.inherited, moved, summed, strict=True)]
        factor = 2 if profile.output_rounding == "truncate" else 1
        returned = gamma(3, UNIT_ROUNDOFF[profile.softmax]) * (self.lse + log)
        out_terms = {
            "error of the parts": self.inherited,
            f"weights in {profile.softmax}": moved,
            f"weighted sum in {profile.softmax}": summed,
            f"rounding of the output to {profile.output}": [
                factor * half_ulp(abs(o) + e, profile.output) for o, e in zip(self.out, before, strict=True)
            ],
            "the reference's own float64": [a + b for a, b in zip(own_moved, own_summed, strict=True)],
        }
        lse_terms = {
            "error of the parts": self.inherited_lse,
            f"log-sum-exp in {profile.softmax}": log + returned,
            f"rounding of the LSE to {profile.lse}": UNIT_ROUNDOFF[profile.lse] * (self.lse + log + returned),
            "the reference's own float64": own_log,
        }
        return out_terms, lse_terms
