"""Faults of padding that a subject adds to its arguments: between sequences, and after tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import RopeConfig


class PadsSequences(TorchExplicit):
    """Correct: sequences are laid out anew, each from a multiple of 8 tokens on, as kernels with tiles like them."""

    name = "torch-padded-sequences"

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        spread_q, spread_k = (self.padded_starts(cu) for cu in (cu_seqlens_q, cu_seqlens_k))
        padded = [self.spread(q, cu_seqlens_q, spread_q), *(self.spread(x, cu_seqlens_k, spread_k) for x in (k, v))]
        starts = self.starts(cu_seqlens_q, spread_q), self.starts(cu_seqlens_k, spread_k)
        outs, lses = [], []
        for (queries, keys), start_q, start_k in zip(self.sequences(cu_seqlens_q, cu_seqlens_k), *starts, strict=True):
            s, t = queries.stop - queries.start, keys.stop - keys.start
            query, key, value = padded[0][start_q:][:s], padded[1][start_k:][:t], padded[2][start_k:][:t]
            offsets = [torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (s, t)]
            out, lse = super().prefill(query, key, value, *offsets, **options)
            assert lse is not None
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, dim=-1)

    def padded_starts(self, cu_seqlens: Tensor) -> list[int]:
        """Where each sequence begins, and where the last one ends."""
        lengths = (cu_seqlens.diff() + 7) // 8 * 8
        return [0, *lengths.cumsum(0).tolist()]

    def spread(self, x: Tensor, cu_seqlens: Tensor, starts: list[int]) -> Tensor:
        """The tokens of x [tokens, ...] at their new places; zeros between."""
        padded = x.new_zeros(starts[-1] + 8, *x.shape[1:])
        for i, start in enumerate(starts[:-1]):
            rows = x[cu_seqlens[i] : cu_seqlens[i + 1]]
            padded[start : start + len(rows)] = rows
        return padded

    def starts(self, cu_seqlens: Tensor, padded: list[int]) -> list[int]:
        """Where the sequences are read."""
        return padded[:-1]


@planted(
    "B21",
    source=("https://github.com/NVIDIA/Megatron-LM/commit/8e44748ee2",),
    symptom="packed sequences with padding get wrong positions",
    shows_when="several sequences, the lengths of which are no multiples of 8",
    killed_by=("test_prefill_agrees_with_reference", "test_prefill_sequences_are_independent"),
)
class ReadsFromUnpaddedOffsets(PadsSequences):
    """The offsets of the sequences without padding are used where the memory has padding."""

    def starts(self, cu_seqlens: Tensor, padded: list[int]) -> list[int]:
        return cu_seqlens[:-1].tolist()


class PadsTokens(TorchAbsorbed):
    """Correct: as in a captured graph, tokens are padded to a multiple of 8, and cos and sin looked up in a table."""

    name = "torch-padded-tokens"

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        tokens = positions.numel()
        if tokens == 0:
            return super().rope(x, positions, rope=rope)
        padding = -tokens % 8
        rows = x.reshape(tokens, *x.shape[positions.ndim :])
        rows = torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])])
        slots = torch.cat([positions.flatten(), self.positions_of_padding(padding).to(positions)])
        table = super().cos_sin(torch.arange(int(positions.max()) + 1, device=x.device), rope, wide(x.dtype))
        cos, sin = (part[slots] for part in table)  # [tokens + padding, r/2]
        if rows.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        return self.rotate(rows.to(cos.dtype), cos, sin, rope.interleaved).to(x.dtype)[:tokens].reshape(x.shape)

    def positions_of_padding(self, padding: int) -> Tensor:
        return torch.zeros(padding)


@planted(
    "B28",
    source=("https://github.com/ROCm/aiter/pull/4195",),
    symptom="garbage or a fault from padded tokens",
    shows_when="the tokens of a call are no multiple of 8",
    killed_by=("test_rope_agrees_with_reference", "test_layer_prefill_agrees_with_reference"),
)
class StalePositionsOfPadding(PadsTokens):
    """Padded tokens have the positions that an earlier step left there, for which the table has no row."""

    def positions_of_padding(self, padding: int) -> Tensor:
        return torch.full((padding,), 1e9)
