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


@planted(
    "X-sink-ignores-strides",
    symptom="every head but the first has the sink of another",
    shows_when="the sinks are a view of a larger tensor",
    killed_by=("test_sparse_prefill_reads_strides", "test_sparse_decode_reads_strides"),
)
class SinkIgnoresStrides(TorchAbsorbed):
    """Sparse attention takes the sinks to be adjacent."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        return super().sink_share(lse, as_if_contiguous(attn_sink))


@planted(
    "X-indexer-norm-ignores-strides",
    symptom="the indexer selects other keys than the model was trained to",
    shows_when="the vectors of its norm are views of larger tensors",
    killed_by=("test_project_indexer_reads_strides",),
)
class IndexerNormIgnoresStrides(TorchAbsorbed):
    """The norm of the indexer's keys takes its weight and bias to be adjacent."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return super().layer_norm(x, as_if_contiguous(weight), as_if_contiguous(bias), eps)


@planted(
    "X-heads-taken-as-adjacent",
    symptom="rotary parts of all heads but the first are those of other tokens",
    shows_when="x has heads before tokens in memory",
    killed_by=("test_rope_reads_strides",),
)
class HeadsTakenAsAdjacent(TorchAbsorbed):
    """The rotation asks for the step from token to token, and takes heads to be adjacent."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        if x.ndim == positions.ndim + 2 and x.stride(-2) > x.stride(-3):
            x = as_if_contiguous(x)
        return super().rope(x, positions, rope=rope)
