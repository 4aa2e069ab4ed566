"""The emulated kernel does what its profile says, and conforms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec import check_subject
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.judging.law import Options
from mla_spec.proof.emulated import (
    EmulatedAttention,
    EmulatedKernel,
    Schedule,
    multiply_add,
)
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array

HOPPER = Accumulator(order="tensor-core", block=16, fraction_bits=25)


def operands(n: int, seed: int = 0, dtype: str = "bfloat16") -> tuple[Array, Array]:
    """(a [3, n], b [n, 5]), exact in ``dtype``."""
    rng = np.random.default_rng(seed)
    return round_to(rng.standard_normal((3, n)), dtype), round_to(rng.standard_normal((n, 5)), dtype)


def product(a: Array, b: Array, accumulator: Accumulator, **options: Any) -> Array:
    return multiply_add(np.zeros((a.shape[0], b.shape[1])), a, b, accumulator, **options)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_stepwise_sums_are_those_of_the_processor(name: str) -> None:
    """Bit for bit, against NumPy's own arithmetic in the format."""
    a, b = operands(33, dtype=name)
    got = product(a, b, Accumulator(format=name), stepwise=True)
    own = np.dtype(name).type
    for i, j in np.ndindex(got.shape):
        total = own(0)
        for x, y in zip(a[i], b[:, j], strict=True):
            total = own(total + own(x) * own(y))
        assert got[i, j] == float(total)


def test_blocked_sums_add_blocks_first() -> None:
    """In float16 1 is lost beside 2048, but not two of them."""
    a, b = np.array([[2048.0, 0.0, 1.0, 1.0]]), np.ones((4, 1))
    assert product(a, b, Accumulator(format="float16")) == 2048
    assert product(a, b, Accumulator(format="float16", order="blocked", block=2)) == 2050


def test_tensor_cores_cut_off_what_lies_below_the_largest_term() -> None:
    """With 3 fraction bits beside 8 everything below 1 is lost, towards zero; 16 at a time, the running sum included."""
    accumulator = Accumulator(order="tensor-core", block=2, fraction_bits=3)
    one = np.ones((3, 1))
    assert product(np.array([[8.0, 0.75, 0.0]]), one, accumulator) == 8
    assert product(np.array([[8.0, -0.75, 0.0]]), one, accumulator) == 8
    assert product(np.array([[8.0, 1.75, 1.75]]), one, accumulator) == 10  # 8 + 1, then 9 + 1
    assert product(np.array([[0.0, 0.75, 8.0]]), one, accumulator) == 8


def test_operands_are_sums_of_numbers_of_their_format() -> None:
    """1 + 2^-9 + 2^-18 in bfloat16 is 1, then 1 + 2^-9, then all of it; low times low is left out."""
    a = np.array([[1 + 2.0**-9 + 2.0**-18]])
    got = [
        product(a, np.ones((1, 1)), Accumulator(format="float64", operands="bfloat16", operand_parts=parts)).item()
        for parts in (1, 2, 3)
    ]
    assert got == [1.0, 1 + 2.0**-9, 1 + 2.0**-9 + 2.0**-18]
    both = product(a, a.T, Accumulator(format="float64", operands="bfloat16", operand_parts=2)).item()
    assert both == 1 + 2 * 2.0**-9
    cut = Accumulator(operands="tfloat32", operand_rounding="truncate")
    assert product(np.array([[2 - 2.0**-20]]), np.ones((1, 1)), cut) == 2 - 2.0**-10


@pytest.mark.parametrize(
    "accumulator",
    [Accumulator(), Accumulator(format="bfloat16"), Accumulator(order="blocked", block=8), HOPPER],
    ids=lambda a: f"{a.format} {a.order}",
)
@pytest.mark.parametrize("stepwise", [True, False])
def test_sums_err_as_much_as_declared_and_no_more(accumulator: Accumulator, stepwise: bool) -> None:
    for n, seed in ((1, 0), (16, 1), (40, 2)):
        a, b = operands(n, seed)
        error = np.abs(product(a, b, accumulator, stepwise=stepwise) - a @ b)
        assert (error <= accumulator.relative_error(n) * (np.abs(a) @ np.abs(b))).all()
    assert error.max() > 0


def test_every_stage_is_rounded_to_its_format() -> None:
    """Changing one format of a float64 profile changes the result, which is then off by at least a hundredth of its u."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 2, 8), (40, 1, 8), (40, 1, 4)))
    k = round_to(k, "float32")
    base = Profile.default("float64", tile=16, splits=2)
    exact = EmulatedAttention(base).attend(q, k, v, softmax_scale=0.3)
    narrow = Accumulator(format="bfloat16")
    stages: dict[str, Any] = {
        name: "bfloat16"
        for name in ("score_format", "softmax", "probabilities", "split_format", "output", "cache_dequantised")
    }
    stages |= {"score": narrow, "value": narrow}
    for name, value in stages.items():
        out, lse = EmulatedAttention(replace(base, **{name: value})).attend(q, k, v, softmax_scale=0.3)
        assert np.abs(out - exact[0]).max() > format_of("bfloat16").unit_roundoff / 100, name
    _, lse = EmulatedAttention(replace(base, lse="bfloat16")).attend(q, k, v, softmax_scale=0.3)
    assert (lse == round_to(exact[1], "bfloat16")).all()
    out, _ = EmulatedAttention(replace(base, output="bfloat16", output_rounding="truncate")).attend(
        q, k, v, softmax_scale=0.3
    )
    assert (out == round_to(exact[0], "bfloat16", rounding="truncate")).all()


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(exp2=True),
        Schedule(stepwise=True),
        Schedule(reverse=True),
        Schedule(shares_from_lse=True),
        Schedule(exp_bias=1.0),
    ],
    ids=str,
)
def test_schedules_change_bits_and_little_else(schedule: Schedule) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (round_to(rng.standard_normal(shape), "float32") for shape in ((3, 4, 16), (50, 2, 16), (50, 2, 8)))
    profile = replace(preset("fp32-flash"), splits=3)
    plain = EmulatedAttention(profile).attend(q, k, v, softmax_scale=0.25)
    other = EmulatedAttention(profile, schedule).attend(q, k, v, softmax_scale=0.25)
    changes = [np.abs(a - b).max() for a, b in zip(plain, other, strict=True)]
    assert 0 < max(changes) < 1000 * format_of("float32").unit_roundoff


def test_truncated_weights_are_never_larger() -> None:
    p = np.random.default_rng(2).uniform(0, 1, 1000)
    cut = EmulatedAttention(preset("bf16-flash"), Schedule(truncate_probabilities=True)).probabilities(p)
    assert (cut <= p).all() and (cut < round_to(p, "bfloat16")).any()


@pytest.mark.parametrize("profile", ["hopper-bf16", "fp16-merge", "fp32", "fp64"])
def test_emulated_kernels_conform(profile: str) -> None:
    declared = preset(profile)
    kernel = EmulatedKernel({declared.dtype: declared})
    # Step by step each head takes long, and all are alike.
    kernel.supports = replace(kernel.supports, num_heads=(1, 2, 3, 16))
    records = check_subject(kernel, options=Options(examples=5))
    assert {record.verdict for record in records} == {"pass", "unsupported"}


def test_default_kernel_takes_three_dtypes() -> None:
    kernel = EmulatedKernel()
    assert kernel.supports.dtypes == ("float32", "float16", "bfloat16")
    assert {dtype: profile.tile for dtype, profile in kernel.profile.items()} == {
        "float32": None,
        "float16": 64,
        "bfloat16": 64,
    }
