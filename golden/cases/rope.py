"""Cases of rotary tables and rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, on_github
from mla_spec.reference.config import LongRopeScaling, RopeConfig, YarnScaling
from mla_spec.reference.rope import half_from_interleaved

POSITIONS = (0, 1, 4095, 4096, 163839, 2**20)

DEEPSEEK_V3 = RopeConfig(dim=64, yarn=YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001))
KIMI_K2 = RopeConfig(
    dim=64,
    theta=50000.0,
    yarn=YarnScaling(factor=32, original_max_position_embeddings=4096, beta_fast=1, ramp_guard=0.001),
)
SHORT_YARN = YarnScaling(
    factor=4, original_max_position_embeddings=64, beta_fast=8, mscale=0.75, mscale_all_dim=0.75, ramp_guard=0.001
)
UNTRUNCATED_YARN = YarnScaling(factor=4, original_max_position_embeddings=64, beta_fast=8, truncate=False)
NO_RANGE_YARN = YarnScaling(factor=4, original_max_position_embeddings=6, ramp_guard=0.001)
RATIO_YARN = YarnScaling(factor=8, original_max_position_embeddings=256, mscale_all_dim=0.5, ramp_guard=0.001)


def rope_cases() -> Iterator[Case]:
    positions = np.array(POSITIONS)
    """All of them, in the order of the manifest."""
    for name, rope, catches, sources in (
        (
            "rope-table-plain",
            RopeConfig(dim=16),
            "frequencies theta^(-i/r) in place of theta^(-2i/r); angles formed in float32 or bfloat16",
            ("pytorch/torchtitan/pull/2575", "pie-project/pie/pull/603"),
        ),
        (
            "rope-table-yarn",
            DEEPSEEK_V3,
            "YaRN left out, its ramp reversed, or its factor applied to every pair; a table that ends at the original context",
            ("vllm-project/vllm-ascend/pull/2744", "kekzl/imp/pull/913"),
        ),
        (
            "rope-table-yarn-narrow",
            KIMI_K2,
            "a correction range whose ends are not rounded down and up, so that the ramp has no width",
            ("pytorch/torchtitan/pull/4215",),
        ),
        (
            "rope-table-yarn-no-range",
            RopeConfig(dim=16, yarn=NO_RANGE_YARN),
            "division by 0 where the correction range begins and ends at the same pair",
            ("pytorch/torchtitan/pull/4215",),
        ),
        (
            "rope-table-yarn-untruncated",
            RopeConfig(dim=16, yarn=UNTRUNCATED_YARN),
            "ends of the correction range rounded although the configuration says that they are not",
            (),
        ),
    ):
        yield Case(
            name=name,
            operation="rope_table",
            purpose="frequencies, and cos and sin without any factor, at positions up to 2^20",
            catches=catches,
            sources=on_github(*sources),
            parameters={"rope": asdict(rope)},
            inputs={"positions": positions},
        )
    x = Numbers("rope-layouts").array(len(POSITIONS), 2, 8)  # [s, h, r]
    half = half_from_interleaved(8)
    for name, rope, values, purpose, catches, reported in (
        (
            "rope-interleaved",
            RopeConfig(dim=8),
            x,
            "pairs (2i, 2i+1) rotated, every head by the angle of its position",
            "pairs (i, i + r/2) rotated in their place; the sine with the wrong sign; heads taken for positions",
            ("sgl-project/sglang/pull/13495", "tensorgi/TPA/issues/4", "flashinfer-ai/flashinfer/pull/2255"),
        ),
        (
            "rope-half",
            RopeConfig(dim=8, interleaved=False),
            x[..., half],
            "pairs (i, i + r/2) rotated; input and result are those of rope-interleaved in the order 0, 2, .., 1, 3, ..",
            "weights permuted for one layout and rotated in the other; part of the pairs left as they are",
            ("vllm-project/vllm-ascend/pull/3850", "vllm-project/vllm/pull/41185"),
        ),
        (
            "rope-yarn-factor",
            RopeConfig(dim=8, yarn=RATIO_YARN),
            x,
            "YaRN with mscale unlike mscale_all_dim: cos and sin carry the ratio of both",
            "the factor on cos and sin left out or squared, or the numerator alone",
            ("kekzl/imp/pull/880",),
        ),
    ):
        yield Case(
            name=name,
            operation="rope",
            purpose=purpose,
            catches=catches,
            sources=on_github(*reported),
            parameters={"rope": asdict(rope)},
            inputs={"x": values, "positions": positions},
        )


def longrope_cases() -> Iterator[Case]:
    """LongRoPE, in a model within its original context and in one beyond."""
    scaling = LongRopeScaling(
        original_max_position_embeddings=4096,
        short_factor=(1.0, 1.125, 1.25, 1.5),
        long_factor=(1.5, 3.5, 7.0, 31.0),
    )
    for name, context, catches in (
        ("rope-table-longrope-short", 4096, "the long factors, or the extension, in a context that is not exceeded"),
        ("rope-table-longrope-long", 131072, "one factor for all pairs; the short factors for positions below 4096"),
    ):
        yield Case(
            name=name,
            operation="rope_table",
            purpose=f"each frequency divided by its own factor, in a model of {context} positions trained on 4096",
            catches=catches,
            parameters={"rope": asdict(RopeConfig(dim=8, longrope=scaling, max_position_embeddings=context))},
            inputs={"positions": np.array(POSITIONS)},
        )
    numbers = Numbers("rope-longrope")
    yield Case(
        name="rope-longrope",
        operation="rope",
        purpose="LongRoPE beyond the original context: the factor sqrt(1 + ln 32 / ln 4096) on cos and sin",
        catches="the factor left out, squared, or YaRN's in its place; factors chosen anew by the largest position of a call",
        parameters={"rope": asdict(RopeConfig(dim=8, longrope=scaling, max_position_embeddings=131072))},
        inputs={"x": numbers.array(len(POSITIONS), 2, 8, dtype="bfloat16"), "positions": np.array(POSITIONS)},
        dtype="bfloat16",
    )
