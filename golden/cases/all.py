"""All cases of the corpus."""

from __future__ import annotations

from mla_spec.golden.cases.cache import cache_cases
from mla_spec.golden.cases.case import Case
from mla_spec.golden.cases.decode import decode_cases, kernel_cases, option_cases
from mla_spec.golden.cases.gradient import gradient_cases
from mla_spec.golden.cases.indexer import indexer_cases, partial_rope_cases
from mla_spec.golden.cases.layer import gated_cases, layer_cases, small_cases, variant_cases
from mla_spec.golden.cases.number import number_cases
from mla_spec.golden.cases.prefill import kernel_prefill_cases, merge_cases, option_prefill_cases, prefill_cases
from mla_spec.golden.cases.ragged import ragged_cases, rank_cases
from mla_spec.golden.cases.rope import longrope_cases, rope_cases
from mla_spec.golden.cases.sparse import sparse_cases
from mla_spec.golden.cases.weight import weight_cases


def cases() -> list[Case]:
    """All cases, in the order of the manifest."""
    return [
        *rope_cases(),
        *longrope_cases(),
        *partial_rope_cases(),
        *small_cases(),
        *layer_cases(),
        *variant_cases(),
        *gated_cases(),
        *prefill_cases(),
        *kernel_prefill_cases(),
        *option_prefill_cases(),
        *decode_cases(),
        *kernel_cases(),
        *option_cases(),
        *ragged_cases(),
        *rank_cases(),
        *merge_cases(),
        *sparse_cases(),
        *indexer_cases(),
        *gradient_cases(),
        *number_cases(),
        *cache_cases(),
        *weight_cases(),
    ]
