"""Laws of quantised caches: ``quantize_cache`` and ``dequantize_cache``, apart and by bytes that the other did not make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import scale_limits
from mla_spec.judging.law import Run, law
from mla_spec.operations.quantised_cache import (
    DEQUANTIZE_CACHE,
    QUANTIZE_CACHE,
    ROPE_DIM,
    PagesCase,
    PagesInputs,
    QuantiseCase,
    QuantiseInputs,
    no_format,
    stored_rows,
)
from mla_spec.operations.quantised_decode import no_latent_format
from mla_spec.properties.fixed import dequantize_cache, quantize_cache
from mla_spec.properties.fixed.counts import nearest
from mla_spec.properties.repeated import judge_repeated
from mla_spec.properties.strategies.quantised_cache import (
    pages_cases,
    quantise_cases,
    stores_scales,
)
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.cache_layout import CacheLayout, QuantisedRows, layout_of, used_bytes
from mla_spec.reference.formats import round_to
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports

POISON = (0xFF, 0x7F, 0x80)
"""Bytes: NaN in every format of codes and scales, NaN or a huge number, the smallest or -0."""

MANY_TOKENS = 65_600
"""More than the 65535 blocks that a grid has along its second and third axes."""


def _stored(run: Run, inputs: QuantiseInputs) -> QuantisedRows:
    """What the subject stored of the inputs' rows."""
    return stored_rows(inputs, run.call(QUANTIZE_CACHE, inputs).pages.bits.astype(np.uint8))


def _scaled_format(supports: Supports) -> str:
    return "" if stores_scales(supports) else "supports no format that stores scales"


def _many_scales(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """The cases of many tokens whose formats store scales."""
    return [case for case in quantize_cache.crossed(supports, profile) if case.layout.scale]


@law(needs=QUANTIZE_CACHE, cases=quantise_cases, missing=no_format)
def test_quantised_pages_have_the_bytes_of_the_layout(run: Run, case: QuantiseCase) -> None:
    """As many pages as hold the tokens, each of exactly the bytes that the layout has with its alignment."""
    run.call(QUANTIZE_CACHE, case.build())  # the engine holds the shape against the layout


@law(needs=QUANTIZE_CACHE, cases=narrowed(quantise_cases, scaled=True), missing=_scaled_format, first=_many_scales)
def test_scales_are_within_limits(run: Run, case: QuantiseCase) -> None:
    """A scale is neither so small that its group saturates, nor so large that codes lose a bit; never NaN."""
    inputs = case.build()
    rows, stored = inputs.rows, _stored(run, inputs)
    low, high = scale_limits(rows, case.layout)
    outside = np.argwhere(~((low <= stored.scales) & (stored.scales <= high)))
    if len(outside):
        at = tuple(int(i) for i in outside[0])
        run.require(
            False,
            f"the scale of token {at[0]}, group {at[1]} is {float(stored.scales[at])!r}, want between "
            f"{float(low[at])!r} and {float(high[at])!r}; {len(outside)} of {low.size} scales are outside",
        )


@law(needs=QUANTIZE_CACHE, cases=quantise_cases, missing=no_format, first=quantize_cache.crossed)
def test_codes_are_the_nearest(run: Run, case: QuantiseCase) -> None:
    """With the stored scales every element is the nearest one, saturated, never NaN; plain ones are rounded once."""
    inputs = case.build()
    run.agrees(QUANTIZE_CACHE, inputs, run.call(QUANTIZE_CACHE, inputs))


@law(needs=QUANTIZE_CACHE, cases=narrowed(quantise_cases, regimes=("zeros",)), missing=no_format)
def test_groups_of_zeros_stay_zero(run: Run, case: QuantiseCase) -> None:
    """A group of zeros is read as zeros: its scale is a number, and its codes are 0."""
    inputs = case.build()
    rows, stored = inputs.rows, _stored(run, inputs)
    with np.errstate(invalid="ignore"):
        values = dequantise(stored, case.layout)
    wrong = (rows == 0) & ~(values == 0)
    run.require(not wrong.any(), f"{int(wrong.sum())} of {int((rows == 0).sum())} zeros are not stored as 0")


@law(
    needs=QUANTIZE_CACHE,
    cases=narrowed(quantise_cases, latent=True, regimes=("typical", "zeros")),
    missing=no_latent_format,
)
def test_latent_codes_do_not_depend_on_k_pe(run: Run, case: QuantiseCase) -> None:
    """A k_pe 2^12 times as large, or 2^-12 times, changes no code and no scale of the latent."""
    inputs = case.build()
    stored = []
    for factor in (1.0, 2.0**12, 2.0**-12):
        rows = inputs.rows.copy()
        rows[:, -ROPE_DIM:] *= factor
        scaled = replace(inputs, rows=round_to(rows, case.dtype, overflow="saturate"))
        stored.append(_latent_groups(_stored(run, scaled), case.layout))
        changed = int((stored[-1] != stored[0]).sum())
        run.require(changed == 0, f"k_pe times {factor:g} changed {changed} codes and scales of the latent's groups")


def _latent_groups(stored: QuantisedRows, layout: CacheLayout) -> Array:
    """Codes of the latent, and scales of the groups that hold nothing else; [n, count]."""
    latent = layout.width - ROPE_DIM
    return np.concatenate([stored.codes[:, :latent], stored.scales[:, : latent // layout.group]], axis=-1)


def _held(run: Run, inputs: PagesInputs) -> Result:
    """What the subject reads of the rows that hold a token, [n, width]."""
    rows: Result = run.call(DEQUANTIZE_CACHE, inputs).rows
    return rows.arranged(lambda x: x.reshape(-1, x.shape[-1])[: len(inputs.rows)])


@law(needs=DEQUANTIZE_CACHE, cases=pages_cases, missing=no_format, first=dequantize_cache.crossed)
def test_dequantised_rows_are_code_times_scale(run: Run, case: PagesCase) -> None:
    """Pages that the reference made are read as code times scale, rounded to the dtype; exactly where it holds them."""
    inputs = case.build()
    run.agrees(DEQUANTIZE_CACHE, inputs, run.call(DEQUANTIZE_CACHE, inputs))


@law(needs=DEQUANTIZE_CACHE, cases=pages_cases, missing=no_format)
def test_dequantising_ignores_unused_bytes(run: Run, case: PagesCase) -> None:
    """Padding and rows without a token may hold anything."""
    inputs = case.build()
    want = _held(run, inputs)
    used = used_bytes(case.layout, case.page_size, case.tokens)
    for poison in POISON:
        got = _held(run, replace(inputs, pages=np.where(used, inputs.pages, np.uint8(poison))))
        run.same_bits(got, want, f"unused bytes were set to {poison:#04x}")


def _full_pages(supports: Supports) -> dict[str, Any]:
    """Of the narrowest format pages without unused rows, as small as may be, and so many that none comes again after 2^16."""
    name = min(supports.cache_formats, key=lambda name: layout_of(name).width)
    size: int = nearest(supports.page_sizes, 1)
    return {"format": name, "page_size": size, "tokens": 7 * size}


@law(
    needs=QUANTIZE_CACHE,
    cases=lambda supports, profile: [QuantiseCase(dtype=profile.dtype, **_full_pages(supports))],
    missing=no_format,
    live="tensors",
)
def test_many_tokens_are_quantised_as_few(run: Run, case: QuantiseCase) -> None:
    """The tokens of a few pages, repeated until there are more than 65535, are stored as well every time."""
    judge_repeated(run, QUANTIZE_CACHE, case.build(), "rows", -(-MANY_TOKENS // case.tokens))


@law(
    needs=DEQUANTIZE_CACHE,
    cases=lambda supports, profile: [PagesCase(dtype=profile.dtype, **_full_pages(supports))],
    missing=no_format,
    live="tensors",
)
def test_many_pages_are_dequantised_as_few(run: Run, case: PagesCase) -> None:
    """A few pages, repeated until there are more than 65535 tokens, are read as the same rows every time."""
    judge_repeated(run, DEQUANTIZE_CACHE, case.build(), "pages", -(-MANY_TOKENS // case.tokens))
