"""Bytes of quantised caches: sizes, hand-assembled pages, and which bytes matter."""

from __future__ import annotations

import dataclasses
import math
import re
import struct

import numpy as np
import pytest
import torch

from mla_spec.reference.cache_layout import LAYOUTS, QuantisedRows, layout_of, pack, segment, unpack, used_bytes
from mla_spec.reference.formats import FORMATS, decode_bits
from mla_spec.reference.quantised_cache import dequantise, quantise
from mla_spec.reference.typing import Array

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def stored_rows(name: str, tokens: int, seed: int = 0) -> QuantisedRows:
    """Random numbers of a layout's formats: every finite code, scales over many binades."""
    layout, rng = LAYOUTS[name], np.random.default_rng(seed)

    def numbers(shape: tuple[int, ...], fmt: str, low: int = 0) -> Array:
        bits = rng.integers(low, FORMATS[fmt].largest_pattern + 1, shape)
        return decode_bits(bits, fmt)

    def signed(x: Array) -> Array:
        return np.where(rng.random(x.shape) < 0.5, -x, x)

    scales = numbers((tokens, layout.groups), layout.scale, low=1) if layout.scale else np.full((tokens, 1), 1.0)
    codes = signed(numbers((tokens, layout.scaled_dim), layout.code))
    return QuantisedRows(codes, scales, signed(numbers((tokens, layout.plain_dim), layout.plain)))


def in_token_order(stored: QuantisedRows) -> list[Array]:
    """The parts of unpacked pages, [pages · page_size, ...]."""
    return [part.reshape(math.prod(part.shape[:2]), part.shape[2]) for part in dataclasses.astuple(stored)]


# Bytes per token, of a page of 64 tokens, and of a page of one token.
SIZES = {
    "fp8_per_tensor": (576, 64 * 576, 576),
    "fp8_ds_mla": (656, 41984, 656),
    "deepseek_v4": (584, 37440, 1152),
    "deepseek_v4_1": (528, 33792, 1024),
    "nvfp4_ds_mla": (352, 22528, 352),
    "indexer_fp8": (132, 8448, 132),
    "indexer_mxfp4": (68, 4352, 68),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes(name: str) -> None:
    layout = LAYOUTS[name]
    assert (layout.bytes_per_token, layout.bytes_per_page(64), layout.bytes_per_page(1)) == SIZES[name]
    for page_size in range(1, 200):
        size = layout.bytes_per_page(page_size)
        assert size % layout.page_alignment == 0
        assert 0 <= size - page_size * layout.bytes_per_token < layout.page_alignment


def page_by_hand(name: str, stored: QuantisedRows, page_size: int) -> bytes:
    """One page from the published offsets, byte by byte; torch and struct make the bytes of numbers."""
    page = bytearray(LAYOUTS[name].bytes_per_page(page_size))

    def e4m3(x: float) -> int:
        return int(torch.tensor(x, dtype=torch.float32).to(torch.float8_e4m3fn).view(torch.uint8))

    def bfloat16(x: float) -> bytes:
        return struct.pack("<f", x)[2:]

    def e2m1_pair(low: float, high: float) -> int:
        first, second = (
            next(i for i, v in enumerate(E2M1) if v == x and math.copysign(1, v) == math.copysign(1, x))
            for x in (low, high)
        )
        return first + 16 * second

    def e8m0(x: float) -> int:
        return int(math.log2(x)) + 127

    for row, (codes, scales, plain) in enumerate(zip(*dataclasses.astuple(stored), strict=True)):
        match name:
            case "fp8_per_tensor":
                for i in range(576):
                    page[576 * row + i] = e4m3(codes[i])
            case "fp8_ds_mla":
                for i in range(512):
                    page[656 * row + i] = e4m3(codes[i])
                for g in range(4):
                    page[656 * row + 512 + 4 * g : 656 * row + 516 + 4 * g] = struct.pack("<f", scales[g])
                for i in range(64):
                    page[656 * row + 528 + 2 * i : 656 * row + 530 + 2 * i] = bfloat16(plain[i])
            case "deepseek_v4":
                for i in range(448):
                    page[576 * row + i] = e4m3(codes[i])
                for i in range(64):
                    page[576 * row + 448 + 2 * i : 576 * row + 450 + 2 * i] = bfloat16(plain[i])
                for g in range(7):
                    page[576 * page_size + 8 * row + g] = e8m0(scales[g])
            case "deepseek_v4_1":
                for i in range(512):
                    page[512 * row + i] = e4m3(codes[i])
                for g in range(16):
                    page[512 * page_size + 16 * row + g] = e8m0(scales[g])
            case "nvfp4_ds_mla":
                for i in range(256):
                    page[352 * row + i] = e2m1_pair(codes[2 * i], codes[2 * i + 1])
                for i in range(64):
                    page[352 * row + 256 + i] = e4m3(plain[i])
                for g in range(32):
                    page[352 * row + 320 + 8 * (g & 3) + (g >> 2)] = e4m3(scales[g])
            case "indexer_fp8":
                for i in range(128):
                    page[128 * row + i] = e4m3(codes[i])
                page[128 * page_size + 4 * row : 128 * page_size + 4 * row + 4] = struct.pack("<f", scales[0])
            case "indexer_mxfp4":
                for i in range(64):
                    page[64 * row + i] = e2m1_pair(codes[2 * i], codes[2 * i + 1])
                for g in range(4):
                    page[64 * page_size + 4 * row + g] = e8m0(scales[g])
    return bytes(page)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("page_size", [3, 64])
def test_packed_bytes_are_the_hand_assembled_ones(name: str, page_size: int) -> None:
    layout, stored = LAYOUTS[name], stored_rows(name, 4)
    pages = pack(stored, layout, page_size)
    assert pages.shape == (2 if page_size == 3 else 1, layout.bytes_per_page(page_size))
    first = QuantisedRows(*(part[:page_size] for part in dataclasses.astuple(stored)))
    assert pages[0].tobytes() == page_by_hand(name, first, page_size)
    if page_size == 3:
        rest = QuantisedRows(*(part[3:] for part in dataclasses.astuple(stored)))
        assert pages[1].tobytes() == page_by_hand(name, rest, page_size)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_unpacking_gives_the_numbers_that_were_packed(name: str, page_size: int) -> None:
    layout, stored = LAYOUTS[name], stored_rows(name, 11)
    got = unpack(pack(stored, layout, page_size), layout, page_size)
    for part, want in zip(in_token_order(got), dataclasses.astuple(stored), strict=True):
        np.testing.assert_array_equal(part[:11], want)
        np.testing.assert_array_equal(np.signbit(part[:11]), np.signbit(want))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_byte_matters_exactly_when_it_is_used(name: str) -> None:
    """Every byte of two pages of two tokens, three of them used, is changed in turn."""
    layout, tokens = LAYOUTS[name], 3
    rows = np.random.default_rng(1).uniform(0.5, 2, (tokens, layout.width))
    pages = pack(quantise(rows, layout), layout, 2)

    def values(pages: np.ndarray) -> list[Array]:
        return [part[:tokens] for part in in_token_order(unpack(pages, layout, 2))]

    before, matters = values(pages), np.zeros(pages.shape, dtype=bool)
    for at in np.ndindex(*pages.shape):
        changed = pages.copy()
        changed[at] ^= 1
        matters[at] = not all(map(np.array_equal, before, values(changed)))
    np.testing.assert_array_equal(matters, used_bytes(layout, 2, tokens))


def test_unused_rows_hold_anything() -> None:
    for name, layout in LAYOUTS.items():
        pages = pack(stored_rows(name, 3), layout, 2)
        garbage = np.where(used_bytes(layout, 2, 3), pages, 0xFF).astype(np.uint8)
        got, want = (dequantise(unpack(p, layout, 2), layout).reshape(4, -1) for p in (garbage, pages))
        np.testing.assert_array_equal(got[:3], want[:3])
        assert not np.array_equal(got[3], want[3])


def test_the_scale_of_a_tensor_is_kept_outside() -> None:
    layout, stored = LAYOUTS["fp8_per_tensor"], stored_rows("fp8_per_tensor", 2)
    pages = pack(stored, layout, 2)
    got = dequantise(unpack(pages, layout, 2, tensor_scale=0.375), layout)
    np.testing.assert_array_equal(got[0], stored.codes * 0.375)
    for wrong in (0.0, -1.0, 0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^tensor_scale must be a positive float32 number, got {wrong}$"):
            unpack(pages, layout, 2, tensor_scale=wrong)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_tokens_need_no_pages(name: str) -> None:
    layout = LAYOUTS[name]
    pages = pack(stored_rows(name, 0), layout, 4)
    assert pages.shape == (0, layout.bytes_per_page(4))
    assert dequantise(unpack(pages, layout, 4), layout).shape == (0, 4, layout.width)


def test_pages_of_other_sizes_are_refused() -> None:
    layout = LAYOUTS["deepseek_v4"]
    message = re.escape("deepseek_v4 pages of 64 tokens are uint8 [pages, 37440], got uint8 [2, 37376]")
    with pytest.raises(ValueError, match=message):
        unpack(np.zeros((2, 64 * 584), np.uint8), layout, 64)
    for pages in (np.zeros((2, 37440)), np.zeros(37440, np.uint8)):
        with pytest.raises(ValueError, match=r"^deepseek_v4 pages of 64 tokens are"):
            unpack(pages, layout, 64)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown cache layout 'fp9'; known layouts are fp8_per_tensor, fp8_ds_mla, "
    ):
        layout_of("fp9")
    assert layout_of("indexer_fp8") is LAYOUTS["indexer_fp8"]
    with pytest.raises(ValueError, match=r"^indexer_fp8 has no segment 'plain'$"):
        segment(np.zeros((1, 132), np.uint8), LAYOUTS["indexer_fp8"], 1, "plain")


def test_numbers_that_a_layout_does_not_hold_are_refused() -> None:
    stored = stored_rows("deepseek_v4", 1)
    with pytest.raises(ValueError, match=r"is not a number of float8_e8m0fnu$"):
        pack(dataclasses.replace(stored, scales=stored.scales * 1.5), LAYOUTS["deepseek_v4"], 1)
