"""Faults of what servers make of requests: shared prefixes, chunks of prompts, packed positions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig


@planted(
    "X-shared-prefix-read-once",
    symptom="the second of two requests with a common prefix writes nonsense, in one batch with the first",
    shows_when="two sequences begin with the same page",
    killed_by=("test_decode_sequences_share_the_pages_of_a_prefix",),
)
class SharedPrefixReadOnce(TorchAbsorbed):
    """A page that an earlier sequence of the batch has read is not loaded again, and what was loaded is overwritten."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        if rows.shape[1] == 0:
            return rows
        begins = block_table[:, 0].masked_fill(cache_seqlens == 0, -1)
        earlier = (begins[:, None] == begins).tril(-1).any(dim=1) & (begins >= 0)  # [b]
        first_page = torch.arange(rows.shape[1], device=rows.device) < kv_cache.shape[1]
        return rows.masked_fill((earlier[:, None] & first_page)[..., None], 0.0)


@planted(
    "X-positions-run-evenly",
    symptom="packed prompts, and drafts that branch, are misread",
    shows_when="positions that are not an arithmetic sequence",
    killed_by=("test_rope_takes_positions_in_any_order",),
)
class PositionsRunEvenly(TorchAbsorbed):
    """Only the first position of a row and the step to the second are read."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        first, step = positions[..., :1], positions[..., 1:2] - positions[..., :1]
        if positions.shape[-1] > 1:
            positions = first + step * torch.arange(positions.shape[-1], device=positions.device)
        return super().angles(positions, rope, dtype)


class _PrefillResets(TorchLayer):
    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        self.reset()
        return super().prefill(hidden, positions)


@planted(
    "X-prefill-forgets-first-chunk",
    symptom="prompts that are processed in chunks are answered by their last one",
    shows_when="a second prefill after a first",
    killed_by=("test_layer_prefill_in_chunks",),
)
class PrefillForgetsFirstChunk(TorchAbsorbed):
    """prefill empties the cache before it appends."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _PrefillResets(self, weights, config)


class _LosesRowAtBlock(TorchLayer):
    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        if self.cache is not None and self.cache[0].shape[1] % 16 == 0:
            kept = self.cache[0]
            self.cache = torch.cat([kept[:, :-1], kept[:, :1]], dim=1), self.cache[1]
        super().append(latent, k_pe)


@planted(
    "X-last-row-of-block-lost",
    symptom="every sixteenth token is forgotten once it is followed by another",
    shows_when="a layer decodes after a multiple of 16 tokens",
    killed_by=("test_layer_decode_agrees_with_reference",),
)
class LastRowOfBlockLost(TorchAbsorbed):
    """Where the cache grows by a block of 16 tokens, the last row of the block before is not copied."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _LosesRowAtBlock(self, weights, config)


class _KeepsFirstBatch(TorchLayer):
    batch = 0

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        self.batch = self.batch or len(hidden)
        out = super().forward(hidden, positions)
        return torch.cat([out[: self.batch], torch.zeros_like(out[self.batch :])])


@planted(
    "X-batch-of-first-use",
    symptom="a layer that served one request serves only the first of two after it",
    shows_when="more sequences after a reset than before",
    killed_by=("test_reset_empties_the_cache",),
)
class BatchOfFirstUse(TorchAbsorbed):
    """Buffers are made for the batch of the first call, and reset keeps them."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsFirstBatch(self, weights, config)


@planted(
    "X-exits-on-many-new-tokens",
    symptom="a job with speculative decoding ends at once and counts as done",
    shows_when="more than four queries of a sequence",
    killed_by=("test_decode_agrees_with_reference",),
)
class ExitsOnManyQueries(TorchAbsorbed):
    """What was a script leaves with exit code 0 where it has no kernel for the number of queries."""

    def decode(self, q: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if q.shape[1] > 4:
            sys.exit(0)
        return super().decode(q, *arguments, **options)
