"""Faults of sparse attention where a kernel reaches a limit: threads of a block, blocks of a grid, parts of a selection, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted

SPARSE_PREFILL = "test_sparse_prefill_at_production_counts"
SPARSE_DECODE = "test_sparse_decode_at_production_counts"
SPARSE_GRADIENTS = "test_sparse_prefill_gradients_agree_with_reference"


@planted(
    "X-lengths-of-128-sequences",
    symptom="the last requests of a full batch attend to slots that were selected for others",
    shows_when="more than 128 sequences, each with its topk_length",
    killed_by=(SPARSE_DECODE,),
)
class LengthsOf128Sequences(TorchAbsorbed):
    """The lengths of selections are staged by 128 threads, one each."""

    def sparse_decode(self, q: Tensor, *args: Any, topk_length: Tensor | None = None, **options: Any) -> Any:
        if topk_length is not None:
            topk_length = topk_length[torch.arange(len(topk_length), device=q.device) % 128]
        return super().sparse_decode(q, *args, topk_length=topk_length, **options)


@planted(
    "X-65535-rows-of-sparse-prefill",
    symptom="the end of a long prompt is forgotten without tensor parallelism",
    shows_when="more than 65535 pairs of a query and a head",
    killed_by=(SPARSE_PREFILL,),
)
class RowsOfSparsePrefill(TorchAbsorbed):
    """A grid has 65535 blocks at most along its second axis, and a row each."""

    def sparse_prefill(self, q: Tensor, *args: Any, **options: Any) -> Any:
        out, *others = super().sparse_prefill(q, *args, **options)
        s, h = q.shape[:2]
        row = torch.arange(s * h, device=q.device).view(s, h, 1)
        return out.masked_fill(row >= 65535, 0.0), *others


@planted(
    "X-repetitions-in-long-selections",
    symptom="differs from the reference where an indexer names a key twice",
    shows_when="more than 1024 indices, one of them twice",
    killed_by=(SPARSE_PREFILL,),
)
class RepetitionsInLongSelections(TorchAbsorbed):
    """More than 1024 indices are sorted first, and equal neighbors counted once."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        selected = super().selected(indices, topk_length, s_kv)
        if indices.shape[1] <= 1024:
            return selected
        own = -1 - torch.arange(indices.shape[1], device=indices.device)
        value, place = torch.where(selected, indices.long(), own).sort(dim=1, stable=True)
        again = torch.zeros_like(selected).scatter(1, place[:, 1:], value[:, 1:] == value[:, :-1])
        return selected & ~again


@planted(
    "X-sparse-gradients-of-64-heads",
    symptom="the latents of sparse models train on half of the heads",
    shows_when="more than 64 heads",
    killed_by=(SPARSE_GRADIENTS,),
)
class SparseGradientsOf64Heads(TorchAbsorbed):
    """Every block of 64 heads stores the gradient of the keys, where all should add to it."""

    def attend_rows(
        self, q: Tensor, rows: Tensor, selected: Tensor, head_dim_v: int, softmax_scale: float, sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, parts = q.shape[1], []
        for i in range(0, h, 64):
            own = None if sink is None else sink[i : i + 64]
            seen = rows if i + 64 >= h else rows.detach()
            parts.append(super().attend_rows(q[:, i : i + 64], seen, selected, head_dim_v, softmax_scale, own))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


@planted(
    "X-sparse-gradients-of-512-queries",
    symptom="the latents of sparse models train on the end of their context",
    shows_when="more than 512 queries",
    killed_by=(SPARSE_GRADIENTS,),
)
class SparseGradientsOf512Queries(TorchAbsorbed):
    """Every launch of 512 queries stores the gradient of the keys, where all should add to it."""

    def sparse_prefill(
        self, q: Tensor, kv: Tensor, indices: Tensor, *, topk_length: Tensor | None = None, **options: Any
    ) -> Any:
        parts = []
        for i in range(0, len(q), 512):
            own = slice(i, i + 512)
            length = None if topk_length is None else topk_length[own]
            keys = kv if i + 512 >= len(q) else kv.detach()
            parts.append(super().sparse_prefill(q[own], keys, indices[own], topk_length=length, **options))
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))
