"""Profiles of well-known kinds of kernels, by name."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Final

from mla_spec.bounds.profile import Accumulator, Profile

HOPPER: Final = Accumulator(order="tensor-core", block=16, fraction_bits=25)
"""float16 and bfloat16 products on NVIDIA Hopper: 16 at a time, cut off at 25 fraction bits (Khattak and Mikaitis 2025,
"Accurate models of NVIDIA tensor cores")."""


def _flash(dtype: str) -> Profile:
    """An online softmax over tiles of 64 keys in float32, with P rounded for the product with V."""
    return Profile.default(dtype, tile=64)


def _hopper(dtype: str) -> Profile:
    """FlashMLA's dense decode on Hopper: tensor cores, tiles of 64 keys, parts of the keys merged in float32."""
    return Profile.default(dtype, score=HOPPER, value=HOPPER, tile=64, splits=32)


def _merge(dtype: str) -> Profile:
    """P in float32 and, as in vLLM's CPU kernel, each page of 16 keys merged with the running result by its LSE."""
    return Profile.default(dtype, probabilities="float32", merge_every=16, merge_shares="normalised")


def _eager(dtype: str) -> Profile:
    """Attention of single PyTorch operations: scores stored after the product and after scaling, P after the division."""
    return Profile.default(dtype, score_format=dtype, score_roundings=2, row_sum="normalised")


PRESETS: Final[dict[str, Profile]] = {
    "fp64": Profile.default("float64"),
    "fp32": Profile.default("float32"),
    "fp32-flash": _flash("float32"),
    "fp32-merge": _merge("float32"),
    "fp16-flash": _flash("float16"),
    "fp16-eager": _eager("float16"),
    "fp16-merge": _merge("float16"),
    "hopper-fp16": _hopper("float16"),
    "bf16-flash": _flash("bfloat16"),
    "bf16-eager": _eager("bfloat16"),
    "bf16-merge": _merge("bfloat16"),
    "hopper-bf16": _hopper("bfloat16"),
    "fp8-cache": replace(_hopper("bfloat16"), cache_dequantised="bfloat16"),
}
"""Profiles by name; "fp8-cache" is FlashMLA's decode over rows of float8_e4m3fn, dequantised to bfloat16."""


def preset(name: str) -> Profile:
    """The profile called ``name``.

    Raises:
        ValueError: no preset has the name; the message lists the known ones and suggests close ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown profile preset {name!r}; {hint}known are {', '.join(PRESETS)}")
    return PRESETS[name]
