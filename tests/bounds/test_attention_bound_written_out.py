"""Each term of the bound of attention, as docs/bounds.md says it, against the one that is computed for all rows at once.

That honest arithmetic stays within the bound and comes near it, other tests show. Here a term that lost an addend, a factor
or a sign differs from the same term written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.reference.typing import Array, IntArray
from tests.bounds.attention_bound_row import Row, dequantised, query_error

PROFILES = [
    Profile.default("float32"),
    Profile.default("float64"),
    Profile.default("float64", tile=2, splits=3, row_sum="rounded"),
    Profile.default("bfloat16"),
    Profile.default("bfloat16", row_sum="rounded", output="float32"),
    Profile.default("float16"),
    Profile.default("float16", row_sum="rounded"),
    Profile.default("float16", row_sum="normalised", score_format="float16", score_roundings=2),
    Profile.default("float32", probabilities="float8_e4m3fn", row_sum="rounded"),
    Profile.default("float32", probabilities="float8_e4m3fn"),
    Profile.default("float32", tile=2),
    Profile.default("bfloat16", tile=3, value=Accumulator(format="bfloat16"), softmax="float32"),
    Profile.default("bfloat16", tile=3, value=Accumulator(format="bfloat16"), softmax="bfloat16"),
    Profile.default("float32", splits=3, split_format="bfloat16"),
    Profile.default("float32", splits=64),
    Profile.default("bfloat16", splits=2, lse="bfloat16", merge_shares="normalised"),
    Profile.default("float32", merge_every=2),
    Profile.default("float32", merge_every=3, splits=4, lse="float16"),
    Profile.default("bfloat16", score_format="bfloat16", score_roundings=2),
    Profile.default("float32", score_roundings=0, operand_roundings=4),
    Profile.default("float64", score=Accumulator(format="float64", order="blocked", block=2)),
    Profile.default("bfloat16", score=Accumulator(order="tensor-core", block=4), output_rounding="truncate"),
    Profile.default("float32", value=Accumulator(order="tensor-core", block=2, fraction_bits=13)),
    Profile.default("float32", exp_error=1000.0),
    Profile.default("bfloat16", maximum="bfloat16", tile=2),
    Profile.default("float16", maximum="bfloat16", row_sum="lse", splits=2),
    Profile.default("float32", maximum="float16", probabilities="float16", row_sum="rounded"),
    Profile.default("float32", score=Accumulator(operands="tfloat32"), value=Accumulator(operands="bfloat16")),
    Profile.default("float32", score=Accumulator(operands="bfloat16", operand_parts=2, order="blocked", block=4)),
    Profile.default("float32", value=Accumulator(operands="tfloat32", operand_parts=3, operand_rounding="truncate")),
    Profile.default("bfloat16", cache_dequantised="bfloat16"),
    Profile.default("float32", cache_dequantised="float16"),
    Profile.default("float32", row_sum="lse"),
    Profile.default("float16", row_sum="lse", splits=3),
    Profile.default("float32", splits=4, merge_shares="sigmoid"),
    Profile.default("bfloat16", merge_every=2, merge_shares="sigmoid", split_format="bfloat16"),
    Profile.default("bfloat16", query="float8_e4m3fn", query_scale="head"),
    Profile.default("bfloat16", query="float8_e4m3fn", query_scale="token", tile=2, splits=3),
    Profile.default("float32", query="float8_e4m3fn", query_scale="tensor", cache_dequantised="bfloat16"),
    Profile.default("float32", query="float16"),
    Profile.default("float16", query="float16", query_times_scale=True, merge_every=2),
    Profile.default("float32", probabilities="float8_e4m3fn", probabilities_scale=256.0),
    Profile.default("float32", probabilities="float16", probabilities_scale=4.0, row_sum="normalised"),
]


SCALES = (0.3, -0.3)


@dataclass(frozen=True)
class Call:
    """Two sequences of three queries, four heads that share keys in two groups; the second sees one key with its last query."""

    q: Array  # [b, s, h, d]
    k: Array  # [b, t, g, d]
    v: Array  # [b, t, g, dv]
    inherited: InheritedError | None
    attn_sink: Array | None  # [h]
    seqlens: IntArray  # [b]
    scale: float
    window: int | None = None

    def bounded(self, profile: Profile, **options: Any) -> BoundedAttention:
        return attention_with_bound(
            self.q,
            self.k,
            self.v,
            softmax_scale=self.scale,
            profile=profile,
            cache_seqlens=self.seqlens,
            window=self.window,
            inherited=self.inherited,
            attn_sink=self.attn_sink,
            sink_joins=True,
            **options,
        )

    def row(self, profile: Profile, b: int, i: int, head: int) -> Row:
        s, h = self.q.shape[1:3]
        group = head // (h // self.k.shape[2])
        none = InheritedError(0 * self.q, 0 * self.k, 0 * self.v)
        errors = self.inherited or none
        k, v = self.k[b, :, group].tolist(), self.v[b, :, group].tolist()

        def with_cache(x: list[list[float]], e: Array) -> list[list[float]]:
            rows = zip(x, e.tolist(), strict=True)
            return [[b + dequantised(a, profile) for a, b in zip(*pair, strict=True)] for pair in rows]

        seen = max(int(self.seqlens[b]) - s + 1 + i, 0)
        return Row(
            profile=profile,
            q=self.q[b, i, head].tolist(),
            k=k,
            v=v,
            e_q=[e + self.rounding(j, b, i, head, profile) for j, e in enumerate(errors.q[b, i, head].tolist())],
            e_k=with_cache(k, errors.k[b, :, group]),
            e_v=with_cache(v, errors.v[b, :, group]),
            seen=seen,
            first=max(seen - (self.window or seen), 0),
            scale=self.scale,
            sink=-math.inf if self.attn_sink is None else float(self.attn_sink[head]),
            outputs=self.q[..., 0].size * self.v.shape[-1],
        )

    def rounding(self, index: int, b: int, i: int, head: int, profile: Profile) -> float:
        """What the profile's rounding of an element of q changes, which may be off itself."""
        if profile.query is None:
            return 0.0
        size = np.abs(self.q) + (0.0 if self.inherited is None else self.inherited.q)
        shared = {"tensor": size, "token": size[b, i], "head": size[b, i, head], "none": size}[profile.query_scale]
        return query_error(size[b, i, head, index], shared.ravel().tolist(), self.scale, profile)


def call(inherited: bool, sink: bool, scale: float, t: int = 7, logit_std: float = 2.0) -> Call:
    """Scores of either sign; in the second sequence all keys but a few are numbers of any narrow format."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4, 6), (2, t, 2, 6), (2, t, 2, 3)))
    v += [1.0, -1.0, 0.5]
    k[1, ::2], v[1, 1::2] = np.round(2 * k[1, ::2]) / 2, np.round(2 * v[1, 1::2]) / 2
    errors = InheritedError(*(rng.uniform(0, 2e-3, x.shape) for x in (q, k, v)))
    sinks = np.array([0.7, -np.inf, 9.0, np.inf])
    q *= logit_std * 6**-0.5 / abs(scale)
    return Call(q, k, v, errors if inherited else None, sinks if sink else None, np.array([t, 1]), scale)


def check(got: ErrorBound, index: tuple[int, ...], want: dict[str, float]) -> None:
    """Float64 on both sides, in another order: 10^-10 is far above its rounding, and below one roundoff of float32 in any term."""
    assert got.terms.keys() == want.keys()
    for name, term in want.items():
        assert math.isclose(got.terms[name][index], term, rel_tol=1e-10), (name, got.terms[name][index], term)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("inherited", [False, True], ids=["exact", "inherited"])
@pytest.mark.parametrize("profile", PROFILES, ids=Profile.describe)
def test_terms_are_those_written_out(profile: Profile, inherited: bool, sink: bool, scale: float) -> None:
    require_written_out(call(inherited, sink, scale), profile, sink)


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("profile", PROFILES, ids=Profile.describe)
def test_terms_of_a_window_are_those_written_out(profile: Profile, sink: bool, window: int) -> None:
    """Keys before it weigh nothing; blocks of three of them are wholly before it, or in part."""
    require_written_out(replace(call(True, sink, 0.3), window=window), profile, sink)


def require_written_out(case: Call, profile: Profile, sink: bool) -> None:
    """Every term of every element."""
    bounded = case.bounded(profile, block_size=3)
    for b, i, head, d in np.ndindex(bounded.out.shape):
        row = case.row(profile, b, i, head)
        if row.seen == 0:
            assert bounded.lse[b, head, i] == -math.inf
            check(bounded.lse_error, (b, head, i), dict.fromkeys(bounded.lse_error.terms, 0.0))
            check(bounded.out_error, (b, i, head, d), dict.fromkeys(bounded.out_error.terms, 0.0))
            continue
        assert math.isclose(bounded.lse[b, head, i], row.lse, rel_tol=1e-13)
        assert math.isclose(bounded.out[b, i, head, d], (row.share if sink else 1.0) * row.out(d), rel_tol=1e-13)
        lse_terms = row.lse_terms(row.rounded_sum)
        check(bounded.lse_error, (b, head, i), lse_terms)
        out_terms = row.out_terms(d, row.rounded_p(d), sum(lse_terms.values()), sink)
        check(bounded.out_error, (b, i, head, d), out_terms)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("inherited", [False, True], ids=["exact", "inherited"])
@pytest.mark.parametrize("row_sum", ["rounded", "unrounded"])
@pytest.mark.parametrize("probabilities", ["bfloat16", "float16"])
def test_terms_of_the_probable_bound_are_those_written_out(
    probabilities: str, row_sum: Any, inherited: bool, sink: bool, scale: float
) -> None:
    """1000 keys, two of them equal, have independent roundings; a single key has not, and keeps the worst case."""
    profile = Profile.default("bfloat16", probabilities=probabilities, row_sum=row_sum)
    case = call(inherited, sink, scale, t=1000, logit_std=0.5)
    case.k[0, 7] = case.k[0, 950]
    bounded = case.bounded(profile, probable=True)
    unless_asked_for = case.bounded(profile)
    assert unless_asked_for.out_error_probable is unless_asked_for.out_error
    assert unless_asked_for.lse_error_probable is unless_asked_for.lse_error
    head, i, d = 0, 2, 2
    for b in (0, 1):
        row = case.row(profile, b, i, head)
        assert row.spreads == (b == 0)
        rounding, rounded_sum = row.rounded_p(d), row.rounded_sum
        if row.spreads:
            assert row.probable_p(d) < rounding
            rounding, rounded_sum = row.probable_p(d), min(row.probable_sum, rounded_sum)
        lse_terms = row.lse_terms(rounded_sum)
        check(bounded.lse_error_probable, (b, head, i), lse_terms)
        out_terms = row.out_terms(d, rounding, sum(lse_terms.values()), sink)
        check(bounded.out_error_probable, (b, i, head, d), out_terms)
