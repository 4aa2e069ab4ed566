"""Number formats and quantised cache rows in rational arithmetic, as their specifications write them down.

Nothing of ``mla_spec.reference`` is used: bit fields, rounding and byte offsets are stated here once more. Formats: IEEE
754-2019, section 3.4; OCP 8-bit Floating Point (OFP8) 1.0; OCP Microscaling Formats (MX) 1.0. Rows: vLLM,
csrc/cache_kernels.cu (fp8_ds_mla, fp8_per_tensor, indexer_fp8), csrc/nvfp4_ds_mla_cache_kernels.cu and
vllm/models/deepseek_v4/common/ops/cache_utils.py (deepseek_v4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.typing import Array

FIELDS = {
    "float16": (5, 10, 15),
    "bfloat16": (8, 7, 127),
    "float32": (8, 23, 127),
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float4_e2m1fn": (2, 1, 1),
}
"""Bits of exponent and fraction, and exponent bias. A sign bit comes before them."""


def bits(name: str) -> int:
    """Of one number."""
    return 8 if name == "float8_e8m0fnu" else 1 + sum(FIELDS[name][:2])


def number(pattern: int, name: str) -> Fraction | None:
    """The number with this bit pattern; None for infinities and NaN."""
    if name == "float8_e8m0fnu":  # an exponent alone
        return None if pattern == 255 else Fraction(2) ** (pattern - 127)
    exponent_bits, fraction_bits, bias = FIELDS[name]
    fraction = pattern & (2**fraction_bits - 1)
    exponent = pattern >> fraction_bits & (2**exponent_bits - 1)
    sign = -1 if pattern >> (fraction_bits + exponent_bits) else 1
    if exponent == 2**exponent_bits - 1:
        if name == "float8_e4m3fn" and fraction == 7:
            return None
        if name not in ("float8_e4m3fn", "float4_e2m1fn"):
            return None
    significand = Fraction(fraction, 2**fraction_bits) + (exponent > 0)
    power: Fraction = Fraction(2) ** (max(exponent, 1) - bias)
    value: Fraction = sign * significand * power
    return value


@cache
def positive_numbers(name: str) -> list[Fraction]:
    """Number of each pattern without sign, in ascending order, up to the largest finite one."""
    found: list[Fraction] = []
    while (value := number(len(found), name)) is not None and value >= (found[-1] if found else 0):
        found.append(value)
    return found


def nearest(x: Fraction, name: str) -> Fraction | None:
    """The nearest number of a format of at most 16 bits, of two as near the one with the even pattern; None beyond."""
    numbers = positive_numbers(name)
    size, above = abs(x), 0
    low, high = 0, len(numbers)
    while low < high:  # the first number that is not smaller
        middle = (low + high) // 2
        low, high = (middle + 1, high) if numbers[middle] < size else (low, middle)
    above = low
    if above == len(numbers):  # as if the numbers went on
        below, next_one = numbers[-1], 2 * numbers[-1] - numbers[-2]
        odd = (len(numbers) - 1) % 2 == 1
        if size - below > next_one - size or (size - below == next_one - size and odd):
            return None
        chosen = below
    elif above == 0 or size - numbers[above - 1] > numbers[above] - size:
        chosen = numbers[above]
    elif size - numbers[above - 1] < numbers[above] - size:
        chosen = numbers[above - 1]
    else:
        chosen = numbers[above - above % 2]
    return chosen if x >= 0 else -chosen


def pattern_of(x: float, name: str) -> int:
    """The bit pattern of a number that the format holds."""
    if name == "float8_e8m0fnu":
        return math.frexp(x)[1] - 1 + 127
    exponent_bits, fraction_bits, bias = FIELDS[name]
    sign = int(math.copysign(1, x) < 0) << (exponent_bits + fraction_bits)
    if x == 0:
        return sign
    exponent = max(math.frexp(abs(x))[1] - 1, 1 - bias)
    fraction = Fraction(abs(x)) / Fraction(2) ** exponent * 2**fraction_bits  # with the implicit bit
    assert fraction.denominator == 1
    field = exponent + bias if fraction >= 2**fraction_bits else 0
    pattern: int = sign | field << fraction_bits | int(fraction) % 2**fraction_bits
    return pattern


# Results


def dequantize_weight(codes: NDArray[Any], scales: Array, block_size: tuple[int, int]) -> Array:
    """Code times the scale of its block, [out, in]."""
    rows, columns = block_size
    out = np.zeros(codes.shape)
    for i, j in np.ndindex(codes.shape):
        code = number(int(codes[i, j]), "float8_e4m3fn")
        assert code is not None
        out[i, j] = _float(code * Fraction(scales[i // rows, j // columns]))
    return out


DIVIDED = {"q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}
"""Weights of which a rank has its own heads' part, and the axis on which heads follow one another."""


def shard_layer(weights: Mapping[str, Array], num_heads: int, ranks: int, rank: int) -> dict[str, Array]:
    """What one rank has of each weight."""
    heads = range(rank * num_heads // ranks, (rank + 1) * num_heads // ranks)
    parts = dict(weights)
    for name in DIVIDED.keys() & weights.keys():
        w = weights[name] if DIVIDED[name] == 0 else weights[name].T
        width = len(w) // num_heads
        rows = np.array([w[head * width + i] for head in heads for i in range(width)])
        parts[name] = rows if DIVIDED[name] == 0 else np.ascontiguousarray(rows.T)
    return parts


def gather_gradients(gradients: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Gradients of the whole weights, from those of each rank's: joined where they are divided, else added exactly."""
    gathered: dict[str, Array] = {}
    for name in gradients[0]:
        parts = [each[name] for each in gradients]
        if name in DIVIDED:
            gathered[name] = np.concatenate(parts, axis=DIVIDED[name])
            continue
        sums = [
            sum((Fraction(x) for x in values), Fraction(0))
            for values in np.stack(parts, axis=-1).reshape(-1, len(parts))
        ]
        gathered[name] = np.array([_float(x) for x in sums]).reshape(parts[0].shape)
    return gathered


def write_cache(latent: Array, k_pe: Array, kv_cache: Array, slot_mapping: NDArray[Any]) -> Array:
    """The cache [pages, page size, 1, c+r] with row [latent | k_pe] of each token in its slot; -1 is none."""
    written = kv_cache.copy()
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            page, row = divmod(slot, kv_cache.shape[1])
            written[page, row, 0] = [*latent[token], *k_pe[token]]
    return written


def decode_bits(bits: NDArray[Any], name: str) -> Array:
    """The numbers of finite patterns."""
    return np.array([_float(number(int(p), name)) for p in bits.ravel()]).reshape(bits.shape)


def round_to(x: Array, name: str, overflow: str) -> Array:
    """Nearest numbers; what lies beyond becomes infinite, or the largest number where ``overflow`` is "saturate"."""
    most = float(positive_numbers(name)[-1]) if overflow == "saturate" else math.inf
    rounded = [nearest(Fraction(v), name) for v in x.ravel().tolist()]
    values = [
        math.copysign(most if r is None else float(r), v) for r, v in zip(rounded, x.ravel().tolist(), strict=True)
    ]
    return np.array(values).reshape(x.shape)


def _float(x: Fraction | None) -> float:
    assert x is not None and Fraction(float(x)) == x
    return float(x)


@dataclass(frozen=True)
class Layout:
    """Formats of codes, scales and plain elements, codes per scale, bytes of a page and where in it things lie.

    ``code``, ``scale`` and ``plain`` give the first byte of element i of token t in a page of ``size`` tokens. Two 4-bit
    codes share a byte, the first in its low half. ``scale`` is None where the tensor has one scale, a parameter.
    """

    codes: int
    group: int
    code_format: str
    scale_format: str
    plains: int
    plain_format: str
    page: Callable[[int], int]
    code: Callable[[int, int, int], int]
    scale: Callable[[int, int, int], int] | None
    plain: Callable[[int, int, int], int] | None = None


LAYOUTS = {
    "fp8_per_tensor": Layout(
        *(576, 576, "float8_e4m3fn", "float32", 0, "bfloat16"),
        page=lambda size: 576 * size,
        code=lambda t, i, size: 576 * t + i,
        scale=None,
    ),
    "fp8_ds_mla": Layout(
        *(512, 128, "float8_e4m3fn", "float32", 64, "bfloat16"),
        page=lambda size: 656 * size,
        code=lambda t, i, size: 656 * t + i,
        scale=lambda t, i, size: 656 * t + 512 + 4 * i,
        plain=lambda t, i, size: 656 * t + 528 + 2 * i,
    ),
    "deepseek_v4": Layout(  # scales after the rows, 7 bytes of 8 used; pages are multiples of 576 bytes
        *(448, 64, "float8_e4m3fn", "float8_e8m0fnu", 64, "bfloat16"),
        page=lambda size: -(-584 * size // 576) * 576,
        code=lambda t, i, size: 576 * t + i,
        scale=lambda t, i, size: 576 * size + 8 * t + i,
        plain=lambda t, i, size: 576 * t + 448 + 2 * i,
    ),
    "nvfp4_ds_mla": Layout(  # the 32 scales as an 8 × 4 table, stored column by column
        *(512, 16, "float4_e2m1fn", "float8_e4m3fn", 64, "float8_e4m3fn"),
        page=lambda size: 352 * size,
        code=lambda t, i, size: 352 * t + i // 2,
        scale=lambda t, i, size: 352 * t + 320 + i % 4 * 8 + i // 4,
        plain=lambda t, i, size: 352 * t + 256 + i,
    ),
    "indexer_fp8": Layout(
        *(128, 128, "float8_e4m3fn", "float32", 0, "bfloat16"),
        page=lambda size: 132 * size,
        code=lambda t, i, size: 128 * t + i,
        scale=lambda t, i, size: 128 * size + 4 * t + 4 * i,
    ),
}
"""By name: counts and formats, then offsets."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}


def _places(layout: Layout, page_size: int, tokens: int) -> Iterator[tuple[str, int, int, int, int]]:
    """(kind, token, element, page, first byte) of all that is stored beside 4-bit codes' halves."""
    for token in range(tokens):
        page, t = divmod(token, page_size)
        for kind, count, place in (
            ("codes", layout.codes, layout.code),
            ("scales", layout.codes // layout.group, layout.scale),
            ("plain", layout.plains, layout.plain),
        ):
            if place is not None:
                for i in range(count):
                    yield kind, token, i, page, place(t, i, page_size)


def pack(
    codes: NDArray[Any], scales: Array, plain: Array, layout_name: str, page_size: int, *, unused: int = 0
) -> NDArray[np.uint8]:
    """Pages of uint8 that hold code patterns [tokens, codes], scales and plain numbers."""
    layout, tokens = LAYOUTS[layout_name], len(codes)
    pages = np.full((-(-tokens // page_size), layout.page(page_size)), unused, dtype=np.uint8)
    for kind, token, i, page, at in _places(layout, page_size, tokens):
        if kind == "codes":
            second = layout.code_format == "float4_e2m1fn" and i % 2 == 1
            pages[page, at] = int(codes[token, i]) << 4 | pages[page, at] if second else codes[token, i]
            continue
        name = layout.scale_format if kind == "scales" else layout.plain_format
        pattern = pattern_of(float((scales if kind == "scales" else plain)[token, i]), name)
        pages[page, at : at + WIDTHS[name]] = list(pattern.to_bytes(WIDTHS[name], "little"))
    return pages


def unpack(pages: NDArray[Any], layout_name: str, page_size: int, tokens: int, tensor_scale: float = 1.0) -> Array:
    """The rows [tokens, codes + plains]: code · scale, then plain numbers; NaN where a pattern is no number."""
    layout = LAYOUTS[layout_name]
    rows = np.zeros((tokens, layout.codes + layout.plains), dtype=object)
    found: dict[str, Any] = {"scales": {}}
    for kind, token, i, page, at in _places(layout, page_size, tokens):
        name = {"codes": layout.code_format, "scales": layout.scale_format, "plain": layout.plain_format}[kind]
        raw = bytes(int(b) for b in pages[page, at : at + WIDTHS.get(name, 1)])
        pattern = int.from_bytes(raw, "little")
        if name == "float4_e2m1fn":
            pattern = pattern >> 4 * (i % 2) & 15
        value = number(pattern, name)
        if kind == "scales":
            found["scales"][token, i] = value
        else:
            rows[token, i + (layout.codes if kind == "plain" else 0)] = value
    for token in range(tokens):
        for i in range(layout.codes):
            code, scale = rows[token, i], found["scales"].get((token, i // layout.group), Fraction(tensor_scale))
            rows[token, i] = None if code is None or scale is None else code * scale
    return np.array([math.nan if x is None else _float(x) for x in rows.ravel()]).reshape(rows.shape)
