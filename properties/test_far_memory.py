"""Laws of caches and keys whose offsets exceed 2^31 elements, or whose numbers exceed 16 bits: they are read as any others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.all import (
    DecodeCase,
    DecodeInputs,
    PagesCase,
    PrefillCase,
    QuantisedDecodeCase,
    SparseDecodeCase,
    SparsePrefillCase,
)
from mla_spec.operations.quantised_driver import QuantisedDriver
from mla_spec.properties import sparse_checks as check
from mla_spec.properties.expected import (
    decode_expected,
    dequantised_error,
    judge_attention,
    prefill_expected,
    quantised_decode_expected,
)
from mla_spec.properties.far import far_apart
from mla_spec.properties.strategies.quantised_cache import latent_formats, pages_cases, quantised_decode_cases
from mla_spec.properties.strategies.sizes import decode_cases, narrowed, prefill_cases
from mla_spec.properties.strategies.sparse import sparse_decode_cases, sparse_prefill_cases
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

PAGES = 3
"""Of a pool whose last one lies beyond 2^31 elements."""

MANY_ROWS = 2**16 + 70
"""Rows or slots, of which sparse attention selects a few."""


def _any_format(supports: Supports) -> str:
    return "" if supports.cache_formats else "supports no format"


def _latent_format(supports: Supports) -> str:
    return "" if latent_formats(supports) else "supports no format of a latent cache"


def _in_three_pages(inputs: DecodeInputs) -> tuple[DecodeInputs, IntArray]:
    """Sequences that share three pages, of which the last comes first, and which pages of the pool they were."""
    page_size, (b, s) = inputs.kv_cache.shape[1], inputs.q.shape[:2]
    longest = int(inputs.cache_seqlens.argmax())
    used = max(1, -(-int(inputs.cache_seqlens[longest]) // page_size))
    pages = np.resize(inputs.block_table[longest, :used], PAGES)
    table = np.tile(np.array([2, 0, 1], dtype=np.int32), (b, 1))
    lengths = np.minimum(inputs.cache_seqlens, PAGES * page_size)
    kept = min(s, PAGES)  # no more queries than there are keys for each, where there were
    moved = replace(
        inputs, q=inputs.q[:, :kept], kv_cache=inputs.kv_cache[pages], block_table=table, cache_seqlens=lengths
    )
    return moved, pages


@law(needs=("decode",), cases=narrowed(decode_cases, sizes=()), cost=3)
def test_decode_reaches_beyond_2_31_elements(run: Run, case: DecodeCase) -> None:
    """Pages so far apart that offsets exceed 2^31 elements are read as any other."""
    inputs, _ = _in_three_pages(case.build())
    tensors = run.driver.decode_tensors(inputs)
    tensors["kv_cache"] = far_apart(tensors["kv_cache"])
    judge_attention(run, run.driver.decode(inputs, tensors), decode_expected(inputs, run.profile))


@law(needs=("prefill",), cases=narrowed(prefill_cases, sizes=()), cost=3)
def test_prefill_reaches_beyond_2_31_elements(run: Run, case: PrefillCase) -> None:
    """Queries, keys and values of which the third is more than 2^31 elements after the first are read as any others."""
    inputs = replace(case, seqlens_q=(3,), seqlens_k=(3,)).build()
    tensors, want = run.driver.prefill_tensors(inputs), prefill_expected(inputs, run.profile)
    for name in "qkv":
        try:
            judge_attention(run, run.driver.prefill(inputs, tensors | {name: far_apart(tensors[name])}), want)
        except Violation as violation:
            raise Violation(f"with distant tokens of {name}:\n{violation}") from None


@law(needs=("sparse_decode",), cases=sparse_decode_cases, cost=3)
def test_sparse_decode_reaches_beyond_2_31_elements(run: Run, case: SparseDecodeCase) -> None:
    """Slots of pages so far apart that offsets exceed 2^31 elements are read as any other."""
    inputs = replace(case, pages=PAGES).build()
    driver = check.driver_of(run, case)
    tensors = driver.tensors(inputs)
    tensors["kv"] = far_apart(tensors["kv"])
    check.judge(run, driver.call(inputs, tensors), check.expected(inputs, run.profile))


def _narrow(supports: Supports, case: SparseDecodeCase | SparsePrefillCase) -> dict[str, Any]:
    """Widths of rows of which there are many, where the subject leaves the choice."""
    if supports.latent_dims is not None:
        return {}
    return {"kv_lora_rank": min(case.kv_lora_rank, 8), "qk_rope_head_dim": min(case.qk_rope_head_dim, 4)}


@law(needs=("sparse_prefill",), cases=sparse_prefill_cases, cost=10)
def test_sparse_prefill_of_many_rows(run: Run, case: SparsePrefillCase) -> None:
    """Rows whose numbers do not fit 16 bits are selected as any others."""
    check.agrees(run, replace(case, s_kv=MANY_ROWS, **_narrow(run.supports, case)))


@law(needs=("sparse_decode",), cases=sparse_decode_cases, cost=10)
def test_sparse_decode_of_many_slots(run: Run, case: SparseDecodeCase) -> None:
    """Slots whose numbers do not fit 16 bits are selected as any others."""
    pages = -(-MANY_ROWS // case.page_size)
    check.agrees(run, replace(case, pages=pages, **_narrow(run.supports, case)))


@law(needs=("dequantize_cache",), cases=pages_cases, missing=_any_format, cost=3)
def test_dequantize_cache_reaches_beyond_2_31_bytes(run: Run, case: PagesCase) -> None:
    """Pages so far apart that offsets exceed 2^31 bytes are read as any other."""
    case = replace(case, tokens=2 * case.page_size + 1)
    inputs = case.build()
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    got = driver.dequantize_cache(inputs.pages, far_apart(driver.pages(inputs.pages)))
    run.within(got[: case.tokens], inputs.rows, dequantised_error(inputs.rows, run.profile), gate=False)


@law(needs=("decode_quantized",), cases=quantised_decode_cases, missing=_latent_format, cost=6)
def test_quantised_decode_reaches_beyond_2_31_bytes(run: Run, case: QuantisedDecodeCase) -> None:
    """Pages so far apart that offsets exceed 2^31 bytes are read as any other."""
    inputs = case.build()
    exact, pages = _in_three_pages(inputs.exact)
    inputs = replace(inputs, pages=inputs.pages[pages], exact=exact)
    driver = QuantisedDriver(run.driver, case, inputs.tensor_scale)
    tensors = driver.decode_tensors(inputs)
    tensors["kv_cache"] = far_apart(tensors["kv_cache"])
    judge_attention(run, driver.decode(inputs, tensors), quantised_decode_expected(inputs, run.profile))
