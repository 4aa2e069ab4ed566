"""Profiles by the names of the kernels that people use, for every dtype that such a kernel takes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.profile_presets import HOPPER, PRESETS


@dataclass(frozen=True)
class Kernel:
    """A kind of kernel.

    Attributes:
        what: its arithmetic, in a few words.
        source: where that is said.
        profiles: one for each dtype.
    """

    what: str
    source: str
    profiles: tuple[Profile, ...]


AMPERE: Final = Accumulator(order="tensor-core", block=8, fraction_bits=24)
"""float16 and bfloat16 products on NVIDIA Ampere: 8 at a time, cut off at 24 fraction bits (Khattak and Mikaitis 2025)."""

BLOCKED: Final = Accumulator(order="blocked", block=128)
"""Sums of 128 products in any order, and of these sums."""

_HALF = ("float16", "bfloat16")

KERNELS: Final[dict[str, Kernel]] = {
    "flash-attention-2": Kernel(
        "tensor cores of 8 products, tiles of 64 keys or more, up to 128 splits merged by their LSEs",
        "Dao 2023, arXiv:2307.08691; Dao-AILab/flash-attention, csrc/flash_attn/src/flash_fwd_kernel.h",
        tuple(Profile.default(d, score=AMPERE, value=AMPERE, tile=64, splits=128) for d in _HALF),
    ),
    "flash-attention-3": Kernel(
        "the same with Hopper's tensor cores of 16 products",
        "Shah et al. 2024, arXiv:2407.08608; Dao-AILab/flash-attention, hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp",
        tuple(Profile.default(d, score=HOPPER, value=HOPPER, tile=64, splits=128) for d in _HALF),
    ),
    "flash-attention-4": Kernel(
        "tiles of 128 keys, exp2 partly by a polynomial of degree 3, off by 8.8e-5",
        "Dao-AILab/flash-attention, flash_attn/cute/flash_fwd_sm100.py, softmax.py, utils.py",
        tuple(Profile.default(d, score=HOPPER, value=HOPPER, tile=128, splits=128, exp_error=1500.0) for d in _HALF),
    ),
    "triton-tf32": Kernel(
        "float32 tensors whose products read 10 fraction bits, cut off (the default of tl.dot)",
        "Triton language reference, tl.dot, input_precision; NVIDIA PTX ISA, mma with .tf32",
        (
            Profile.default(
                "float32",
                score=Accumulator(
                    order="tensor-core", block=4, fraction_bits=24, operands="tfloat32", operand_rounding="truncate"
                ),
                value=Accumulator(
                    order="tensor-core", block=4, fraction_bits=24, operands="tfloat32", operand_rounding="truncate"
                ),
                tile=16,
            ),
        ),
    ),
    "tpu-default": Kernel(
        "float32 tensors rounded to bfloat16 for each product, sums in float32",
        "JAX documentation, jax.lax.Precision.DEFAULT",
        (
            Profile.default(
                "float32",
                score=Accumulator(order="blocked", block=128, operands="bfloat16"),
                value=Accumulator(order="blocked", block=128, operands="bfloat16"),
                tile=128,
            ),
        ),
    ),
    "trtllm-fp8": Kernel(
        "query and P in float8_e4m3fn, the query as it is (its scale is 1), P times 256, tensor cores of 32 products",
        "NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/kernels/mlaKernels.cu (quant_scale_qkv)",
        tuple(
            Profile.default(
                d,
                score=Accumulator(order="tensor-core", block=32, fraction_bits=25),
                value=Accumulator(order="tensor-core", block=32, fraction_bits=25),
                query="float8_e4m3fn",
                probabilities="float8_e4m3fn",
                probabilities_scale=256.0,
                tile=64,
            )
            for d in _HALF
        ),
    ),
    "flashmla": Kernel(
        "Hopper's tensor cores, tiles of 64 keys, splits merged in float32",
        "deepseek-ai/FlashMLA, sm90/decode/dense/splitkv_mla.cuh, smxx/decode/combine/combine.cu",
        (PRESETS["hopper-fp16"], PRESETS["hopper-bf16"]),
    ),
    "sdpa-math": Kernel(
        "float32 steps; q and k each times the root of the scale, P divided by the row sum first",
        "pytorch/pytorch, aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math",
        tuple(
            Profile.default(d, operand_roundings=4, score=BLOCKED, probabilities="float32", row_sum="normalised")
            for d in ("float32", *_HALF)
        ),
    ),
}


def presets(name: str) -> dict[str, Profile]:
    """The profiles called ``name``, by dtype, as ``subject.profile`` takes them.

    Example:
        profile = presets("flash-attention-2")

    Raises:
        ValueError: no preset has the name; the message lists the known ones and suggests close ones.
    """
    if name in PRESETS:
        return {PRESETS[name].dtype: PRESETS[name]}
    if name in KERNELS:
        return {profile.dtype: profile for profile in KERNELS[name].profiles}
    known = [*KERNELS, *PRESETS]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown profile preset {name!r}; {hint}known are {', '.join(known)}")


def all_presets() -> dict[str, Profile]:
    """Every preset of one dtype, and those of kernels as "name dtype"."""
    of_kernels = {f"{name} {p.dtype}": p for name, kernel in KERNELS.items() for p in kernel.profiles}
    return {**PRESETS, **of_kernels}
