"""Laws of ``decode_quantized``: attention over the pages of a quantised latent cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.quantised_decode import OPERATION as DECODE
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, QuantisedDecodeInputs, no_latent_format
from mla_spec.properties.fixed import decode_quantized
from mla_spec.properties.pages import other_unused_entries, spare_page
from mla_spec.properties.strategies.quantised_cache import quantised_decode_cases
from mla_spec.reference.cache_layout import used_bytes
from mla_spec.reference.typing import BoolArray

POISON = (0xFF, 0x7F, 0x80)
"""Bytes: NaN in every format of codes and scales, NaN or a huge number, the smallest or -0."""


def _used(case: QuantisedDecodeCase, inputs: QuantisedDecodeInputs) -> BoolArray:
    """Which bytes of the pool hold a token, [pages, bytes per page]."""
    used = np.zeros(inputs.pages.shape, dtype=bool)
    for table, length in zip(inputs.exact.block_table, case.seqlens, strict=True):
        mask = used_bytes(case.layout, case.page_size, length)
        used[table[: len(mask)]] = mask
    return used


@law(needs=DECODE, cases=quantised_decode_cases, missing=no_latent_format)
def test_quantised_decode_agrees_with_reference(run: Run, case: QuantisedDecodeCase) -> None:
    """out and LSE are those of the exact dequantised rows, within the bound of the profile."""
    inputs = case.build()
    run.agrees(DECODE, inputs, run.call(DECODE, inputs))


@law(needs=DECODE, cases=quantised_decode_cases, missing=no_latent_format, cost=2)
def test_quantised_decode_ignores_unused_bytes(run: Run, case: QuantisedDecodeCase) -> None:
    """Padding, rows past a sequence's length and free pages may hold anything; no bit changes."""
    inputs = case.build()
    used = _used(case, inputs)
    want = run.call(DECODE, inputs)
    for poison in POISON:
        got = run.call(DECODE, replace(inputs, pages=np.where(used, inputs.pages, np.uint8(poison))))
        run.same(got, want, f"unused bytes of pages were set to {poison:#04x}")


@law(needs=DECODE, cases=quantised_decode_cases, missing=no_latent_format)
def test_quantised_decode_ignores_unused_table_entries(run: Run, case: QuantisedDecodeCase) -> None:
    """Table entries past a sequence's pages may name a page of NaN, or no page at all."""
    inputs = case.build()
    want = run.call(DECODE, inputs)
    pages = inputs.pages.copy()
    pages[spare_page(inputs.exact)] = POISON[0]
    for entry, table in other_unused_entries(inputs.exact):
        exact = replace(inputs.exact, block_table=table)
        got = run.call(DECODE, replace(inputs, pages=pages, exact=exact))
        run.same(got, want, f"unused block table entries were set to {entry}")


@law(needs=DECODE, cases=quantised_decode_cases, missing=no_latent_format, cost=2, first=decode_quantized.ordinary)
def test_quantised_page_relabelling_changes_nothing(run: Run, case: QuantisedDecodeCase) -> None:
    """Moving pages in the pool and renaming them in the table changes no bit."""
    inputs = case.build()
    name = np.random.default_rng([case.seed, 2]).permutation(len(inputs.pages))  # page p becomes name[p]
    used = inputs.block_table[:, :1][inputs.cache_seqlens > 0]
    if (name[used] == used).all():
        run.trivial("the first page of every sequence stays where it is")
    pages = np.empty_like(inputs.pages)
    pages[name] = inputs.pages
    exact = replace(inputs.exact, block_table=name[inputs.exact.block_table].astype(np.int32))
    why = "pages were stored in another order and the block table renamed accordingly"
    run.same(run.call(DECODE, replace(inputs, pages=pages, exact=exact)), run.call(DECODE, inputs), why)
