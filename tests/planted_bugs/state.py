"""Faults of state kept between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig
from mla_spec.subjects.supports import BACKWARD, Supports


class Capturable(TorchAbsorbed):
    """Correct: as many keys are gathered as the table has room for, so that decode never waits for the device."""

    name = "torch-capturable"
    supports = Supports(backward=BACKWARD, cuda_graphs=True)

    def key_count(self, block_table: Tensor, cache_seqlens: Tensor, page_size: int) -> int:
        return block_table.shape[1] * page_size


@planted(
    "F17",
    source=("https://github.com/sgl-project/sglang/pull/9675",),
    symptom="accuracy falls where graphs are replayed",
    shows_when="an equal shape with a longer context than before",
    killed_by=("test_decode_calls_are_independent",),
)
class TableWidthOfFirstCall(TorchAbsorbed):
    """How many keys are read was fixed when a shape was first seen."""

    def __init__(self) -> None:
        self.captured: dict[Any, int] = {}

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        longest = self.captured.setdefault((kv_cache.shape, block_table.shape), int(cache_seqlens.max()))
        return super().gather_batch(kv_cache, block_table, cache_seqlens.clamp(max=longest))


@planted(
    "G8",
    source=("https://github.com/vllm-project/vllm/pull/36611",),
    symptom="stale tile metadata when a graph is replayed",
    shows_when="an equal shape with other lengths than before",
    killed_by=("test_decode_calls_are_independent", "test_decode_is_replayed_in_a_cuda_graph"),
)
class LengthsOfFirstCall(Capturable):
    """The mask is made from the lengths with which a shape was first seen."""

    def __init__(self) -> None:
        self.captured: dict[Any, Tensor] = {}

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        first = self.captured.setdefault((s, len(seqlens), causal), seqlens.clone())
        return super().visible(s, t, first, causal)


@planted(
    "G13",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/4014",),
    symptom="the second call uses the scale of the first",
    shows_when="an equal shape with another scale than before",
    killed_by=("test_decode_calls_are_independent",),
)
class ScaleOfFirstCall(TorchAbsorbed):
    """The key under which a compiled graph is kept lacks the scale."""

    def __init__(self) -> None:
        self.captured: dict[Any, float] = {}

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().scores(q, k, self.captured.setdefault((q.shape, k.shape), softmax_scale))


@planted(
    "J6",
    source=(
        "https://github.com/ikawrakow/ik_llama.cpp/pull/2069",
        "https://github.com/ikawrakow/ik_llama.cpp/commit/87fc8701f",
    ),
    symptom="perplexity in the thousands",
    shows_when="a second layer or call uses the mask",
    killed_by=("test_decode_page_relabelling_changes_nothing",),
)
class ScoresAddedToMask(TorchAbsorbed):
    """Scores are added in place to a mask that all layers share."""

    def __init__(self) -> None:
        self.masks: dict[Any, Tensor] = {}

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros_like(scores).masked_fill(~visible, -torch.inf)
        return self.masks.setdefault((scores.shape, scores.dtype), mask).add_(scores)


class _KeepsCache(TorchLayer):
    def reset(self) -> None:
        self.cache = getattr(self, "cache", None)


@planted(
    "X4",
    symptom="a new conversation knows the last one",
    shows_when="reset after use",
    killed_by=("test_reset_empties_the_cache",),
)
class ResetKeepsCache(TorchAbsorbed):
    """reset does nothing."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsCache(self, weights, config)


@planted(
    "X-plan-kept-on-tensor",
    symptom="stale masks where buffers are used again",
    shows_when="other lengths in the same tensor",
    killed_by=("test_decode_reads_its_tensors_anew",),
)
class PlanKeptOnTensor(Capturable):
    """The plan for a tensor of lengths is kept as long as the tensor is."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        plan = vars(seqlens).setdefault("plan", seqlens.clone())
        return super().visible(s, t, plan, causal)


@planted(
    "X-offsets-kept-on-tensor",
    symptom="sequences are cut in the wrong places where buffers are used again",
    shows_when="other offsets in the same tensor",
    killed_by=("test_prefill_reads_its_tensors_anew",),
)
class OffsetsKeptOnTensor(TorchExplicit):
    """The offsets are copied to the host once for each tensor."""

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        spans = super().sequences(cu_seqlens_q, cu_seqlens_k)
        return vars(cu_seqlens_q).setdefault("spans", spans)


@planted(
    "X-shares-of-first-merge",
    symptom="parts are weighted as those of another step",
    shows_when="an equal shape with other LSEs than before",
    killed_by=("test_merge_calls_are_independent",),
)
class SharesOfFirstMerge(TorchAbsorbed):
    """The buffer of shares is filled when its shape is new."""

    def __init__(self) -> None:
        self.captured: dict[Any, tuple[Tensor, Tensor]] = {}

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        return self.captured.setdefault((lses.shape, lses.dtype), super().shares(lses))


@planted(
    "X-selection-of-first-call",
    symptom="sparse attention sees keys of another step",
    shows_when="an equal shape with other indices than before",
    killed_by=("test_sparse_prefill_calls_are_independent", "test_sparse_decode_calls_are_independent"),
)
class SelectionOfFirstCall(TorchAbsorbed):
    """Which entries of the indices are valid is found when their shape is new."""

    def __init__(self) -> None:
        self.captured: dict[Any, Tensor] = {}

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        found = super().selected(indices, topk_length, s_kv)
        return self.captured.setdefault((indices.shape, s_kv), found)


@planted(
    "X-indexer-weights-of-first-call",
    symptom="the indexer selects by the weights of another step",
    shows_when="an equal shape with other weights than before",
    killed_by=("test_indexer_calls_are_independent",),
)
class IndexerWeightsOfFirstCall(TorchAbsorbed):
    """The scaled weights are kept by their shape."""

    def __init__(self) -> None:
        self.captured: dict[Any, Tensor] = {}

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        kept = self.captured.setdefault((q.shape, k.shape, weights.dtype), weights.clone())
        return super().indexer_logits(q, k, kept)
