"""The cases of every operation: what draws them, and the fixed ones that laws begin with, whatever number of examples is asked for.

What Hypothesis draws first is the simplest case, in which little can go wrong, and random cases meet the numbers of production
too seldom. Width and number can be tested apart: rows of fixed cases are narrow where the subject leaves the choice, and where
it declares wide rows, sequences share pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import CaseSource
from mla_spec.properties.fixed import (
    absorb,
    decode,
    decode_quantized,
    dequantize_cache,
    dequantize_weight,
    indexer,
    merge,
    prefill,
    project_indexer,
    quantize_cache,
    ragged_decode,
    rank_decode,
    rope,
    sparse_decode,
    sparse_prefill,
    write_cache,
)
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
from mla_spec.subjects.supports import Supports

Cases = Callable[[Supports, Profile], list[Any]]


def none(supports: Supports, profile: Profile) -> list[Any]:
    """No case."""
    return []


@dataclass(frozen=True)
class OperationCases:
    """Those of one operation, each from what the subject supports and its profile for a dtype.

    Kernels choose parts, tiles and buffers from several numbers together, so ``crossed`` raises two at a time.

    Attributes:
        drawn: a strategy.
        ordinary: as real calls are: several ragged sequences, several heads, lengths that end within a page.
        counts: of the numbers that production has, one at a time: sequences, heads, queries, pages, keys, tokens.
        crossed: in which several of these numbers meet, with lengths of every remainder by the tiles that kernels have.
    """

    drawn: CaseSource
    ordinary: Cases
    counts: Cases = none
    crossed: Cases = none


CASES: dict[str, OperationCases] = {
    "rope": OperationCases(rope_cases, rope.ordinary, rope.counts),
    "absorb": OperationCases(decode_cases, decode.ordinary, absorb.counts),
    "dequantize_weight": OperationCases(weight_cases, dequantize_weight.ordinary, dequantize_weight.counts),
    "prefill": OperationCases(prefill_cases, prefill.ordinary, prefill.counts, prefill.crossed),
    "decode": OperationCases(narrowed(decode_cases, shared=True), decode.ordinary, decode.counts, decode.crossed),
    "ragged_decode": OperationCases(
        ragged_decode_cases, ragged_decode.ordinary, ragged_decode.counts, ragged_decode.crossed
    ),
    "rank_decode": OperationCases(rank_decode_cases, rank_decode.ordinary, rank_decode.counts, rank_decode.crossed),
    "merge": OperationCases(merge_cases, merge.ordinary, merge.counts, merge.crossed),
    "write_cache": OperationCases(write_cases, write_cache.ordinary, write_cache.counts),
    "quantize_cache": OperationCases(quantise_cases, quantize_cache.ordinary, crossed=quantize_cache.crossed),
    "dequantize_cache": OperationCases(pages_cases, dequantize_cache.ordinary, crossed=dequantize_cache.crossed),
    "decode_quantized": OperationCases(
        quantised_decode_cases, decode_quantized.ordinary, decode_quantized.counts, decode_quantized.crossed
    ),
    "sparse_prefill": OperationCases(
        sparse_prefill_cases, sparse_prefill.ordinary, sparse_prefill.counts, sparse_prefill.crossed
    ),
    "sparse_decode": OperationCases(
        sparse_decode_cases, sparse_decode.ordinary, sparse_decode.counts, sparse_decode.crossed
    ),
    "project_indexer": OperationCases(project_indexer_cases, project_indexer.ordinary, project_indexer.counts),
    "indexer": OperationCases(indexer_cases, indexer.ordinary, indexer.counts, indexer.crossed),
}
"""By the operation's name."""
