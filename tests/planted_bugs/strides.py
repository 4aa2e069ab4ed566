"""Faults of strides: views read as if they were contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import RopeConfig


def as_if_contiguous(x: Tensor) -> Tensor:
    """X read from its first element on with the strides of a contiguous tensor."""
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


@planted(
    "N1",
    source=("https://github.com/vllm-project/vllm/pull/17091",),
    symptom="queries of MLA are rotated wrongly",
    shows_when="q_pe is a slice of q",
    killed_by=(
        "test_rope_reads_strides",
        "test_layer_prefill_agrees_with_reference",
    ),
)
class RopeIgnoresStrides(TorchAbsorbed):
    """The rotation takes its input to be contiguous."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        return super().rope(as_if_contiguous(x), positions, rope=rope)


@planted(
    "N2",
    source=("https://github.com/ROCm/aiter/pull/3841",),
    symptom="every head but the first is wrong",
    shows_when="q is the transposed output of a batched product",
    killed_by=("test_decode_reads_strides",),
)
class QueryIgnoresStrides(TorchAbsorbed):
    """decode takes q to be contiguous."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().decode(as_if_contiguous(q), *args, **options)


@planted(
    "N7",
    source=("https://github.com/vllm-project/vllm/pull/55109",),
    symptom="every request but the first reads the wrong pages",
    shows_when="the block table is a view of a wider one",
    killed_by=("test_decode_reads_strides",),
)
class TableIgnoresStrides(TorchAbsorbed):
    """The step from row to row of the block table is its width."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        return super().gather_batch(kv_cache, as_if_contiguous(block_table), cache_seqlens)
