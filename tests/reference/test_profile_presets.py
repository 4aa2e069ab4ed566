"""Profiles by name."""

from __future__ import annotations

import pytest

from mla_spec.reference.profile_presets import PRESETS, preset


def test_presets_are_what_their_names_say() -> None:
    dtypes = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    for name, profile in PRESETS.items():
        stated = [dtype for part, dtype in dtypes.items() if part in name.split("-")]
        assert [profile.dtype] == (stated or ["bfloat16"]), name
    assert preset("bf16-flash").probabilities == "bfloat16"
    assert preset("bf16-merge").merge_every == 16
    assert preset("hopper-bf16").value.order == preset("hopper-bf16").score.order == "tensor-core"
    assert preset("fp8-cache").cache_dequantised == "bfloat16"


def test_presets_differ() -> None:
    assert len(set(PRESETS.values())) == len(PRESETS)


def test_unknown_preset_is_named_beside_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown profile preset 'bf16-flsh'; did you mean bf16-flash.*known are fp64, "
    ):
        preset("bf16-flsh")
    with pytest.raises(ValueError, match=r"^unknown profile preset 'x'; known are fp64, "):
        preset("x")
