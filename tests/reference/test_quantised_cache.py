"""Quantising: exact rational arithmetic, honest quantisers in float32 that must pass, faulty ones that must not."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from mla_spec.bounds.quantised_cache import error_bound, scale_limits
from mla_spec.reference.cache import paged_decode
from mla_spec.reference.cache_layout import LAYOUTS, CacheLayout, QuantisedRows, pack, used_bytes
from mla_spec.reference.formats import FORMATS, decode_bits, encode, round_to
from mla_spec.reference.quantised_cache import dequantise, dequantised_cache, quantise
from mla_spec.reference.typing import Array

SCALED = [name for name, layout in LAYOUTS.items() if layout.scale]
FLOAT8 = ["fp8_ds_mla", "deepseek_v4", "deepseek_v4_1", "indexer_fp8"]


def some_rows(layout: CacheLayout, tokens: int = 8, seed: int = 0) -> Array:
    """Rows in bfloat16 whose groups differ in size by many binades, with groups of zeros and single outliers."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, layout.width))
    per_group = rows[:, : layout.scaled_dim].reshape(tokens, layout.groups, layout.group)
    per_group *= 2.0 ** rng.integers(-6, 7, (tokens, layout.groups, 1))
    per_group[1, 0] = 0
    per_group[2, -1, 1:] *= 2.0**-8
    per_group[3] = np.where(rng.random(per_group[3].shape) < 0.5, per_group[3], -0.0)
    return round_to(rows, "bfloat16")


def groups_of(rows: Array, layout: CacheLayout) -> Array:
    return rows[:, : layout.scaled_dim].reshape(len(rows), layout.groups, layout.group)


def next_below(x: float, name: str) -> Fraction:
    bits = int(encode(np.array(x), name))
    return Fraction(float(decode_bits(np.array(bits - 1), name))) if bits else Fraction(0)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_scales_are_the_smallest_that_saturate_nothing(name: str, power_of_two: bool) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout)
    scales = quantise(rows, layout, power_of_two=power_of_two).scales
    largest = Fraction(FORMATS[layout.code].max_finite)
    for group, scale in zip(groups_of(rows, layout).reshape(-1, layout.group), scales.ravel().tolist(), strict=True):
        wanted = max(Fraction(float(np.abs(group).max())) / largest, Fraction(layout.scale_floor))
        assert scale >= wanted
        if power_of_two:
            assert math.frexp(scale)[0] == 0.5
            assert Fraction(scale) / 2 < wanted
        else:
            assert next_below(scale, layout.scale) < wanted


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_are_the_nearest_ones(name: str) -> None:
    """Against all codes of the format, in rational arithmetic; ties to the even pattern."""
    layout = LAYOUTS[name]
    rows = some_rows(layout, tokens=4)
    stored = quantise(rows, layout, tensor_scale=0.0123291015625)
    fmt = FORMATS[layout.code]
    sizes = decode_bits(np.arange(fmt.largest_pattern + 1), layout.code).tolist()
    rng = np.random.default_rng(3)
    for token, i in zip(rng.integers(0, 4, 400), rng.integers(0, layout.scaled_dim, 400), strict=True):
        size = abs(Fraction(float(rows[token, i])))
        scale = Fraction(float(stored.scales[token, i // layout.group]))
        best = min(range(len(sizes)), key=lambda k: (abs(size - Fraction(sizes[k]) * scale), k % 2))
        assert stored.codes[token, i] == math.copysign(sizes[best], rows[token, i])


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantised_values_are_exact_products(name: str) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout, tokens=4)
    stored = quantise(rows, layout, tensor_scale=0.0123291015625)
    values = dequantise(stored, layout)
    for t, i in itertools.product(range(4), range(layout.scaled_dim)):
        product = Fraction(float(stored.codes[t, i])) * Fraction(float(stored.scales[t, i // layout.group]))
        assert Fraction(float(values[t, i])) == product
    np.testing.assert_array_equal(values[:, layout.scaled_dim :], stored.plain)
    if layout.plain == "bfloat16":
        np.testing.assert_array_equal(stored.plain, rows[:, layout.scaled_dim :])


@pytest.mark.parametrize("name", FLOAT8)
def test_error_of_e4m3_codes(name: str) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout, tokens=32)
    stored = quantise(rows, layout)
    error = np.abs(dequantise(stored, layout) - rows)[:, : layout.scaled_dim]
    scales = np.repeat(stored.scales, layout.group, axis=-1)
    stated = np.maximum(2.0**-4 * np.abs(rows[:, : layout.scaled_dim]), 2.0**-10 * scales)
    assert (error <= stated).all()
    assert (error > 0.9 * stated).any()


# Edges.


@pytest.mark.parametrize("name", SCALED)
def test_groups_of_zeros(name: str) -> None:
    layout = LAYOUTS[name]
    stored = quantise(np.zeros((2, layout.width)), layout)
    assert (stored.codes == 0).all()
    assert (stored.scales >= layout.scale_floor).all()
    assert (stored.scales > 0).all()
    assert (dequantise(stored, layout) == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_huge_rows_saturate_and_are_never_nan(name: str) -> None:
    layout = LAYOUTS[name]
    largest = FORMATS["bfloat16"].max_finite
    rows = np.full((1, layout.width), largest)
    rows[:, ::2] = -1e-30
    stored = quantise(rows, layout)
    values = dequantise(stored, layout)
    assert np.isfinite(values).all()
    if layout.scale:
        assert judged(rows, stored, layout) == (True, True)
    if layout.code == layout.plain == "float8_e4m3fn":
        assert values[0, 1] == 448.0


@pytest.mark.parametrize("name", ["fp8_ds_mla", "deepseek_v4", "nvfp4_ds_mla"])
def test_a_large_k_pe_leaves_the_latent_alone(name: str) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout)
    alone = quantise(rows, layout)
    rows[:, layout.scaled_dim :] *= 2.0**12
    beside = quantise(rows, layout)
    np.testing.assert_array_equal(beside.codes, alone.codes)
    np.testing.assert_array_equal(beside.scales, alone.scales)
    if layout.plain == "float8_e4m3fn":
        assert np.abs(beside.plain).max() == 448.0
    else:
        np.testing.assert_array_equal(beside.plain, rows[:, layout.scaled_dim :])


def test_rows_that_cannot_be_quantised_are_refused() -> None:
    layout = LAYOUTS["indexer_fp8"]
    with pytest.raises(ValueError, match=re.escape("rows of indexer_fp8 have 128 elements, got shape [2, 127]")):
        quantise(np.zeros((2, 127)), layout)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^only finite rows can be quantised$"):
            quantise(np.full((1, 128), bad), layout)
    with pytest.raises(ValueError, match=r"^fp8_per_tensor stores no scales$"):
        scale_limits(np.zeros((1, 576)), LAYOUTS["fp8_per_tensor"])
    with pytest.raises(ValueError, match=r"^tensor_scale must be a positive float32 number, got 0\.1$"):
        quantise(np.zeros((1, 576)), LAYOUTS["fp8_per_tensor"], tensor_scale=0.1)


# Quantisers in float32, as kernels are: what they store, judged.


def in_torch(rows: Array, layout: CacheLayout, *, divide: str, power_of_two: bool, floor: float) -> QuantisedRows:
    """A quantiser in torch's float32, which computes scales and quotients in its own ways."""
    x = torch.from_numpy(groups_of(rows, layout)).to(torch.float32)
    largest = FORMATS[layout.code].max_finite
    amax = x.abs().amax(dim=-1)
    scale = 1 / (largest / amax) if divide == "reciprocal" else amax / largest
    wanted = torch.clamp(scale, min=floor)
    up = layout.scale == "float8_e8m0fnu" or (layout.scale == "float32" and power_of_two)
    scales = torch.exp2(torch.ceil(torch.log2(wanted))) if up else wanted
    scales = torch.from_numpy(round_to(scales.double().numpy(), layout.scale)).to(torch.float32)
    y = x * (1 / scales)[..., None] if divide == "reciprocal" else x / scales[..., None]
    codes = round_to(y.double().numpy(), layout.code, overflow="saturate").reshape(len(rows), layout.scaled_dim)
    plain = round_to(rows[:, layout.scaled_dim :], layout.plain, overflow="saturate")
    return QuantisedRows(codes, scales.double().numpy(), plain)


def judged(rows: Array, stored: QuantisedRows, layout: CacheLayout) -> tuple[bool, bool]:
    """Whether the scales are allowed, and whether every element is within its bound."""
    low, high = scale_limits(rows, layout)
    within = np.abs(dequantise(stored, layout) - rows) <= error_bound(rows, stored.scales, layout)
    return bool(((low <= stored.scales) & (stored.scales <= high)).all()), bool(within.all())


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("divide", ["divide", "reciprocal"])
@pytest.mark.parametrize("name", SCALED)
def test_honest_quantisers_pass(name: str, divide: str, power_of_two: bool, floor: float) -> None:
    layout = LAYOUTS[name]
    least = 2.0**-126 if layout.scale != "float8_e4m3fn" else 2.0**-9
    for seed in range(4):
        rows = some_rows(layout, tokens=32, seed=seed)
        edges = groups_of(rows, layout)[4:12]
        largest = FORMATS[layout.code].max_finite
        powers = 2.0 ** np.arange(-4, 4)[:, None]
        edges[:, :, 0] = powers * largest  # the quotient amax / largest is a power of two, and its neighbours
        edges[:, 1:2, 0] = powers * (largest + largest / 128)
        edges[:, 2:3, 0] = powers * (largest - largest / 256)
        rows[4:12, : layout.scaled_dim] = edges.reshape(8, -1)
        rows = round_to(rows, "bfloat16")
        stored = in_torch(
            rows, layout, divide=divide, power_of_two=power_of_two, floor=max(floor * layout.scale_floor, least)
        )
        assert judged(rows, stored, layout) == (True, True)


@pytest.mark.parametrize("name", SCALED)
def test_the_reference_passes(name: str) -> None:
    layout = LAYOUTS[name]
    for power_of_two in (False, True):
        rows = some_rows(layout, tokens=32)
        assert judged(rows, quantise(rows, layout, power_of_two=power_of_two), layout) == (True, True)


def rebuilt(rows: Array, scales: Array, layout: CacheLayout, *, rounding: str = "nearest") -> QuantisedRows:
    """Codes for scales of one's own, rounded one way or the other."""
    quotients = (groups_of(rows, layout) / scales[..., None]).reshape(len(rows), layout.scaled_dim)
    codes = round_to(quotients, layout.code, rounding=rounding, overflow="saturate")
    return QuantisedRows(codes, scales, quantise(rows, layout).plain)


@pytest.mark.parametrize("name", SCALED)
def test_faulty_scales_are_refused(name: str) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout, tokens=32)
    good = quantise(rows, layout).scales
    low, high = scale_limits(rows, layout)
    ordinary = good > 8 * layout.scale_floor
    assert ordinary.mean() > 0.5
    assert (good[ordinary] / 2 < low[ordinary]).all()  # the largest elements saturate
    assert (good[ordinary] * 4 > high[ordinary]).all()  # a bit is lost
    neighbours = np.roll(good, 1, axis=0 if layout.groups == 1 else 1)
    assert not ((low <= neighbours) & (neighbours <= high)).all()


@pytest.mark.parametrize("name", SCALED)
def test_only_groups_of_zeros_may_have_the_scale_zero(name: str) -> None:
    layout = LAYOUTS[name]
    rows = np.zeros((2, layout.width))
    rows[0, : layout.scaled_dim : layout.group] = 2.0**-133  # the smallest bfloat16
    low, _ = scale_limits(rows, layout)
    assert (low[0] > 0).all()
    assert (low[1] == 0).all()
    np.testing.assert_array_equal(error_bound(rows[1], np.zeros(layout.groups), layout), 0)


def test_limits_of_scales_allow_for_the_quantiser_s_arithmetic() -> None:
    """The largest magnitude over 448 is just below 1, which float32 may take for 1 or a little more, and round up to 1 or 2."""
    rows = np.full((1, 128), 448 * (1 - 2.0**-24))
    low, high = scale_limits(rows, LAYOUTS["indexer_fp8"])
    assert 1 - 2.0**-20 < low[0, 0] < 1 - 2.0**-24
    assert 2 < high[0, 0] < 2 + 2.0**-19
    wide_low, wide_high = scale_limits(rows, LAYOUTS["indexer_fp8"], arithmetic="bfloat16")
    assert wide_low < low
    assert high < wide_high


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_limits_of_scales_are_those_written_out(arithmetic: str) -> None:
    """Four operations and a logarithm of 8 roundoffs lie between the largest magnitude and the scale."""
    for amax in (448 * 2.0**-40, 448 * 2.0**-9, 3.0, 448.0):
        rows = np.zeros((1, 128))
        rows[0, 5] = -amax
        low, high = scale_limits(rows, LAYOUTS["indexer_fp8"], arithmetic=arithmetic)
        wanted, least = amax / 448, LAYOUTS["indexer_fp8"].scale_floor
        n = (4 + 8 * abs(math.log2(max(wanted, least)))) * FORMATS[arithmetic].unit_roundoff
        slack = n / (1 - n) if n < 1 else math.inf
        smallest = max(float(round_to(np.array(wanted * (1 - slack)), "float32")), 2.0**-149)
        assert low[0, 0] == smallest
        assert high[0, 0] == pytest.approx(2 * max(wanted, least) * (1 + slack), rel=1e-15)


@pytest.mark.parametrize("name", SCALED)
def test_error_is_that_written_out(name: str) -> None:
    """What the nearest code leaves, and twice γ_3 of float32 for the division; plain elements are rounded once."""
    layout = LAYOUTS[name]
    rows = some_rows(layout)[:3]
    stored = quantise(rows, layout)
    bound, nearest = error_bound(rows, stored.scales, layout), dequantise(stored, layout)
    u = 2.0**-24
    for token, i in itertools.product(range(3), range(layout.width)):
        quotient = 2 * (3 * u / (1 - 3 * u)) * abs(rows[token, i]) if i < layout.scaled_dim else 0.0
        assert bound[token, i] == pytest.approx(abs(rows[token, i] - nearest[token, i]) + quotient, rel=1e-15, abs=0)


@pytest.mark.parametrize("name", SCALED)
def test_faulty_codes_are_refused(name: str) -> None:
    layout = LAYOUTS[name]
    rows = some_rows(layout, tokens=32)
    good = quantise(rows, layout)
    group = np.repeat(good.scales, layout.group, axis=-1)
    inverted = round_to(rows[:, : layout.scaled_dim] * group, layout.code, overflow="saturate")
    shifted = np.roll(good.codes, 1, axis=-1)
    faults = {
        "truncated": rebuilt(rows, good.scales, layout, rounding="truncate"),
        "multiplied by the scale": QuantisedRows(inverted, good.scales, good.plain),
        "the neighbouring element's": QuantisedRows(shifted, good.scales, good.plain),
    }
    if layout.plain_dim:
        faults["plain elements truncated"] = QuantisedRows(
            good.codes,
            good.scales,
            round_to(rows[:, layout.scaled_dim :] * (1 - 2.0**-9), layout.plain, rounding="truncate"),
        )
    for fault, stored in faults.items():
        assert judged(rows, stored, layout) == (True, False), fault


def test_a_reader_with_another_scale_exceeds_the_bound() -> None:
    """The writer divides by a float32 scale that is no power of two; readers that take it as bfloat16 or e8m0."""
    layout = LAYOUTS["fp8_ds_mla"]
    rows = some_rows(layout)
    stored = quantise(rows, layout)
    for name in ("bfloat16", "float8_e8m0fnu"):
        read = QuantisedRows(stored.codes, round_to(stored.scales, name), stored.plain)
        bound = error_bound(rows, stored.scales, layout)
        assert (np.abs(dequantise(read, layout) - rows) > bound).mean() > 0.3
    exact = quantise(rows, layout, power_of_two=True)
    np.testing.assert_array_equal(round_to(exact.scales, "bfloat16"), exact.scales)


# Decoding.


@pytest.mark.parametrize("name", ["fp8_per_tensor", "fp8_ds_mla", "deepseek_v4", "deepseek_v4_1", "nvfp4_ds_mla"])
def test_decoding_from_pages(name: str) -> None:
    """The same as from a cache of the dequantised rows, whatever unused bytes hold."""
    layout, page_size, lengths = LAYOUTS[name], 4, np.array([6, 3])
    rng = np.random.default_rng(5)
    rows = some_rows(layout, tokens=9)
    stored = quantise(rows, layout, tensor_scale=0.75)
    pages = np.full((5, layout.bytes_per_page(page_size)), 0xFF, dtype=np.uint8)
    table = np.array([[3, 1], [4, 0]], dtype=np.int32)
    for row, (start, length) in zip(table, ((0, 6), (6, 3)), strict=True):
        part = QuantisedRows(*(x[start : start + length] for x in (stored.codes, stored.scales, stored.plain)))
        packed = pack(part, layout, page_size)
        pages[row[: len(packed)]] = np.where(used_bytes(layout, page_size, length), packed, 0xFF)
    q = rng.standard_normal((2, 1, 3, layout.width))
    options = {"head_dim_v": 448, "softmax_scale": 1 / 16}
    cache = dequantised_cache(pages, layout, page_size, tensor_scale=0.75)
    assert np.isnan(cache).any()
    out, lse = paged_decode(q, cache, table, lengths, **options)
    plain = np.zeros((4, page_size, 1, layout.width))
    values = dequantise(stored, layout)
    plain[0, :, 0], plain[1, :2, 0], plain[2, :3, 0] = values[:4], values[4:6], values[6:]
    want, want_lse = paged_decode(q, plain, np.array([[0, 1], [2, 3]]), lengths, **options)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
