"""Laws of quantised caches: ``quantize_cache`` and ``dequantize_cache``, apart and by bytes that the other did not make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mla_spec.bounds.quantised_cache import scale_limits
from mla_spec.judging.law import Run, law
from mla_spec.operations.all import PagesCase, QuantiseCase
from mla_spec.operations.quantised_cache import ROPE_DIM, PagesInputs
from mla_spec.operations.quantised_driver import QuantisedDriver
from mla_spec.properties.expected import dequantised_error, quantised_error
from mla_spec.properties.strategies.quantised_cache import (
    latent_formats,
    pages_cases,
    quantise_cases,
    stores_scales,
)
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.cache_layout import Bytes, CacheLayout, QuantisedRows, unpack, used_bytes
from mla_spec.reference.formats import round_to
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result, computed, tensor_bits
from mla_spec.subjects.supports import Supports

QUANTISE = ("quantize_cache",)
DEQUANTISE = ("dequantize_cache",)
POISON = (0xFF, 0x7F, 0x80)
"""Bytes: NaN in every format of codes and scales, NaN or a huge number, the smallest or -0."""


def _any_format(supports: Supports) -> str:
    return "" if supports.cache_formats else "supports no format of quantised caches"


def _latent_format(supports: Supports) -> str:
    return "" if latent_formats(supports) else "supports no format of a latent cache"


def _scaled_format(supports: Supports) -> str:
    return "" if stores_scales(supports) else "supports no format that stores scales"


def _stored(pages: Bytes, case: QuantiseCase, tensor_scale: float) -> QuantisedRows:
    """What pages hold of the case's tokens, each part [n, ...]."""
    stored = unpack(pages, case.layout, case.page_size, tensor_scale=tensor_scale)
    slots = len(pages) * case.page_size
    parts = (stored.codes, stored.scales, stored.plain)
    return QuantisedRows(*(x.reshape(slots, x.shape[-1])[: case.tokens] for x in parts))


def _quantised(run: Run, case: QuantiseCase) -> tuple[Array, QuantisedRows]:
    """The case's rows, and what the subject stored of them."""
    inputs = case.build()
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    return inputs.rows, _stored(driver.quantize_cache(inputs.rows), case, inputs.tensor_scale)


@law(needs=QUANTISE, cases=quantise_cases, missing=_any_format)
def test_quantised_pages_have_the_bytes_of_the_layout(run: Run, case: QuantiseCase) -> None:
    """As many pages as hold the tokens, each of exactly the bytes that the layout has with its alignment."""
    inputs = case.build()
    QuantisedDriver(run.driver, case, inputs.tensor_scale).quantize_cache(inputs.rows)


@law(needs=QUANTISE, cases=narrowed(quantise_cases, scaled=True), missing=_scaled_format)
def test_scales_are_within_limits(run: Run, case: QuantiseCase) -> None:
    """A scale is neither so small that its group saturates, nor so large that codes lose a bit; never NaN."""
    rows, stored = _quantised(run, case)
    low, high = scale_limits(rows, case.layout)
    outside = np.argwhere(~((low <= stored.scales) & (stored.scales <= high)))
    if len(outside):
        at = tuple(int(i) for i in outside[0])
        run.require(
            False,
            f"the scale of token {at[0]}, group {at[1]} is {float(stored.scales[at])!r}, want between "
            f"{float(low[at])!r} and {float(high[at])!r}; {len(outside)} of {low.size} scales are outside",
        )


@law(needs=QUANTISE, cases=quantise_cases, missing=_any_format)
def test_codes_are_the_nearest(run: Run, case: QuantiseCase) -> None:
    """With the stored scales every element is the nearest one, saturated, never NaN; plain ones are rounded once."""
    _require_nearest(run, *_quantised(run, case), case)


def _require_nearest(run: Run, rows: Array, stored: QuantisedRows, case: QuantiseCase) -> None:
    """Raise Violation unless the stored rows are as near to ``rows`` as their scales allow."""
    got = computed(dequantise(stored, case.layout), "stored rows")
    run.within(got, rows, quantised_error(rows, stored.scales, case.layout), gate=False)


@law(needs=QUANTISE, cases=narrowed(quantise_cases, regimes=("zeros",)), missing=_any_format)
def test_groups_of_zeros_stay_zero(run: Run, case: QuantiseCase) -> None:
    """A group of zeros is read as zeros: its scale is a number, and its codes are 0."""
    rows, stored = _quantised(run, case)
    with np.errstate(invalid="ignore"):
        values = dequantise(stored, case.layout)
    wrong = (rows == 0) & ~(values == 0)
    run.require(not wrong.any(), f"{int(wrong.sum())} of {int((rows == 0).sum())} zeros are not stored as 0")


@law(needs=QUANTISE, cases=narrowed(quantise_cases, latent=True, regimes=("typical", "zeros")), missing=_latent_format)
def test_latent_codes_do_not_depend_on_k_pe(run: Run, case: QuantiseCase) -> None:
    """A k_pe 2^12 times as large, or 2^-12 times, changes no code and no scale of the latent."""
    inputs = case.build()
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    stored = []
    for factor in (1.0, 2.0**12, 2.0**-12):
        rows = inputs.rows.copy()
        rows[:, -ROPE_DIM:] *= factor
        pages = driver.quantize_cache(round_to(rows, case.dtype, overflow="saturate"))
        stored.append(_latent_groups(_stored(pages, case, inputs.tensor_scale), case.layout))
        changed = int((stored[-1] != stored[0]).sum())
        run.require(changed == 0, f"k_pe times {factor:g} changed {changed} codes and scales of the latent's groups")


def _latent_groups(stored: QuantisedRows, layout: CacheLayout) -> Array:
    """Codes of the latent, and scales of the groups that hold nothing else; [n, count]."""
    latent = layout.width - ROPE_DIM
    return np.concatenate([stored.codes[:, :latent], stored.scales[:, : latent // layout.group]], axis=-1)


@law(needs=QUANTISE, cases=quantise_cases, missing=_any_format)
def test_quantize_cache_reads_strides(run: Run, case: QuantiseCase) -> None:
    """Rows that are slices of wider ones are quantised as any others, and not modified."""
    inputs = case.build()
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    tensor = run.driver.tensor(np.concatenate([inputs.rows, -inputs.rows], axis=-1))
    before = tensor_bits(tensor)
    pages = driver.quantize_cache(inputs.rows, tensor[:, : case.layout.width])
    run.require(np.array_equal(tensor_bits(tensor), before), "quantize_cache changed its argument rows")
    _require_nearest(run, inputs.rows, _stored(pages, case, inputs.tensor_scale), case)


def _read(run: Run, case: PagesCase, inputs: PagesInputs, pages: Bytes, tensor: torch.Tensor | None = None) -> Result:
    """What the subject reads of the case's tokens, [n, width]."""
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    return driver.dequantize_cache(pages, tensor)[: case.tokens]


@law(needs=DEQUANTISE, cases=pages_cases, missing=_any_format)
def test_dequantised_rows_are_code_times_scale(run: Run, case: PagesCase) -> None:
    """Pages that the reference made are read as code times scale, rounded to the dtype; exactly where it holds them."""
    inputs = case.build()
    got = _read(run, case, inputs, inputs.pages)
    run.within(got, inputs.rows, dequantised_error(inputs.rows, run.profile), gate=False)


@law(needs=DEQUANTISE, cases=pages_cases, missing=_any_format)
def test_dequantising_ignores_unused_bytes(run: Run, case: PagesCase) -> None:
    """Padding and rows without a token may hold anything."""
    inputs = case.build()
    want = _read(run, case, inputs, inputs.pages)
    used = used_bytes(case.layout, case.page_size, case.tokens)
    for poison in POISON:
        got = _read(run, case, inputs, np.where(used, inputs.pages, np.uint8(poison)))
        run.same_bits(got, want, f"unused bytes were set to {poison:#04x}")


@law(needs=DEQUANTISE, cases=pages_cases, missing=_any_format)
def test_dequantize_cache_reads_strides(run: Run, case: PagesCase) -> None:
    """Pages that lie further apart are read by their stride, and are not modified."""
    inputs = case.build()
    # The pages between belong to another layer.
    pool = np.stack([np.roll(inputs.pages, 1), inputs.pages], axis=1).reshape(-1, inputs.pages.shape[1])
    tensor = torch.from_numpy(pool).to(run.driver.device)
    before = tensor.clone()
    got = _read(run, case, inputs, inputs.pages, tensor[1::2])
    run.within(got, inputs.rows, dequantised_error(inputs.rows, run.profile), gate=False)
    run.require(torch.equal(tensor, before), "dequantize_cache changed its argument pages")


@law(needs=DEQUANTISE, cases=pages_cases, missing=_any_format)
def test_dequantising_calls_are_independent(run: Run, case: PagesCase) -> None:
    """Nothing of a call (scales, pages) lives on in the next one with the same shapes."""
    for this in (case, replace(case, seed=case.seed + 1), case):
        inputs = this.build()
        got = _read(run, this, inputs, inputs.pages)
        run.within(got, inputs.rows, dequantised_error(inputs.rows, run.profile), gate=False)
