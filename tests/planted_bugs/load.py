"""Faults of whole published widths, which narrow rows do not show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.judging.law import Production
from mla_spec.planted_bugs.registry import planted

SHORT = Production(budget=4.0)
"""Enough for the smallest loads, which have whole widths already."""


@planted(
    "X-heads-beyond-shared-memory",
    symptom="slightly worse answers of one rank of no tensor parallelism",
    shows_when="128 heads of published widths",
    killed_by=(
        "test_prefill_agrees_under_load",
        "test_prefill_is_exact_under_load",
        "test_decode_agrees_under_load",
        "test_decode_is_exact_under_load",
        "test_decode_quantized_agrees_under_load",
        "test_decode_quantized_is_exact_under_load",
        "test_sparse_decode_agrees_under_load",
        "test_sparse_decode_is_exact_under_load",
    ),
    production=SHORT,
)
class HeadsBeyondSharedMemory(TorchAbsorbed):
    """The queries of 128 heads do not fit beside the first keys, so the last 16 heads begin 16 keys later."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        scores = super().scores(q, k, softmax_scale)
        if q.shape[-1] >= 192:
            scores[:, 112:, :, :16] = -torch.inf
        return scores


@planted(
    "X-planned-for-the-first",
    symptom="answers change with the requests that come along",
    shows_when="a sequence of 576-wide rows that is longer than the first of its batch",
    killed_by=("test_decode_agrees_under_load", "test_decode_in_any_order_under_load"),
    production=SHORT,
)
class PlannedForTheFirst(TorchAbsorbed):
    """The number of splits is that of the first sequence, twice: what later ones have beyond it is not read."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        if q.shape[-1] == 576:
            cache_seqlens = cache_seqlens.minimum(2 * cache_seqlens[:1] + q.shape[1])
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)
