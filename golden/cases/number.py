"""Cases of number formats and of quantised cache rows, whose answers are rational numbers that float64 holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.golden.cases.case import Case, Numbers, on_github
from mla_spec.golden.exact import rationals as exact
from mla_spec.reference.typing import Array

PAGE_SIZE, TOKENS = 2, 3


def number_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield from _bits_cases()
    yield from _rounding_cases()
    for layout, (catches, sources) in _LAYOUTS.items():
        yield from _row_cases(layout, catches, on_github(*sources))


def _bits_cases() -> Iterator[Case]:
    for name, short in (("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2")):
        patterns = [p for p in range(256) if exact.number(p, name) is not None]
        yield Case(
            name=f"bits-{short}",
            operation="bits",
            purpose=f"every finite bit pattern of {name} and its number",
            catches="the other 8-bit format; an exponent bias off by one; subnormals taken for 0; 0x7E taken for infinity",
            sources=on_github("ROCm/ATOM/pull/1772"),
            parameters={"format": name},
            inputs={"bits": np.array(patterns, dtype=np.uint8)},
            exact=("out",),
        )


def _rounding_cases() -> Iterator[Case]:
    for name, overflow in (
        ("bfloat16", "infinity"),
        ("float16", "infinity"),
        ("float8_e4m3fn", "saturate"),
        ("float8_e5m2", "saturate"),
    ):
        yield Case(
            name=f"round-{name.replace('float8_', '')}",
            operation="round",
            purpose=f"float64 to {name}: ties, their neighbours, subnormals, 0 and overflow ({overflow})",
            catches="rounding by way of float32, which rounds twice; truncation; ties away from 0; subnormals flushed; "
            "overflow at the largest number and not half a step above it",
            parameters={"format": name, "overflow": overflow},
            inputs={"x": _hard_to_round(name)},
            exact=("out",),
        )


def _hard_to_round(name: str) -> Array:
    """Midpoints of neighbours and the doubles beside them, among subnormals, around 1 and at the end of the range."""
    numbers = exact.positive_numbers(name)
    one = numbers.index(1)
    places = [0, 1, 2, 2 ** exact.FIELDS[name][1] - 1, one - 1, one, one + 1, len(numbers) - 2]
    middles = [float((numbers[i] + numbers[i + 1]) / 2) for i in places]
    middles.append(float(numbers[-1] + (numbers[-1] - numbers[-2]) / 2))
    values = [x for middle in middles for x in (np.nextafter(middle, 0), middle, np.nextafter(middle, np.inf))]
    values += [0.0, float(numbers[1]) / 4, 1.0, float(numbers[-1]), 2 * float(numbers[-1]), 1e300]
    return np.array([sign * x for x in values for sign in (1, -1)])


_SCALES = "a scale inverted, applied twice, left out, or read from another group or token"

_LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp8_per_tensor": (
        "the tensor's scale left out, applied to the rope part alone or twice",
        ("vllm-project/vllm/pull/37054", "sgl-project/sglang/pull/34765"),
    ),
    "fp8_ds_mla": (
        f"{_SCALES}; a scale rounded to bfloat16 or to a power of two; rows of 656 bytes read as 576",
        ("vllm-project/vllm/pull/49435", "vllm-project/vllm/pull/48642", "vllm-project/vllm/pull/36297"),
    ),
    "deepseek_v4": (
        f"{_SCALES}; scales sought beside their codes and not after all rows of the page; the exponent's bias",
        ("vllm-project/vllm/pull/49435",),
    ),
    "nvfp4_ds_mla": (
        f"{_SCALES}; the halves of a byte exchanged; the table of scales not transposed",
        ("vllm-project/vllm/pull/37054",),
    ),
    "indexer_fp8": (
        f"{_SCALES}; a row of 132 bytes in place of all codes before all scales",
        ("ROCm/aiter/pull/2954",),
    ),
}
"""What the cases of each layout catch, and where such faults were reported."""


def _row_cases(name: str, catches: str, sources: tuple[str, ...]) -> Iterator[Case]:
    """Packing numbers into pages, and reading the same pages, whose unused bytes are 0xFF there."""
    layout, numbers = exact.LAYOUTS[name], Numbers(f"rows-{name}")
    short = name.replace("_", "-")
    codes, scales, plain = draw_rows(numbers, layout, TOKENS)
    parameters: dict[str, Any] = {"layout": name, "page_size": PAGE_SIZE}
    inputs: dict[str, NDArray[Any]] = {"codes": codes}
    dtypes = {}
    if layout.scale is not None:
        inputs["scales"], dtypes["scales"] = scales, "float32"
    if layout.plains:
        inputs["plain"], dtypes["plain"] = plain, "bfloat16"
    yield Case(
        name=f"pack-{short}",
        operation="pack",
        purpose=f"{TOKENS} rows in pages of {PAGE_SIZE}: codes (bit patterns), scales and plain numbers; unused bytes are 0",
        catches=catches,
        sources=sources,
        parameters=parameters,
        inputs=inputs,
        dtypes=dtypes,
        exact=("pages",),
    )
    tensor_scale = 1.0 if layout.scale is not None else 0.8125
    yield Case(
        name=f"unpack-{short}",
        operation="unpack",
        purpose="the numbers that such pages hold, code · scale exactly; unused bytes, all of them 0xFF, are not read",
        catches=catches,
        sources=sources,
        parameters={**parameters, "tokens": TOKENS, "tensor_scale": tensor_scale},
        inputs={"pages": exact.pack(codes, scales, plain, name, PAGE_SIZE, unused=0xFF)},
        exact=("rows",),
    )


def draw_rows(numbers: Numbers, layout: exact.Layout, tokens: int) -> tuple[NDArray[Any], Array, Array]:
    """Codes [tokens, codes] as bit patterns; scales that are no powers of two, where the format has others; plain numbers."""
    return (
        _draw(numbers, layout, "codes", tokens),
        _draw(numbers, layout, "scales", tokens),
        _draw(numbers, layout, "plain", tokens),
    )


def _draw(numbers: Numbers, layout: exact.Layout, kind: str, tokens: int) -> NDArray[Any]:
    if kind == "codes":
        finite = [
            p for p in range(2 ** exact.bits(layout.code_format)) if exact.number(p, layout.code_format) is not None
        ]
        shape = (tokens, layout.codes)
        drawn = [finite[numbers.below(len(finite))] for _ in range(shape[0] * shape[1])]
        return np.array(drawn, dtype=np.uint8).reshape(shape)
    if kind == "plain":
        plain: Array = numbers.array(tokens, layout.plains, size=4.0, dtype=layout.plain_format)
        return plain
    shape = (tokens, layout.codes // layout.group)
    if layout.scale_format == "float8_e8m0fnu":
        return np.array([2.0 ** (numbers.below(20) - 12) for _ in range(shape[0] * shape[1])]).reshape(shape)
    scales: Array = numbers.array(*shape, size=0.25, centre=0.5, dtype=layout.scale_format)
    return scales
