"""The worst-case bound of attention: no honest kernel exceeds it, and wrong ones do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound, half_ulp
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Accumulator, Profile, gamma
from mla_spec.proof.emulated import EmulatedAttention, Schedule
from mla_spec.reference.attention import attention
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array
from tests.bounds.emulated_cases import (
    KERNELS,
    Inputs,
    attend,
    bounded,
    excess,
    excesses,
    inputs,
    one_row,
    spread,
)

LOGIT_STDS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1e3, 1e4)


@pytest.mark.parametrize("name", KERNELS)
def test_honest_kernels_stay_within_the_bound(name: str) -> None:
    kernel = KERNELS[name]
    for std, seed in itertools.product(LOGIT_STDS, range(4)):
        worst = max(excesses(kernel, inputs(seed, kernel.profile.dtype, std)))
        assert worst <= 1, f"{worst} times the bound at logit std {std}, seed {seed}"


def most_adverse(case: Inputs, profile: Profile, direction: int) -> tuple[Array, Array]:
    """(out [dv], lse) of one row with every error that ``profile`` admits at its largest and all in one direction.

    Each element of out has its own kernel: weights of values above the result grow, those below shrink.
    """
    (q,), k, v = case.q[:, 0], case.k[:, 0], case.v[:, 0]  # [d], [t, d], [t, dv]
    t, d = k.shape
    u, u_s = format_of(profile.softmax).unit_roundoff, format_of(profile.score_format).unit_roundoff
    u_p = format_of(profile.probabilities).unit_roundoff
    s, gauge = case.scale * (k @ q), case.scale * (np.abs(k) @ np.abs(q))  # [t]
    out, lse = attention(case.q, case.k, case.v, softmax_scale=case.scale)
    out, lse = out[0, 0], lse[0]

    def weights(sign: Array) -> tuple[Array, Array]:
        """(weights, their maximal score), every score moved by ``sign``; [t, ·]."""
        accumulated = profile.score.relative_error(d) * gauge[:, None]
        stored = (1 + u) ** 2 * (1 + u_s) ** profile.score_roundings - 1  # the scale, its product, and storing it
        moved = s[:, None] + sign * (accumulated + stored * (np.abs(s)[:, None] + accumulated))
        m = moved.max(axis=0)
        return np.exp((moved - m) * (1 - sign * u)) * (1 + sign * profile.exp_error * u), m

    sign = direction * np.where(v >= out, 1.0, -1.0)  # [t, dv]
    p, _ = weights(sign)
    rounded = p * (1 + sign * u_p / (1 + u_p))
    numerator = (rounded * v).sum(0) + direction * profile.value.relative_error(t) * np.abs(rounded * v).sum(0)
    total = (rounded if profile.row_sum == "rounded" else p).sum(0)
    away = direction * np.sign(numerator)
    moved_out = numerator / (total * (1 - away * gamma(t - 1, u))) * (1 + away * u)
    moved_out = moved_out + away * half_ulp(np.abs(moved_out), profile.output)
    p, m = weights(np.full((t, 1), direction))
    if profile.row_sum == "rounded":
        p = p * (1 + direction * u_p / (1 + u_p))
    log_total = np.log(p.sum(0) * (1 + direction * gamma(t - 1, u)))
    moved_lse = m + log_total * (1 + direction * u * np.sign(log_total))
    moved_lse = moved_lse * (1 + 2 * direction * u * np.sign(moved_lse))
    return moved_out, moved_lse


ADVERSE_PROFILES = [
    Profile.default("float32"),
    Profile.default("float32", row_sum="rounded"),
    Profile.default("bfloat16"),
    Profile.default("bfloat16", row_sum="rounded"),
    Profile.default("bfloat16", probabilities="float32"),
    Profile.default("float32", score_format="bfloat16", score_roundings=2),
    Profile.default("float32", score=Accumulator(format="bfloat16")),
    Profile.default("float32", value=Accumulator(format="bfloat16")),
    Profile.default("float32", exp_error=1000.0),
]


@pytest.mark.parametrize("profile", ADVERSE_PROFILES, ids=Profile.describe)
def test_all_errors_at_their_largest_stay_within_the_bound(profile: Profile) -> None:
    for std, seed, direction in itertools.product(LOGIT_STDS, range(4), (1, -1)):
        case = one_row(seed, std, t=[1, 2, 7, 40][seed])
        out, lse = most_adverse(case, profile, direction)
        want = bounded(case, profile)
        assert (np.abs(out - want.out[0, 0]) <= want.out_error.total[0, 0]).all(), (std, seed, direction)
        assert (np.abs(lse - want.lse[0]) <= want.lse_error.total[0]).all(), (std, seed, direction)


@pytest.mark.parametrize("profile", ADVERSE_PROFILES, ids=Profile.describe)
def test_bound_is_attained_within_a_factor_of_two(profile: Profile) -> None:
    """Half the values +1 and half -1 under equal weights: the sums of |v - o| are exact, so nothing hides looseness.

    A factor of two is what a bound of this kind may lose and still have power: the faults below stand out by more.
    """
    case = one_row(5, 1.0, t=40, two_valued=True)
    out, lse = most_adverse(case, profile, 1)
    want = bounded(case, profile)
    assert (2 * np.abs(out - want.out[0, 0]) >= want.out_error.total[0, 0]).all()
    assert (2 * np.abs(lse - want.lse[0]) >= want.lse_error.total[0]).all()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("direction", [1, -1])
def test_errors_of_the_operands_stay_within_the_bound(size: float, direction: int) -> None:
    """q, k and v moved by as much as they may have inherited, in the direction that moves each element of out most."""
    for std, seed in itertools.product((0.1, 1.0, 4.0, 64.0, 1e3), range(4)):
        case = one_row(seed, std, t=[1, 2, 7, 40][seed])
        rng = np.random.default_rng(seed)
        inherited = InheritedError(*(np.abs(x) * size * rng.uniform(0, 1, x.shape) for x in (case.q, case.k, case.v)))
        want = bounded(case, Profile.default("float64"), inherited=inherited)
        p = np.exp(case.scale * case.k[:, 0] @ case.q[0, 0] - want.lse[0, 0])  # [t]
        worst = 0.0
        for d, o in enumerate(want.out[0, 0]):
            above = direction * np.where(case.v[:, 0, d] >= o, 1.0, -1.0)  # [t]
            gradient = (p * (case.v[:, 0, d] - o)) @ case.k[:, 0]
            q = case.q + direction * np.sign(gradient) * inherited.q
            k = case.k + above[:, None, None] * np.sign(case.q[0]) * inherited.k
            v = case.v + direction * inherited.v
            moved, lse = attention(q, k, v, softmax_scale=case.scale)
            worst = max(worst, abs(moved[0, 0, d] - o) / want.out_error.total[0, 0, d])
            worst = max(worst, abs(lse - want.lse).item() / want.lse_error.total.item())
        assert worst <= 1, (std, seed)


def test_error_of_the_operands_is_attained_within_a_factor_of_two() -> None:
    case = one_row(5, 1.0, t=40, two_valued=True)
    size = 1e-4
    inherited = InheritedError(*(np.full(x.shape, size) for x in (case.q, case.k, case.v)))
    want = bounded(case, Profile.default("float64"), inherited=inherited)
    k = case.k + np.sign(case.v[:, :, :1]) * np.sign(case.q[0]) * size
    moved, _ = attention(case.q, k, case.v + size, softmax_scale=case.scale)
    assert (moved - want.out > size).all()
    # q moves every score of equal keys alike, which the bound cannot know.
    without_q = bounded(case, Profile.default("float64"), inherited=replace(inherited, q=0 * case.q))
    assert (2 * (moved - want.out) >= without_q.out_error.total).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("std", [16.0, 64.0, 256.0, 1e3, 1e4])
def test_scale_off_by_a_thousandth_exceeds_the_bound(dtype: str, std: float) -> None:
    kernel = EmulatedAttention(Profile.default(dtype))
    for seed in range(4):
        case = inputs(seed, dtype, std, t=64)
        _, lse = attend(kernel, case, softmax_scale=case.scale * 1.001)
        want = bounded(case, kernel.profile)
        assert excess(lse, want.lse, want.lse_error) > 1, seed


@pytest.mark.parametrize("std", [1.0, 4.0, 16.0])
def test_scale_off_by_a_thousandth_exceeds_the_bound_of_a_float32_output(std: float) -> None:
    """In out alone. A bfloat16 output cannot show it: rounding P and out already moves it by more."""
    kernel = EmulatedAttention(Profile.default("float32"))
    for seed in range(4):
        case = inputs(seed, "float32", std, t=64)
        out, _ = attend(kernel, case, softmax_scale=case.scale * 1.001)
        want = bounded(case, kernel.profile)
        assert excess(out, want.out, want.out_error) > 1, seed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("std", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("keys", [-1, 1])
def test_lost_or_extra_key_exceeds_the_bound(dtype: str, std: float, keys: int) -> None:
    kernel = EmulatedAttention(Profile.default(dtype))
    for seed in range(4):
        case = replace(inputs(seed, dtype, std, t=64), seqlen=60)
        _, lse = attend(kernel, case, cache_seqlens=60 + keys)
        want = bounded(case, kernel.profile)
        assert excess(lse, want.lse, want.lse_error) > 1, seed


def test_lost_key_exceeds_the_bound_of_a_bfloat16_output() -> None:
    """One of 16 keys with equal scores: each value that stands out by more than 3 % shows it in out too."""
    kernel = EmulatedAttention(Profile.default("bfloat16"))
    k = np.zeros((16, 1, 8))
    v = np.ones((16, 1, 4))
    v[3] = 8
    case = Inputs(np.ones((1, 1, 8)), k, v, 1.0, 16)
    out, _ = attend(kernel, replace(case, k=np.delete(k, 3, axis=0), v=np.delete(v, 3, axis=0), seqlen=15))
    want = bounded(case, kernel.profile)
    assert excess(out, want.out, want.out_error) > 1


def products(operands: str | None = None, **options: Any) -> dict[str, Accumulator]:
    """P·V of operands in such a format."""
    return {"value": Accumulator(operands=operands, **options)}


def between_numbers(t: int, excess: float) -> Inputs:
    """Weights and values of which each exceeds a power of two by ``excess``, which rounding should take away, but for the first."""
    k = np.append(0.0, np.full(t, math.log((1 + excess) / 2)))[:, None, None]
    v = np.full((t + 1, 1, 1), 1 + excess)
    return Inputs(np.ones((1, 1, 1)), *(round_to(x, "float32") for x in (k, v)), 1.0, t + 1)


def unequal_heads() -> Inputs:
    """The first head's query is far smaller than the second's: below the codes of their common scale."""
    q = np.ones((1, 2, 1)) * np.array([2.0**-18, 2.0])[:, None]
    k = np.linspace(-3e5, 3e5, 16)[:, None, None]
    v = np.sign(k) + 2.0
    return Inputs(q, round_to(k, "float32"), v, 1.0, 16)


def small_weights() -> Inputs:
    """A heaviest key of value 0, and many that weigh a little more than half of what float8 can hold."""
    k = np.append(np.full(4000, math.log(0.7 * 2.0**-9)), 0.0)[:, None, None]
    v = np.append(np.ones(4000), 0.0)[:, None, None]
    return Inputs(np.ones((1, 1, 1)), round_to(k, "float32"), v, 1.0, 4001)


def one_light_part() -> Inputs:
    """Two parts of one key; the first has no weight, and a large value."""
    k, v = np.array([-1000.0, 0.0])[:, None, None], np.array([1e4, 1.0 / 3])[:, None, None]
    return Inputs(np.ones((1, 1, 1)), *(round_to(x, "float32") for x in (k, v)), 1.0, 2)


UNDECLARED: dict[str, tuple[dict[str, Any], Profile, Inputs]] = {
    # name: (what the kernel does otherwise, what it declares, a case that shows it)
    "bfloat16 accumulation of P·V": (
        {"value": Accumulator(format="bfloat16")},
        Profile.default("bfloat16", tile=16),
        spread(512),
    ),
    "truncated output": (
        {"output_rounding": "truncate"},
        Profile.default("bfloat16", probabilities="float32"),
        spread(33),
    ),
    "truncated output after rounded P in both sums": (
        {"output_rounding": "truncate"},
        Profile.default("bfloat16", row_sum="rounded"),
        spread(33),
    ),
    "bfloat16 P": ({"probabilities": "bfloat16"}, Profile.default("float32"), spread(33)),
    "float16 P": ({"probabilities": "float16"}, Profile.default("float32"), spread(33)),
    "row sum of unrounded P": (
        {"row_sum": "unrounded"},
        Profile.default("float32", probabilities="bfloat16", row_sum="rounded"),
        spread(9),
    ),
    "scores stored in bfloat16": (
        {"score_format": "bfloat16", "score_roundings": 2},
        Profile.default("float32"),
        spread(33),
    ),
    "parts stored in bfloat16": (
        {"split_format": "bfloat16"},
        Profile.default("float32", splits=3),
        spread(33),
    ),
    "bfloat16 output": ({"output": "bfloat16"}, Profile.default("float32"), spread(33)),
    "weights exp(s − lse) that nothing divides": (
        {"row_sum": "lse"},
        Profile.default("float32"),
        Inputs(np.ones((1, 1, 1)), np.full((33, 1, 1), -30000.0), np.ones((33, 1, 1)), 1.0, 33),
    ),
    "a ring of parts": (
        {"merge_shares": "sigmoid"},
        Profile.default("float32", splits=2, merge_shares="normalised"),
        one_light_part(),
    ),
    "query in float8": (
        {"query": "float8_e4m3fn", "query_scale": "head"},
        Profile.default("float32"),
        spread(33),
    ),
    "one scale for all heads of a token": (
        {"query": "float8_e4m3fn", "query_scale": "tensor"},
        Profile.default("float32", query="float8_e4m3fn", query_scale="head"),
        unequal_heads(),
    ),
    "scaled query rounded to bfloat16": (
        {"query": "bfloat16", "query_times_scale": True},
        Profile.default("bfloat16", probabilities="float32", output="float32"),
        replace(spread(33), scale=0.7),
    ),
    "P in float8 that is not scaled": (
        {"probabilities_scale": 1.0},
        Profile.default("float32", probabilities="float8_e4m3fn", probabilities_scale=256.0),
        small_weights(),
    ),
    "products in tfloat32": (products("tfloat32"), Profile.default("float32"), between_numbers(30, 0.95 * 2.0**-11)),
    "products in bfloat16 for tfloat32": (
        products("bfloat16"),
        Profile.default("float32", **products("tfloat32")),
        between_numbers(30, 0.95 * 2.0**-8),
    ),
    "operands truncated to tfloat32": (
        products("tfloat32", operand_rounding="truncate"),
        Profile.default("float32", **products("tfloat32")),
        between_numbers(30, 0.95 * 2.0**-10),
    ),
    "one product in bfloat16 for three": (
        products("bfloat16"),
        Profile.default("float32", **products("bfloat16", operand_parts=2)),
        between_numbers(30, 0.95 * 2.0**-8),
    ),
    "three products in bfloat16 for six": (
        products("bfloat16", operand_parts=2),
        Profile.default("float32", **products("bfloat16", operand_parts=3)),
        between_numbers(3, 2.0**-9 * (1 + 0.95 * 2.0**-8)),
    ),
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_arithmetic_that_is_not_declared_exceeds_the_bound(name: str) -> None:
    actual, declared, case = UNDECLARED[name]
    kernel = EmulatedAttention(replace(declared, **actual), Schedule(stepwise="value" in actual))
    assert excesses(kernel, case)[0] <= 1  # honest about itself ...
    assert excesses(kernel, case, declared)[0] > 1  # ... and not as declared


def test_lse_in_bfloat16_must_be_declared() -> None:
    kernel = EmulatedAttention(Profile.default("bfloat16", lse="bfloat16"))
    case = spread(33)
    assert excesses(kernel, case)[1] <= 1
    assert excesses(kernel, case, Profile.default("bfloat16"))[1] > 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("std", [1e4, 1e30, 1e150])
def test_bound_is_a_number_or_infinite_for_logits_of_any_size(name: str, std: float) -> None:
    profile = KERNELS[name].profile
    for seed in range(2):
        case = one_row(seed, std, t=9)
        want = bounded(case, profile)
        for error in (want.out_error.total, want.lse_error.total):
            assert not np.isnan(error).any()
            assert (error > 0).all()
    # q in 8 bits moves scores of this size by more than exp can take.
    if std == 1e4 and profile.score_format == "float32" and profile.query is None:
        assert np.isfinite(want.out_error.total).all()
        assert np.isfinite(want.lse_error.total).all()


@pytest.mark.parametrize("row_sum", ["rounded", "unrounded"])
@pytest.mark.parametrize(("probabilities", "keys"), [("float16", 400), ("float8_e4m3fn", 4096)])
def test_weights_lost_to_underflow_are_in_the_bound(probabilities: str, keys: int, row_sum: Any) -> None:
    """Weights below half the smallest number carry the whole output; the largest weight has value 0.

    In float8 they weigh 4 times as much as the largest.
    """
    kernel = EmulatedAttention(Profile.default("float32", probabilities=probabilities, row_sum=row_sum))
    lost = math.log(0.49 * format_of(probabilities).smallest_subnormal)
    k = np.append(np.full(keys, lost), 0.0)[:, None, None]
    v = np.append(np.ones(keys), 0.0)[:, None, None]
    case = Inputs(np.ones((1, 1, 1)), round_to(k, "float32"), v, 1.0, keys + 1)
    out, _ = attend(kernel, case)
    assert (out == 0).all()
    assert (bounded(case, kernel.profile).out > 5e-6).all()
    assert max(excesses(kernel, case)) <= 1


def test_weights_that_are_divided_before_they_are_rounded_lose_more_to_underflow() -> None:
    """256 leading keys of value 0 make the other weights, of 2^-17 before the division, less than float16 holds."""
    kernel = EmulatedAttention(Profile.default("float16", row_sum="normalised"))
    k, v = (np.repeat(values, (256, 4000))[:, None, None] for values in ((0.0, -12.0), (0.0, 1.0)))
    case = Inputs(np.ones((1, 1, 1)), k, v, 1.0, 4256)
    assert (attend(kernel, case)[0] == 0).all()
    assert max(excesses(kernel, case)) <= 1
    assert excesses(kernel, case, Profile.default("float16"))[0] > 1


def test_rounding_p_in_both_sums_moves_errors_of_the_values_too() -> None:
    """Values of 0 that may be off: nothing deviates from the exact output, but from the one that is computed."""
    profile = Profile.default("float32", probabilities="bfloat16", row_sum="rounded")
    k = np.log(np.array([1.0, 0.5 * (1 + 1.001 * 2.0**-8)]))[:, None, None]  # the second weight is rounded up by 2^-8
    case = Inputs(np.ones((1, 1, 1)), round_to(k, "float32"), np.zeros((2, 1, 1)), 1.0, 2)
    off = np.array([0.0, 1.0])[:, None, None]
    want = bounded(case, profile, inherited=InheritedError(0 * case.q, 0 * case.k, off))
    out, _ = attend(EmulatedAttention(profile), replace(case, v=off))
    assert out > want.out_error.terms["error of the operands"] * (1 + 2.0**-10)
    assert out <= want.out_error.total


def test_a_cache_without_keys_is_exact() -> None:
    want = bounded(one_row(3, 1.0, t=0), Profile.default("bfloat16", row_sum="rounded"), probable=True)
    assert (want.lse == -np.inf).all()
    for error in (want.out_error, want.lse_error, want.out_error_probable, want.lse_error_probable):
        assert (error.total == 0).all()


@pytest.mark.filterwarnings("error")
def test_errors_too_large_for_float64_give_an_infinite_bound() -> None:
    """bfloat16 sums of scores of 1e6: an error of thousands, whose exponential overflows."""
    case = one_row(3, 1e6, t=40)
    profile = Profile.default("float32", score=Accumulator(format="bfloat16"))
    want = bounded(case, profile)
    _, lse = most_adverse(case, profile, 1)
    assert np.abs(lse - want.lse[0]) > 700
    assert (want.lse_error.total == np.inf).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("t", [124, 150, 300])
def test_row_sums_too_long_for_their_format_have_no_bound(t: int) -> None:
    """Of 128 numbers γ is 1 in bfloat16, and of 256 or more it is infinite."""
    want = bounded(one_row(3, 1.0, t=t), Profile.default("bfloat16", softmax="bfloat16", exp_error=0.0))
    assert (want.out_error.terms["row sum and division"] == np.inf).all()
    assert (want.lse_error.terms["row sum"] == np.inf).all()
    assert (want.out_error.total == np.inf).all()


@pytest.mark.filterwarnings("error")
def test_row_sums_of_weights_that_may_all_be_lost_have_no_bound() -> None:
    """One key is seen, but 2000 weights of 2^-10 might be rounded to 0."""
    case = replace(one_row(3, 1.0, t=2000), seqlen=1)
    want = bounded(case, Profile.default("float32", probabilities="float8_e4m3fn", row_sum="rounded"))
    assert (want.out_error.terms["rounding of P to float8_e4m3fn"] == np.inf).all()
    assert (want.lse_error.terms["error of the scores"] == np.inf).all()


@pytest.mark.parametrize("row_sum", ["rounded", "unrounded"])
def test_rows_without_keys_are_exact(row_sum: Any) -> None:
    case = replace(inputs(2, "bfloat16", 1.0, t=9), seqlen=1)
    want = bounded(case, Profile.default("bfloat16", row_sum=row_sum, tile=4, splits=2))
    assert (want.lse[:, 0] == -np.inf).all()
    assert (want.out[0] == 0).all()
    for term in (*want.out_error.terms.values(), want.out_error.total):
        assert (term[0] == 0).all()
    for term in (*want.lse_error.terms.values(), want.lse_error.total):
        assert (term[:, 0] == 0).all()
    assert (want.out_error.total[1] > 0).all()


@pytest.mark.parametrize("block_size", [1, 5, 512])
def test_bound_comes_with_the_exact_result_in_any_blocks(block_size: int) -> None:
    case = inputs(3, "float32", 4.0, t=33)
    profile = Profile.default("float32")
    want, one = bounded(case, profile, block_size=block_size), bounded(case, profile)
    out, lse = attention(
        case.q, case.k, case.v, softmax_scale=case.scale, cache_seqlens=case.seqlen, block_size=block_size
    )
    # Both are float64 attention, over columns of another width: BLAS may sum in another order.
    own = bounded(case, Profile.default("float64", tile=block_size))
    assert (np.abs(want.out - out) <= 2 * own.out_error.total).all()
    assert (np.abs(want.lse - lse) <= 2 * own.lse_error.total).all()
    # Bounds are float64 sums of positive terms; a per cent tells a lost block from their rounding.
    np.testing.assert_allclose(want.out_error.total, one.out_error.total, rtol=1e-2)
    np.testing.assert_allclose(want.lse_error.total, one.lse_error.total, rtol=1e-2)


def test_bound_of_leading_axes_is_that_of_each_sequence() -> None:
    cases = [inputs(seed, "bfloat16", 4.0, t=9) for seed in (8, 11)]
    cases = [replace(case, q=case.q[..., :4], k=case.k[:, :1, :4], v=case.v[:, :1]) for case in cases]
    profile = Profile.default("bfloat16", row_sum="rounded")
    stacked = attention_with_bound(
        np.stack([case.q for case in cases]),
        np.stack([case.k for case in cases]),
        np.stack([case.v for case in cases]),
        softmax_scale=0.5,
        profile=profile,
        cache_seqlens=np.array([case.seqlen for case in cases]),
    )
    for b, case in enumerate(cases):
        one = bounded(replace(case, scale=0.5), profile)
        np.testing.assert_allclose(stacked.out_error.total[b], one.out_error.total, rtol=1e-6)
        np.testing.assert_allclose(stacked.lse_error.total[b], one.lse_error.total, rtol=1e-6)


def test_map_reaches_all_that_is_bounded() -> None:
    want = bounded(inputs(3, "bfloat16", 1.0, t=33), Profile.default("bfloat16"), probable=True)
    mapped = want.map(lambda x: x[1:], lambda x: x[:1])
    np.testing.assert_array_equal(mapped.out, want.out[1:])
    np.testing.assert_array_equal(mapped.lse, want.lse[:1])
    for kind in ("out_error", "out_error_probable"):
        np.testing.assert_array_equal(getattr(mapped, kind).total, getattr(want, kind).total[1:])
    for kind in ("lse_error", "lse_error_probable"):
        np.testing.assert_array_equal(getattr(mapped, kind).total, getattr(want, kind).total[:1])


def test_error_bound_sums_and_names_its_terms() -> None:
    bound = ErrorBound({"a": np.array([1.0, np.inf, 0.0]), "b": np.array([2.0, 1.0, 5.0])})
    assert bound.total.tolist() == [3.0, np.inf, 5.0]
    assert [bound.main_term((i,)) for i in range(3)] == ["b", "a", "b"]
    assert bound.plus("c", np.array([3.0, 0.0, 0.0])).total[0] == 6.0
    assert bound.map(lambda x: x[2:]).total.tolist() == [5.0]
    assert bound[2:].total.tolist() == [5.0]
    assert list(bound.terms) == ["a", "b"]


def rounded_up(t: int) -> Array:
    """Float32 numbers, half near 1 and half near -1, whose running sum in float32 is always rounded up by half an ulp."""
    total, numbers = 0.0, []
    for j in range(t):
        near = total + (0.95 if j < t // 2 else -0.95)
        ulp = float(np.spacing(np.float32(max(abs(near), 1.0))))
        steps = [(math.floor(near / ulp) + 0.5) * ulp + tiny for tiny in (2.0**-24, 2.0**-23)]
        exact = [total + float(np.float32(step - total)) for step in steps]
        gains = [float(np.float32(x)) - x for x in exact]
        best = gains.index(max(gains))
        numbers.append(exact[best] - total)
        total = float(np.float32(exact[best]))
    return np.array(numbers)


@pytest.mark.parametrize("order", ["sequential", "blocked"])
def test_sum_over_many_parts_is_in_the_bound(order: Any) -> None:
    """A key in each of 2048 parts: their merge adds as many numbers, whatever the order of sums within a part."""
    t = 2048
    profile = Profile.default("float32", splits=t, value=Accumulator(order=order, block=16))
    case = Inputs(np.zeros((1, 1, 1)), np.zeros((t, 1, 1)), rounded_up(t)[:, None, None], 1.0, t)
    kernel = EmulatedAttention(profile)
    assert np.abs(attend(kernel, case)[0] - case.v.mean()).max() > 300 * 2.0**-24
    assert max(excesses(kernel, case)) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{"splits": 4}, {"merge_every": 8}], ids=str)
def test_merge_by_shares_that_do_not_add_up_to_one_is_in_the_bound(dtype: str, changes: dict[str, int]) -> None:
    """With scores of 1e4 an LSE in float32 is off by 5e-4, and so is every share; far values show it."""
    kernel = EmulatedAttention(Profile.default(dtype, output="float32", **changes), Schedule(shares_from_lse=True))
    for std, seed in itertools.product(LOGIT_STDS, range(4)):
        case = inputs(seed, dtype, std, t=33, v_mean=30.0)
        assert max(excesses(kernel, case)) <= 1, (std, seed)


@pytest.mark.parametrize("above", [0.0, 3.0, 12.0, 40.0])
@pytest.mark.parametrize("probabilities", ["float32", "float16"])
def test_a_kernel_with_the_sink_among_its_scores_stays_inside(probabilities: str, above: float) -> None:
    """The sink is the largest score by ``above``; beside it, weights of float16 lose bits, and in the end are 0."""
    rng = np.random.default_rng(21)
    q, k, v = (round_to(rng.standard_normal(shape), "float32") for shape in ((1, 1, 8), (40, 1, 8), (40, 1, 3)))
    scores = (k[:, 0] @ q[0, 0]).astype(np.float32)
    sink = np.float32(scores.max()) + np.float32(above)
    p = round_to(np.exp(scores - sink).astype(float), probabilities).astype(np.float32)
    out = (p @ v[:, 0].astype(np.float32)) / (p.sum() + np.float32(1))
    profile = Profile.default("float32", probabilities=probabilities, row_sum="rounded")
    options: Any = {"softmax_scale": 1.0, "profile": profile, "attn_sink": np.array([float(sink)])}
    bounded = attention_with_bound(q, k, v, sink_joins=True, **options)
    assert (np.abs(out - bounded.out[0, 0]) <= bounded.out_error.total[0, 0]).all()
    apart = attention_with_bound(q, k, v, **options)
    outside = (np.abs(out - apart.out[0, 0]) > apart.out_error.total[0, 0]).any()
    assert outside == (probabilities == "float16" and above >= 12), "what is multiplied at the end loses no weight"
