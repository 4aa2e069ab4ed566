"""The strategy of every operation."""

from __future__ import annotations

from mla_spec.judging.law import CaseSource
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.dequantize_weight import weight_cases
from mla_spec.properties.strategies.indexer import indexer_cases
from mla_spec.properties.strategies.merge import merge_cases
from mla_spec.properties.strategies.prefill import prefill_cases
from mla_spec.properties.strategies.project_indexer import project_indexer_cases
from mla_spec.properties.strategies.quantised_cache import pages_cases, quantise_cases, quantised_decode_cases
from mla_spec.properties.strategies.ragged import ragged_decode_cases
from mla_spec.properties.strategies.rank_decode import rank_decode_cases
from mla_spec.properties.strategies.rope import rope_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.properties.strategies.sparse import sparse_decode_cases, sparse_prefill_cases
from mla_spec.properties.strategies.write_cache import write_cases

STRATEGIES: dict[str, CaseSource] = {
    "rope": rope_cases,
    "absorb": decode_cases,
    "dequantize_weight": weight_cases,
    "prefill": prefill_cases,
    "decode": narrowed(decode_cases, shared=True),
    "ragged_decode": ragged_decode_cases,
    "rank_decode": rank_decode_cases,
    "merge": merge_cases,
    "write_cache": write_cases,
    "quantize_cache": quantise_cases,
    "dequantize_cache": pages_cases,
    "decode_quantized": quantised_decode_cases,
    "sparse_prefill": sparse_prefill_cases,
    "sparse_decode": sparse_decode_cases,
    "project_indexer": project_indexer_cases,
    "indexer": indexer_cases,
}
"""By the operation's name, what draws its cases."""
