"""The statistical tests: p-values are valid, honest kernels pass, small faults do not, and the level is split as planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.bias import spread_error
from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.bounds.statistics import FAMILY_ALPHA, bias_p_value, excess_p_value
from mla_spec.installed import all_laws
from mla_spec.judging.law import Law, Options
from mla_spec.judging.run import run_law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.proof.emulated import EmulatedKernel, Schedule
from mla_spec.properties import test_statistics as laws
from mla_spec.reference.typing import Array
from mla_spec.subjects.contract import profile_of, supports_of
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import DTYPES

SMALL = (
    laws.Design(seed=7, rows=128, heads=8, keys=200, logit_std=2.0),
    laws.Design(seed=8, rows=64, heads=32, keys=1024, logit_std=0.5),
    laws.Design(seed=9, rows=128, heads=8, keys=600, logit_std=4.0),
)
"""Cases that no law has."""


@pytest.mark.parametrize("level", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "signs"])
def test_bias_p_value_is_valid_for_symmetric_errors(draw: str, level: float) -> None:
    rng = np.random.default_rng(0)
    runs, n = 4000, 20
    draws = rng.choice([-1.0, 1.0], (runs, n)) if draw == "signs" else getattr(rng, draw)((runs, n))
    share = np.mean([bias_p_value(errors, np.zeros(n)) <= level for errors in draws])
    assert share <= level + 3 * np.sqrt(level / runs)


def test_bias_p_value_is_valid_for_the_largest_bias_allowed() -> None:
    rng = np.random.default_rng(1)
    allowance = rng.uniform(0, 2, (4000, 30))
    errors = allowance + rng.standard_normal((4000, 30))
    p_values = [bias_p_value(e, a) for e, a in zip(errors, allowance, strict=True)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05
    assert bias_p_value(3 * allowance[0] + 0.5, allowance[0]) < 0.05


def test_bias_p_value_does_not_trust_a_few_large_errors() -> None:
    one, many = np.zeros(100), np.full(100, 1.0)
    one[3] = 1e6
    assert bias_p_value(one, 0 * one) > 0.5
    assert bias_p_value(many, 0 * many) == pytest.approx(2 * np.exp(-50))


@pytest.mark.parametrize("level", [0.1, 0.01])
@pytest.mark.parametrize("shape", [0.02, 1.0])
def test_excess_p_value_is_valid_for_ratios_of_mean_one(shape: float, level: float) -> None:
    """Gamma distributed, from nearly always 0 and sometimes huge, to exponential."""
    ratios = np.random.default_rng(2).gamma(shape, 1 / shape, (4000, 40))
    share = np.mean([excess_p_value(row) <= level for row in ratios])
    assert share <= level + 3 * np.sqrt(level / 4000)


def test_excess_p_value_is_one_sided() -> None:
    assert excess_p_value(np.zeros(500)) == 1.0
    assert excess_p_value(np.full(128, 1.25)) < 1e-8


def test_results_that_are_no_numbers_are_no_evidence_for_a_subject() -> None:
    for bad in (np.nan, np.inf):
        assert bias_p_value(np.array([bad, 0.0]), np.zeros(2)) == 0.0
        assert excess_p_value(np.array([bad, 0.0])) == 0.0


@pytest.mark.parametrize("bad", [np.inf, np.nan, -1e-3])
def test_an_allowance_that_is_no_size_judges_nothing(bad: float) -> None:
    allowance = np.full(100, 0.5)
    allowance[3] = bad
    with pytest.raises(InvalidBound, match="in 1 of 100 rows, so any error would pass"):
        bias_p_value(np.ones(100), allowance)
    assert bias_p_value(np.full(100, np.nan), allowance) == 0.0


@pytest.mark.parametrize("law", laws.LAWS)
def test_a_profile_that_allows_any_bias_leaves_statistics_incomplete(law: str) -> None:
    """With exponentials off by the whole weight no output says anything of the kernel."""
    hopeless = {"bfloat16": Profile.default("bfloat16", exp_error=2.0**24)}
    record = run_law(all_laws()[law], EmulatedKernel(hopeless), Options(dtypes=("bfloat16",)))
    assert record.verdict == "incomplete"
    assert "any error would pass" in record.message


def test_level_is_split_over_all_tests_of_a_run() -> None:
    made = [value.law for value in vars(laws).values() if isinstance(getattr(value, "law", None), Law)]
    assert {m.name for m in made} == set(laws.LAWS)
    kernel = EmulatedKernel()
    tests = sum(len(m.cases(supports_of(kernel), profile_of(kernel, dtype))) for m in made for dtype in DTYPES[1:])
    assert tests * laws.ALPHA <= FAMILY_ALPHA
    assert laws.ALPHA * len(made) * len(laws.DESIGNS) * len(DTYPES) == pytest.approx(FAMILY_ALPHA)


def test_sums_spread_unless_they_truncate_or_stagnate() -> None:
    assert spread_error(Accumulator(), 400) == 40 * 2.0**-24
    assert spread_error(Accumulator(), 1) <= 1.01 * 2.0**-24
    for accumulator in (Accumulator(order="tensor-core", block=16), Accumulator(format="bfloat16")):
        assert spread_error(accumulator, 400) == accumulator.relative_error(400)


def p_values(kernel: EmulatedKernel, dtype: str, design: laws.Design) -> dict[str, float]:
    """Of every quantity, "LSE" and "level" as well."""
    inputs = laws.statistics_case(design, kernel.supports, dtype).build()
    model = laws.model_of(inputs, kernel.profile[dtype])
    out, lse = Driver(kernel, dtype).call(DECODE, inputs)
    error = model.error(out.value)
    found = {e.what: e.p_value for e in laws._estimates(model, inputs, error)}
    found["level"] = excess_p_value((error**2).sum(-1) / model.mean_square)
    if lse is not None:
        found["LSE"] = bias_p_value(model.lse_error(lse.value), model.lse_bias)
    return found


HONEST: dict[str, dict[str, Any]] = {
    "default": {},
    "tiles": {"tile": 16},
    "row sum of rounded P": {"row_sum": "rounded"},
    "truncated output": {"output_rounding": "truncate"},
    "parts stored in 16 bits": {"splits": 5, "split_format": "bfloat16", "row_sum": "rounded"},
    "merging": {"merge_every": 16},
    "scores in bfloat16": {"score_format": "bfloat16", "score_roundings": 2},
    "float8 P": {"probabilities": "float8_e4m3fn"},
    "coarse exp": {"exp_error": 3000.0},
    "P of two bits": {"probabilities": "float8_e5m2", "row_sum": "rounded"},
    "rounded cache": {"cache_dequantised": "float8_e4m3fn"},
}


@pytest.mark.parametrize("exp_bias", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", HONEST)
def test_honest_kernels_pass(name: str, dtype: str, exp_bias: float) -> None:
    """With every exp off by all that the profile grants, in one direction."""
    profile = Profile.default(dtype, **HONEST[name])
    kernel = EmulatedKernel({dtype: profile}, Schedule(exp_bias=exp_bias, exp2=exp_bias > 0))
    # Rows of float8 move larger scores by more than any allowance can hold.
    for design in SMALL[1:2] if name == "rounded cache" else SMALL:
        found = p_values(kernel, dtype, design)
        assert min(found.values()) > 1e-3, found


@pytest.mark.parametrize(
    ("dtype", "declared", "computed"),
    [
        ("bfloat16", {}, {"probabilities": "float32"}),
        ("bfloat16", {"output_rounding": "truncate"}, {}),
        ("bfloat16", {"probabilities": "float8_e4m3fn"}, {}),
        ("float16", {"score_format": "bfloat16"}, {}),
        ("float16", {"value": Accumulator(format="float16")}, {}),
    ],
)
def test_better_than_declared_passes(dtype: str, declared: dict[str, Any], computed: dict[str, Any]) -> None:
    profile, claim = Profile.default(dtype, **computed), Profile.default(dtype, **declared)
    found = p_values(EmulatedKernel({dtype: profile}, declared={dtype: claim}), dtype, SMALL[0])
    assert min(found.values()) > 1e-3, found


class Scaled(EmulatedKernel):
    """bfloat16 with another scale, or an LSE that is off."""

    def __init__(self, scale: float = 1.0, lse_error: float = 0.0, lse: bool = True, **changes: Any) -> None:
        super().__init__({"bfloat16": replace(preset("bf16-flash"), **changes)}, lse=lse)
        self.scale, self.lse_error = scale, lse_error

    def decode(self, *args: Any, softmax_scale: float, **options: Any) -> Any:
        out, lse = super().decode(*args, softmax_scale=self.scale * softmax_scale, **options)
        return out, lse + self.lse_error


@pytest.mark.parametrize(
    ("kernel", "law"),
    [
        (Scaled(scale=1.0005, lse=False), "test_decode_output_is_unbiased"),
        (Scaled(scale=0.9995, lse=False), "test_decode_output_is_unbiased"),
        (Scaled(scale=1.0001), "test_decode_lse_is_unbiased"),
        (Scaled(lse_error=3e-4, row_sum="rounded"), "test_decode_lse_is_unbiased"),
        (Scaled(lse_error=-3e-4, row_sum="rounded"), "test_decode_lse_is_unbiased"),
    ],
)
def test_small_faults_in_bfloat16_are_found(kernel: Scaled, law: str) -> None:
    record = run_law(getattr(laws, law).law, kernel, Options())
    assert record.verdict == "fail"
    assert record.worst is None


def test_record_says_what_is_off_and_by_how_much() -> None:
    kernel = Scaled(scale=1.002, lse=False)
    record = run_law(laws.test_decode_output_is_unbiased.law, kernel, Options(spec=("kernel",)))
    first, second = record.message.splitlines()
    assert first.startswith("softmax_scale is off by +")
    assert float(first.split()[4]) == pytest.approx(2e-3, rel=0.1)
    assert second.startswith("a subject that is what it declares shows this with probability ")
    assert f"--law test_decode_output_is_unbiased --case {record.case}" in record.replay


def test_passing_record_tells_the_evidence() -> None:
    record = run_law(laws.test_decode_error_is_as_small_as_declared.law, Scaled(), Options())
    assert record.verdict == "pass"
    assert record.cases == len(laws.DESIGNS)
    assert record.worst is not None
    assert 0 <= record.worst < 1


def test_cases_are_the_same_whatever_the_seed_and_the_number_of_examples() -> None:
    law, kernel = laws.test_decode_lse_is_unbiased.law, EmulatedKernel()
    records = [run_law(law, kernel, Options(examples=n, seed=n, dtypes=("bfloat16",))) for n in (1, 200)]
    assert records[0].worst_case == records[1].worst_case
    assert records[0].cases == records[1].cases == len(laws.DESIGNS)


def test_prediction_of_the_mean_square_is_near() -> None:
    """The mean square is at least a tenth of its largest, where P is rounded to bfloat16."""
    kernel = Scaled()
    inputs = laws.statistics_case(SMALL[0], kernel.supports, "bfloat16").build()
    model = laws.model_of(inputs, kernel.profile["bfloat16"])
    error: Array = model.error(Driver(kernel, "bfloat16").call(DECODE, inputs)[0].value)
    assert 0.1 < float(np.mean((error**2).sum(-1) / model.mean_square)) < 1
