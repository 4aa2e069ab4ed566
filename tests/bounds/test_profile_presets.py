"""Profiles by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from mla_spec.bounds.profile_presets import PRESETS, preset

SEQUENTIAL32 = {
    "format": "float32",
    "order": "sequential",
    "block": 1,
    "fraction_bits": 25,
    "operands": None,
    "operand_parts": 1,
    "operand_rounding": "nearest",
}
TENSOR_CORE = SEQUENTIAL32 | {"order": "tensor-core", "block": 16}

PLAIN = {  # float32 arithmetic with one softmax over all keys, for inputs, P and output of one format
    "score": SEQUENTIAL32,
    "query": None,
    "query_scale": "none",
    "query_times_scale": False,
    "probabilities_scale": 1.0,
    "operand_roundings": 0,
    "score_format": "float32",
    "score_roundings": 1,
    "softmax": "float32",
    "exp_error": 4.0,
    "maximum": None,
    "tile": None,
    "row_sum": "unrounded",
    "value": SEQUENTIAL32,
    "splits": 1,
    "merge_every": None,
    "merge_shares": "unnormalised",
    "split_format": "float32",
    "output_rounding": "nearest",
    "lse": "float32",
    "form": "explicit",
    "linear": SEQUENTIAL32,
    "norm": "float32",
    "rope": dict.fromkeys(("frequency", "angle", "table", "rotation"), "float32"),
    "cache_dequantised": None,
    "batch_invariant": False,
    "deterministic": True,
}
FLASH = {"tile": 64}
HOPPER = {"score": TENSOR_CORE, "value": TENSOR_CORE, "tile": 64, "splits": 32}
MERGE = {"probabilities": "float32", "merge_every": 16, "merge_shares": "normalised"}
EAGER = {"score_roundings": 2, "row_sum": "normalised"}
WIDE = SEQUENTIAL32 | {"format": "float64"}
FLOAT64 = {name: "float64" for name in ("score_format", "softmax", "split_format", "lse", "norm")} | {
    "score": WIDE,
    "value": WIDE,
    "linear": WIDE,
    "rope": dict.fromkeys(("frequency", "angle", "table", "rotation"), "float64"),
}

DECLARED: dict[str, tuple[str, dict[str, Any]]] = {  # dtype, and what is not as in PLAIN
    "fp64": ("float64", FLOAT64),
    "fp32": ("float32", {}),
    "fp32-flash": ("float32", FLASH),
    "fp32-merge": ("float32", MERGE),
    "fp16-flash": ("float16", FLASH),
    "fp16-eager": ("float16", EAGER | {"score_format": "float16"}),
    "fp16-merge": ("float16", MERGE),
    "hopper-fp16": ("float16", HOPPER),
    "bf16-flash": ("bfloat16", FLASH),
    "bf16-eager": ("bfloat16", EAGER | {"score_format": "bfloat16"}),
    "bf16-merge": ("bfloat16", MERGE),
    "hopper-bf16": ("bfloat16", HOPPER),
    "fp8-cache": ("bfloat16", HOPPER | {"cache_dequantised": "bfloat16"}),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_preset_declares(name: str) -> None:
    dtype, changes = DECLARED[name]
    assert asdict(preset(name)) == PLAIN | {"dtype": dtype, "probabilities": dtype, "output": dtype} | changes


def test_these_are_all_presets_and_they_differ() -> None:
    assert list(PRESETS) == list(DECLARED)
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bf16-flsh", "did you mean bf16-flash or fp16-flash? "),
        ("hopper-b16", "did you mean hopper-bf16 or hopper-fp16? "),
        ("fp8-kv-cache", "did you mean fp8-cache? "),
        ("bf16", ""),
        ("x", ""),
    ],
)
def test_an_unknown_preset_is_named_beside_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        preset(name)
    assert str(error.value) == f"unknown profile preset {name!r}; {hint}known are {', '.join(DECLARED)}"
