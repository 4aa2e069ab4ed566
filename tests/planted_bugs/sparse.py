"""Faults of sparse attention: which entries select a key, topk_length, the sink, and what is returned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

AGREES = ("test_sparse_prefill_agrees_with_reference", "test_sparse_decode_agrees_with_reference")
STATISTICS = ("test_sparse_prefill_statistics_agree_with_reference", "test_sparse_decode_lse_agrees_with_reference")
SINK = ("test_sparse_prefill_attention_sink", "test_sparse_decode_attention_sink")
OCCURRENCES = ("test_sparse_prefill_counts_every_occurrence", "test_sparse_decode_counts_every_occurrence")
NOTHING = ("test_sparse_prefill_of_nothing", "test_sparse_decode_of_nothing")
UNNAMED = (
    "test_sparse_prefill_ignores_rows_that_no_index_names",
    "test_sparse_decode_ignores_slots_that_no_index_names",
)
INVALID = ("test_sparse_prefill_invalid_entries_are_alike", "test_sparse_decode_invalid_entries_are_alike")
LENGTH = (
    "test_sparse_prefill_ignores_entries_beyond_topk_length",
    "test_sparse_decode_ignores_entries_beyond_topk_length",
)
ORDER = ("test_sparse_prefill_order_of_indices", "test_sparse_decode_order_of_indices")
ALONE = ("test_sparse_prefill_queries_are_independent", "test_sparse_decode_sequences_are_independent")
STRIDES = ("test_sparse_prefill_reads_strides", "test_sparse_decode_reads_strides")
UNMODIFIED = ("test_sparse_prefill_does_not_modify_its_inputs", "test_sparse_decode_does_not_modify_its_inputs")
OWN = ("test_sparse_prefill_output_is_not_aliased", "test_sparse_decode_output_is_not_aliased")
DENSE = ("test_sparse_prefill_over_all_keys_is_prefill", "test_sparse_decode_over_all_keys_is_decode")


@planted(
    "J2",
    source=("https://github.com/NVIDIA/cudnn-frontend/pull/298",),
    symptom="gradients and outputs count keys that were not selected",
    shows_when="-1 among the indices, or more indices than keys",
    killed_by=(*AGREES, *NOTHING, *UNNAMED, *INVALID),
)
class ValidByColumn(TorchExplicit):
    """An entry is valid by its column, not by its value, which is clamped."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        column = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
        return super().selected(column, topk_length, s_kv)

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        return super().gather_rows(pool, indices.clamp(0, pool.shape[0] * pool.shape[1] - 1), selected)


@planted(
    "J5",
    source=(
        "https://github.com/ml-explore/mlx-lm/pull/838",
        "https://github.com/ml-explore/mlx-lm/commit/ab050d1f",
    ),
    symptom="wrong for every request but the first",
    shows_when="several queries, with different holes in their indices",
    killed_by=(*ALONE, *AGREES),
)
class MaskOfFirstRow(TorchExplicit):
    """The mask of the first row is broadcast over all."""

    def attend_rows(self, q: Tensor, rows: Tensor, selected: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return super().attend_rows(q, rows, selected[:1].expand_as(selected), *args)


@planted(
    "J10",
    source=("https://github.com/vllm-project/vllm/pull/54568",),
    symptom="models with sinks are a little wrong everywhere",
    shows_when="attn_sink is given",
    killed_by=(
        *SINK,
        "test_sparse_prefill_equal_sink_takes_half",
        "test_sparse_decode_equal_sink_takes_half",
        "test_decode_attention_sink",
        "test_prefill_attention_sink",
    ),
)
class SinkDropped(TorchAbsorbed):
    """The backend takes the sink and does not use it."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        return torch.ones_like(lse)


@planted(
    "G5",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/issues/5095",
        "https://github.com/sgl-project/sglang/pull/39288",
    ),
    symptom="NaN or garbage after a server has run for a while",
    shows_when="slot 0 holds what nobody wrote, and some entry selects nothing",
    killed_by=UNNAMED,
)
class MaskedLanesReadSlotZero(TorchExplicit):
    """Lanes that select nothing read slot 0, with the weight 0."""

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        return super().gather_rows(pool, torch.where(selected, indices, 0), torch.ones_like(selected))


@planted(
    "G6",
    source=("https://github.com/vllm-project/vllm/pull/36616",),
    symptom="GLM-5 is less accurate",
    shows_when="topk_length is below the number of indices",
    killed_by=(*LENGTH, *AGREES),
)
class LengthNotPassed(TorchAbsorbed):
    """Only -1 ends a row; topk_length is not passed to the kernel."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        return super().selected(indices, None, s_kv)


@planted(
    "E7-sparse",
    source=(
        "https://github.com/vllm-project/vllm/pull/57012",
        "https://github.com/sgl-project/sglang/issues/9363",
    ),
    symptom="crash, or silently wrong merges",
    shows_when="several heads and queries",
    killed_by=(STATISTICS[1], DENSE[1]),
)
class SparseLseByToken(TorchAbsorbed):
    """The LSE is stored [b, s, h] and returned as [b, h, s]."""

    def by_sequence(self, lse: Tensor, b: int, s: int) -> Tensor:
        return lse.reshape(b, lse.shape[1], s)


@planted(
    "E8-sparse",
    source=(
        "https://github.com/vllm-project/vllm/pull/47079",
        "https://github.com/vllm-project/vllm/pull/28840",
    ),
    symptom="parts of a context-parallel cache are merged with wrong shares",
    shows_when="the LSE is used",
    killed_by=(*STATISTICS, *DENSE),
)
class SparseLseInBase2(TorchExplicit):
    """The LSE is returned in base 2."""

    def attend_rows(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(*args)
        return out, lse / math.log(2)


@planted(
    "E16-sparse",
    source=(
        "https://github.com/ROCm/aiter/pull/2106",
        "https://github.com/ROCm/aiter/pull/2319",
    ),
    symptom="NaN for padding rows",
    shows_when="a row selects nothing",
    killed_by=(*NOTHING, *AGREES),
)
class SparseEmptyRowsGiveNaN(TorchExplicit):
    """The softmax of a row of -inf."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(scores, dim=-1), scores.logsumexp(dim=-1)


@planted(
    "X101",
    symptom="wrong only when indices were filtered on the way",
    shows_when="-1 stands before an index that selects",
    killed_by=(*ORDER, *AGREES),
)
class HolesOnlyAtTheEnd(TorchExplicit):
    """The valid entries of a row are counted, and as many are read from its start."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        selected = super().selected(indices, topk_length, s_kv)
        leading = torch.arange(indices.shape[1], device=indices.device) < selected.sum(dim=-1, keepdim=True)
        return leading & selected


@planted(
    "X102",
    symptom="differs where a window and the selection overlap",
    shows_when="an index occurs twice in a row",
    killed_by=(*OCCURRENCES, *AGREES),
)
class RepetitionsDropped(TorchAbsorbed):
    """Each key counts once, however often it is named."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        selected = super().selected(indices, topk_length, s_kv)
        named = indices.masked_fill(~selected, -1)
        earlier = (named[:, :, None] == named[:, None, :]).tril(-1).any(dim=-1)  # [s, k]
        return selected & ~earlier


@planted(
    "X103",
    symptom="merges by LSE are wrong only for models with sinks",
    shows_when="attn_sink is given, and the LSE is used",
    killed_by=(*SINK, *STATISTICS),
)
class SinkInLse(TorchExplicit):
    """The LSE counts the sink."""

    def attend_rows(
        self, q: Tensor, rows: Tensor, selected: Tensor, dim: int, scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(q, rows, selected, dim, scale, attn_sink)
        return out, lse if attn_sink is None else torch.logaddexp(lse, attn_sink.expand_as(lse))


@planted(
    "X104",
    symptom="out of bounds where the selection is padded with the number of keys",
    shows_when="an index is not below the number of keys",
    killed_by=(*INVALID, *AGREES),
)
class OnlyMinusOneIsInvalid(TorchExplicit):
    """Indices beyond the keys are read."""

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        return super().selected(indices, topk_length, 2**31 - 1)


@planted(
    "X105",
    symptom="the next layer, which shares the indices, attends to key 0",
    shows_when="an entry is -1",
    killed_by=UNMODIFIED,
)
class IndicesClampedInPlace(TorchAbsorbed):
    """-1 becomes 0 in the caller's indices."""

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        return super().gather_rows(pool, indices.clamp_(min=0), selected)


@planted(
    "X106",
    symptom="the output of the last layer changes when the next layer runs",
    shows_when="an output is kept over a call",
    killed_by=OWN,
)
class SparseOutputBufferReused(TorchExplicit):
    """Outputs of one shape share one buffer."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def attend_rows(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(*args)
        return self.buffers.setdefault((out.shape, out.dtype), out.clone()).copy_(out), lse


@planted(
    "X107",
    symptom="wrong only when the cache is a slice of a larger pool",
    shows_when="rows of the cache are longer than c + r",
    killed_by=STRIDES,
)
class PoolIgnoresStrides(TorchAbsorbed):
    """The pool is taken to be contiguous."""

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        return super().gather_rows(as_if_contiguous(pool), indices, selected)


@planted(
    "X108",
    symptom="speculative decoding accepts less than it should",
    shows_when="several sequences of several queries, with different topk_length",
    killed_by=(ALONE[1], AGREES[1]),
)
class LengthsOfOtherSequences(TorchExplicit):
    """topk_length is laid out as if queries came before sequences."""

    def sparse_decode(self, q: Tensor, *args: Any, topk_length: Tensor | None = None, **options: Any) -> Any:
        if topk_length is not None:
            b, s = q.shape[:2]
            q = q.flatten(0, 1)[:, None]  # [b·s, 1, h, c+r]
            indices = args[1].flatten(0, 1)[:, None]
            out, lse = super().sparse_decode(q, args[0], indices, topk_length=topk_length.repeat(s), **options)
            assert lse is not None
            return out.reshape(b, s, *out.shape[2:]), lse[..., 0].reshape(b, s, -1).transpose(1, 2)
        return super().sparse_decode(q, *args, **options)


@planted(
    "X109",
    symptom="what rescales by max_logits underflows",
    shows_when="every selected score is negative, and some entry selects nothing",
    killed_by=(STATISTICS[0],),
)
class MaximumOverMaskedEntries(TorchAbsorbed):
    """The largest logit counts entries that select nothing, with the score 0."""

    def max_logits(self, q: Tensor, rows: Tensor, selected: Tensor, softmax_scale: float) -> Tensor | None:
        return super().max_logits(q, rows, torch.ones_like(selected), softmax_scale)
