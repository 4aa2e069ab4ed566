"""Profiles: what may be declared, and the error rates that follow."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch

from mla_spec.bounds.profile import (
    Accumulator,
    Profile,
    RopeProfile,
    gamma,
)
from mla_spec.reference.formats import FORMATS

UNKNOWN = f"unknown number format 'fp8'; known formats are {', '.join(FORMATS)}"


@pytest.mark.parametrize(
    "name",
    [
        "dtype",
        "query",
        "score_format",
        "softmax",
        "probabilities",
        "split_format",
        "output",
        "lse",
        "norm",
        "cache_dequantised",
    ],
)
def test_formats_of_a_profile_must_be_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(UNKNOWN)}$"):
        Profile(**{"dtype": "float32", name: "fp8"})


@pytest.mark.parametrize("name", ["frequency", "angle", "table", "rotation"])
def test_formats_of_a_rope_profile_must_be_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(UNKNOWN)}$"):
        RopeProfile(**{name: "fp8"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_sum": "both"}, "row_sum is 'both'; expected one of 'unrounded', 'rounded', 'normalised', 'lse'"),
        ({"output_rounding": "up"}, "output_rounding is 'up'; expected one of 'nearest', 'truncate'"),
        ({"form": "naive"}, "form is 'naive'; expected one of 'explicit', 'absorbed'"),
        ({"splits": -1}, "splits is -1; expected an integer of at least 0"),
        ({"splits": True}, "splits is True; expected an integer of at least 0"),
        ({"score_roundings": -1}, "score_roundings is -1; expected an integer of at least 0"),
        ({"operand_roundings": 1.5}, "operand_roundings is 1.5; expected an integer of at least 0"),
        ({"tile": 0}, "tile is 0; expected an integer of at least 1, or None"),
        ({"merge_every": "64"}, "merge_every is '64'; expected an integer of at least 1, or None"),
        ({"exp_error": math.nan}, "exp_error is nan; expected a finite number of at least 0"),
        (
            {"exp_error": 10**400},
            f"exp_error is {'1' + '0' * 39} ... {'0' * 15}; expected a finite number of at least 0",
        ),
        ({"probabilities": torch.float32}, "probabilities is torch.float32; expected a string"),
        ({"score": "float32"}, "score is 'float32'; expected the fields of Accumulator"),
        ({"deterministic": 1}, "deterministic is 1; expected True or False"),
        (
            {"query": "float8_e4m3fn", "query_scale": "row"},
            "query_scale is 'row'; expected one of 'none', 'tensor', 'token', 'head'",
        ),
        (
            {"query_scale": "head"},
            "query_scale and query_times_scale say how q is rounded; name its format in query",
        ),
        (
            {"probabilities": "float8_e4m3fn", "probabilities_scale": 512.0},
            "probabilities_scale must be a power of two up to 448, got 512.0",
        ),
        (
            {"probabilities_scale": 3.0},
            "probabilities_scale must be a power of two up to 3.40282e+38, got 3.0",
        ),
    ],
)
def test_profile_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Profile: {re.escape(message)}$"):
        Profile(dtype="float32", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fp8"}, UNKNOWN),
        (
            {"order": "pairwise"},
            "Accumulator: order is 'pairwise'; expected one of 'sequential', 'blocked', 'tensor-core'",
        ),
        ({"block": 0}, "Accumulator: block is 0; expected an integer of at least 1"),
        ({"operands": "fp8"}, UNKNOWN),
        ({"operands": "float16"}, "Accumulator: operands in float16 overflow where those in float32 do not"),
        ({"operand_parts": 0}, "Accumulator: operand_parts is 0; expected an integer of at least 1"),
        (
            {"operand_rounding": "up"},
            "Accumulator: operand_rounding is 'up'; expected one of 'nearest', 'truncate'",
        ),
    ],
)
def test_accumulator_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Accumulator(**changes)


def test_a_tile_may_be_one_key() -> None:
    assert Profile.default("float32", tile=1).tile == 1


def test_a_worst_case_of_p_in_8_bits_says_nothing() -> None:
    coarse = [name for name in FORMATS if Profile(dtype="float32", probabilities=name).coarse]
    assert coarse == ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]


def test_gamma() -> None:
    assert gamma(0, 0.25) == 0
    assert gamma(1, 0.25) == 0.25 / 0.75
    assert gamma(3, 0.25) == 3.0
    assert gamma(4, 0.25) == math.inf
    assert gamma(1000, 2.0**-8) == math.inf


def test_errors_of_the_orders_of_summation() -> None:
    assert Accumulator().relative_error(512) == gamma(512, 2.0**-24)
    assert Accumulator(format="bfloat16").relative_error(100) == gamma(100, 2.0**-8)
    # 16 products, and ⌈100/16⌉ partial sums.
    assert Accumulator(order="blocked", block=16).relative_error(100) == gamma(16 + 7, 2.0**-24)
    steps = Accumulator(order="tensor-core", block=16, fraction_bits=25).relative_error(100)
    assert steps == 7 * (4 * 17 * 2.0**-25 + 2.0**-23)


def test_errors_of_rounded_operands() -> None:
    """Both may be off by a whole roundoff, u or 2u; of two parts each, low times low is missing too."""
    u = 2.0**-11
    assert math.isclose(Accumulator(operands="tfloat32").operand_error, (1 + u) ** 2 - 1)
    cut = Accumulator(operands="tfloat32", operand_rounding="truncate")
    assert math.isclose(cut.operand_error, (1 + 2 * u) ** 2 - 1)
    assert math.isclose(Accumulator(operands="tfloat32", operand_parts=2).operand_error, u**2 * (3 + 2 * u))
    assert Accumulator().operand_error == 0
    three = Accumulator(operands="bfloat16", operand_parts=2).relative_error(100)
    assert 3 * 2.0**-16 + gamma(300, 2.0**-24) < three < 1.02 * (3 * 2.0**-16 + gamma(300, 2.0**-24))


def formats(fields: dict[str, Any]) -> set[str]:
    """All formats that a profile names."""
    nested = [formats(value) for value in fields.values() if isinstance(value, dict)]
    return {value for value in fields.values() if isinstance(value, str) and value in FORMATS}.union(*nested)


def test_default_profiles() -> None:
    half = Profile.default("bfloat16")
    assert (half.probabilities, half.output, half.softmax, half.lse, half.row_sum) == (
        "bfloat16",
        "bfloat16",
        "float32",
        "float32",
        "unrounded",
    )
    wide = Profile.default("float64")
    assert formats(asdict(wide)) == {"float64"}
    assert wide.score == wide.value == wide.linear == Accumulator(format="float64")
    assert set(asdict(wide.rope)) == {"frequency", "angle", "table", "rotation"}
    assert formats(asdict(Profile.default("float32"))) == {"float32"}
    assert Profile.default("float16", lse="float16").lse == "float16"
    assert Profile(dtype="float16", output="float32").output == "float32"


def test_description_names_what_differs_from_the_default() -> None:
    assert Profile.default("float64").describe() == "float64 default"
    assert Profile.default("bfloat16", splits=4, lse="bfloat16").describe() == (
        "bfloat16 default, splits=4, lse=bfloat16"
    )


@pytest.mark.parametrize(
    ("splits", "merge_every", "keys", "merges"),
    [
        (1, None, 100, 0),
        (2, None, 100, 1),
        (64, None, 1, 1),
        (1, 32, 100, 4),
        (2, 50, 100, 3),
        (0, None, 9, 0),
        (1, 1, 7, 7),
    ],
)
def test_merges_of_a_part(splits: int, merge_every: int | None, keys: int, merges: int) -> None:
    assert Profile.default("float32", splits=splits, merge_every=merge_every).merges(keys) == merges
