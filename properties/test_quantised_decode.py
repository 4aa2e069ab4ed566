"""Laws of ``decode_quantized``: attention over the pages of a quantised latent cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.all import QuantisedDecodeCase
from mla_spec.operations.quantised_cache import QuantisedDecodeInputs
from mla_spec.operations.quantised_driver import QuantisedDriver
from mla_spec.properties.expected import judge_attention, quantised_decode_expected
from mla_spec.properties.memory import require_unmodified
from mla_spec.properties.strategies.quantised_cache import latent_formats, quantised_decode_cases
from mla_spec.reference.cache_layout import used_bytes
from mla_spec.reference.typing import BoolArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import QUANTISED_VIEWS
from mla_spec.subjects.violation import Violation

DECODE = ("decode_quantized",)
POISON = (0xFF, 0x7F, 0x80)
"""Bytes: NaN in every format of codes and scales, NaN or a huge number, the smallest or -0."""


def _latent_format(supports: Supports) -> str:
    return "" if latent_formats(supports) else "supports no format of a latent cache"


def _driver(run: Run, case: QuantisedDecodeCase, inputs: QuantisedDecodeInputs) -> QuantisedDriver:
    return QuantisedDriver(run.driver, case, inputs.tensor_scale)


def _used(case: QuantisedDecodeCase, inputs: QuantisedDecodeInputs) -> BoolArray:
    """Which bytes of the pool hold a token, [pages, bytes per page]."""
    used = np.zeros(inputs.pages.shape, dtype=bool)
    for table, length in zip(inputs.exact.block_table, case.seqlens, strict=True):
        mask = used_bytes(case.layout, case.page_size, length)
        used[table[: len(mask)]] = mask
    return used


def _same_bits(run: Run, got: tuple[Result, Result | None], want: tuple[Result, Result | None], why: str) -> None:
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            run.same_bits(a, b, why)


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format)
def test_quantised_decode_agrees_with_reference(run: Run, case: QuantisedDecodeCase) -> None:
    """Out and LSE are those of the exact dequantised rows, within the bound of the profile."""
    inputs = case.build()
    judge_attention(run, _driver(run, case, inputs).decode(inputs), quantised_decode_expected(inputs, run.profile))


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format, cost=2)
def test_quantised_decode_ignores_unused_bytes(run: Run, case: QuantisedDecodeCase) -> None:
    """Padding, rows past a sequence's length and free pages may hold anything; no bit changes."""
    inputs = case.build()
    driver, used = _driver(run, case, inputs), _used(case, inputs)
    want = driver.decode(inputs)
    for poison in POISON:
        got = driver.decode(replace(inputs, pages=np.where(used, inputs.pages, np.uint8(poison))))
        _same_bits(run, got, want, f"unused bytes of pages were set to {poison:#04x}")


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format, cost=2)
def test_quantised_page_relabelling_changes_nothing(run: Run, case: QuantisedDecodeCase) -> None:
    """Moving pages in the pool and renaming them in the table changes no bit."""
    inputs = case.build()
    driver = _driver(run, case, inputs)
    name = np.random.default_rng([case.seed, 2]).permutation(len(inputs.pages))  # page p becomes name[p]
    pages = np.empty_like(inputs.pages)
    pages[name] = inputs.pages
    exact = replace(inputs.exact, block_table=name[inputs.exact.block_table].astype(np.int32))
    why = "pages were stored in another order and the block table renamed accordingly"
    _same_bits(run, driver.decode(replace(inputs, pages=pages, exact=exact)), driver.decode(inputs), why)


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format, cost=3)
def test_quantised_decode_reads_strides(run: Run, case: QuantisedDecodeCase) -> None:
    """Pages and arguments that are views of larger tensors are read by their strides."""
    inputs = case.build()
    driver, want = _driver(run, case, inputs), quantised_decode_expected(inputs, run.profile)
    for name, view in QUANTISED_VIEWS.items():
        try:
            judge_attention(run, driver.decode(inputs, view(driver.decode_tensors(inputs))), want)
        except Violation as violation:
            raise Violation(f"with {name}:\n{violation}") from None


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format, cost=2)
def test_quantised_decode_does_not_modify_its_inputs(run: Run, case: QuantisedDecodeCase) -> None:
    """No argument has changed when decode_quantized returns."""
    inputs = case.build()
    driver = _driver(run, case, inputs)
    tensors = driver.decode_tensors(inputs)
    require_unmodified(run, "decode_quantized", tensors, lambda: driver.decode(inputs, tensors))


@law(needs=DECODE, cases=quantised_decode_cases, missing=_latent_format, cost=4)
def test_quantised_decode_calls_are_independent(run: Run, case: QuantisedDecodeCase) -> None:
    """Nothing of a call (pages, scales, tables) lives on in the next one with the same shapes."""
    for this in (case, replace(case, seed=case.seed + 1), case):
        inputs = this.build()
        got = _driver(run, this, inputs).decode(inputs)
        judge_attention(run, got, quantised_decode_expected(inputs, run.profile))
