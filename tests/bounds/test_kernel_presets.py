"""Profiles by the names of kernels."""

from __future__ import annotations

import pytest

import mla_spec
from mla_spec.bounds.kernel_presets import KERNELS, all_presets, presets
from mla_spec.bounds.profile_presets import PRESETS

DTYPES = {
    "flash-attention-2": {"float16", "bfloat16"},
    "flash-attention-3": {"float16", "bfloat16"},
    "flash-attention-4": {"float16", "bfloat16"},
    "triton-tf32": {"float32"},
    "tpu-default": {"float32"},
    "trtllm-fp8": {"float16", "bfloat16"},
    "flashmla": {"float16", "bfloat16"},
    "sdpa-math": {"float32", "float16", "bfloat16"},
}


def test_kernels_have_profiles_of_their_dtypes_and_a_source() -> None:
    assert KERNELS.keys() == DTYPES.keys()
    for name, dtypes in DTYPES.items():
        assert {dtype: p.dtype for dtype, p in presets(name).items()} == {dtype: dtype for dtype in dtypes}
        assert KERNELS[name].source and KERNELS[name].what


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flash-attention-4", "exp_error=1500.0"),
        ("flash-attention-2", "'block': 8, 'fraction_bits': 24"),
        ("triton-tf32", "'operands': 'tfloat32', 'operand_parts': 1, 'operand_rounding': 'truncate'"),
        ("tpu-default", "'operands': 'bfloat16'"),
        ("trtllm-fp8", "probabilities=float8_e4m3fn, probabilities_scale=256.0"),
        ("sdpa-math", "operand_roundings=4, probabilities=float32, row_sum=normalised"),
    ],
)
def test_what_a_kernel_declares(name: str, said: str) -> None:
    of_half = presets(name).get("bfloat16") or presets(name)["float32"]
    assert said in of_half.describe()


def test_presets_of_one_dtype_have_names_too() -> None:
    assert presets("hopper-bf16") == {"bfloat16": PRESETS["hopper-bf16"]}
    assert mla_spec.presets is presets
    assert all_presets()["flashmla bfloat16"] == PRESETS["hopper-bf16"]


def test_an_unknown_name_is_named_beside_close_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown profile preset 'flash-attention'; did you mean flash-attention-"):
        presets("flash-attention")
