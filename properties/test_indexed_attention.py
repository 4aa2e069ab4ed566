"""Laws of ``indexer`` and ``sparse_prefill`` together: attention over the keys that the subject's own indexer selects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.indexer import OPERATION as INDEXER
from mla_spec.operations.indexer import IndexedAttentionCase, IndexerInputs
from mla_spec.operations.prefill import PrefillInputs, prefill_expected
from mla_spec.operations.sparse import SPARSE_PREFILL, SparseInputs, sparse_expected
from mla_spec.properties.strategies.indexer import indexed_attention_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.driver import Results
from mla_spec.subjects.supports import Supports

BOTH = (INDEXER, SPARSE_PREFILL)
MOST_KEYS = 206
"""Of a sequence that ``indexer_cases`` draw."""


def _needs_common_width(supports: Supports) -> str:
    widths = supports.indexer_top_k
    common = widths is None or any(k % supports.topk_multiple == 0 for k in widths)
    return "" if common else "no top_k of indexer is a number of indices that sparse_prefill takes"


def _attend(run: Run, case: IndexedAttentionCase) -> tuple[IndexerInputs, SparseInputs, Results]:
    """Sparse attention over the very tensor of indices that the indexer returned, and what it said before."""
    indexing = case.build()
    indices = run.driver.raw(INDEXER, indexing, run.driver.tensors(INDEXER, indexing))[1]
    shape = (len(indexing.q), case.top_k)
    said = run.driver.result(indices, "indices", shape, (torch.int32, torch.int64)).bits
    inputs = case.attention_inputs(said)
    selected = indices.to(torch.int32)[:, None]  # the same memory where they are int32
    tensors = run.driver.tensors(SPARSE_PREFILL, inputs) | {"indices": selected}
    return indexing, inputs, run.call(SPARSE_PREFILL, inputs, tensors)


@law(needs=BOTH, cases=indexed_attention_cases, missing=_needs_common_width)
def test_sparse_prefill_attends_to_what_the_indexer_selected(run: Run, case: IndexedAttentionCase) -> None:
    """Attention over the indices that the indexer returns, as it returns them, is attention over the keys they name."""
    _, inputs, got = _attend(run, case)
    run.agrees(SPARSE_PREFILL, inputs, got)


def _needs_wide_selection(supports: Supports) -> str:
    unit, widths = supports.topk_multiple, supports.indexer_top_k
    enough = widths is None or any(k >= MOST_KEYS and k % unit == 0 for k in widths)
    return "" if enough else f"indexer cannot select {MOST_KEYS} keys in a number of indices that sparse_prefill takes"


@law(needs=BOTH, cases=narrowed(indexed_attention_cases, select_all=True), missing=_needs_wide_selection)
def test_selecting_every_key_is_causal_attention(run: Run, case: IndexedAttentionCase) -> None:
    """With top_k not below the number of keys, indexer and sparse_prefill together are causal attention."""
    indexing, inputs, got = _attend(run, case)
    dense = PrefillInputs(
        q=inputs.q,
        k=np.repeat(inputs.kv, case.attention_heads, axis=1),
        v=np.repeat(inputs.kv[..., : case.kv_lora_rank], case.attention_heads, axis=1),
        cu_seqlens_q=indexing.cu_seqlens_q,
        cu_seqlens_k=indexing.cu_seqlens_k,
        softmax_scale=inputs.softmax_scale,
        causal=True,
    )
    exact = prefill_expected(dense, Profile.default("float64"))
    every = sparse_expected(replace(inputs, indices=_every_key(indexing, case.top_k)), run.profile)
    want = replace(
        every,
        out=exact.out,
        out_error=every.out_error.plus("dense attention in float64", exact.out_error.total),
        lse=exact.lse.T,
        lse_error=every.lse_error.plus("dense attention in float64", exact.lse_error.total.T),
    )
    for part, each in zip(got, want.outputs(run.supports).values(), strict=True):
        if part is not None:
            each.judge(run, part)


def _every_key(indexing: IndexerInputs, top_k: int) -> IntArray:
    """The keys that each query sees, [tokens, 1, top_k]."""
    key = indexing.first_key[:, None] + np.arange(top_k)
    every: IntArray = np.where(key < indexing.end_key[:, None], key, -1)[:, None].astype(np.int32)
    return every
