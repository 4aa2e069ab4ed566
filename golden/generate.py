"""All cases of the corpus."""

from __future__ import annotations

from mla_spec.golden.cache_cases import cache_cases
from mla_spec.golden.case import Case
from mla_spec.golden.decode_cases import decode_cases
from mla_spec.golden.gradient_cases import gradient_cases
from mla_spec.golden.indexer_cases import indexer_cases, partial_rope_cases
from mla_spec.golden.layer_cases import layer_cases, small_cases
from mla_spec.golden.number_cases import number_cases
from mla_spec.golden.prefill_cases import merge_cases, prefill_cases
from mla_spec.golden.rope_cases import rope_cases
from mla_spec.golden.sparse_cases import sparse_cases
from mla_spec.golden.weight_cases import weight_cases


def cases() -> list[Case]:
    """All cases, in the order of the manifest."""
    return [
        *rope_cases(),
        *partial_rope_cases(),
        *small_cases(),
        *layer_cases(),
        *prefill_cases(),
        *decode_cases(),
        *merge_cases(),
        *sparse_cases(),
        *indexer_cases(),
        *gradient_cases(),
        *number_cases(),
        *cache_cases(),
        *weight_cases(),
    ]
