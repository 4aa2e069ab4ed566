"""Faults of ragged prefill: offsets of packed sequences, masks, value dims."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

AGREES = "test_prefill_agrees_with_reference"
LSE_AGREES = "test_prefill_lse_agrees_with_reference"
ALONE = "test_prefill_sequences_are_independent"
FUTURE = "test_prefill_ignores_future_keys"
IN_CHUNKS = "test_prefill_in_chunks_of_queries"
CHUNKED = "test_chunked_prefill_merges_to_the_whole"
PADDED = "test_prefill_of_padded_values"
EQUALS_DECODE = "test_prefill_equals_decode"


@planted(
    "F20-prefill",
    source=(
        "https://github.com/ModelTC/LightLLM/pull/743",
        "https://github.com/ModelTC/LightLLM/commit/00e4de743",
    ),
    symptom="prefill after a cached prefix is wrong",
    shows_when="several sequences, more keys than queries",
    killed_by=(AGREES, ALONE, EQUALS_DECODE),
)
class KeysStartWithQueriesPacked(TorchExplicit):
    """The keys of a sequence start where its queries start."""

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        spans = super().sequences(cu_seqlens_q, cu_seqlens_k)
        last = int(cu_seqlens_k[-1])
        return [(q, slice(min(q.start, last), min(q.start + k.stop - k.start, last))) for q, k in spans]


@planted(
    "D5-prefill",
    source=(
        "https://github.com/lablup/mlxcel/pull/998",
        "https://github.com/lablup/mlxcel/issues/619",
    ),
    symptom="degenerate text",
    shows_when="prefill; decode is right",
    killed_by=(FUTURE, IN_CHUNKS, AGREES),
)
class PackedWithoutMask(TorchAbsorbed):
    """Prefill has no causal mask."""

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        return super().packed_visible(cu_seqlens_q, cu_seqlens_k, causal=False)


@planted(
    "D6-prefill",
    source=("https://github.com/deepseek-ai/DeepSeek-V3/pull/1536",),
    symptom="chunked prefill forgets the prefix",
    shows_when="more keys than queries",
    killed_by=(AGREES, IN_CHUNKS),
)
class PackedTopLeftMask(TorchExplicit):
    """The mask is that of a square: query i sees keys 0 .. i."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal=False)
        return visible & torch.ones(s, t, dtype=torch.bool, device=seqlens.device).tril() if causal else visible


@planted(
    "D7-prefill",
    source=("https://github.com/deepseek-ai/FlashMLA/commit/2d291b0",),
    symptom="queries see future keys at odd lengths",
    shows_when="the queries end in two tiles of keys",
    killed_by=(AGREES, IN_CHUNKS),
)
class PackedMasksLastTileOnly(TorchExplicit):
    """How many tiles of keys need the causal mask is computed without the number of queries."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        last_tile = max(t - 1, 0) // 16 * 16
        return super().visible(s, t, seqlens, causal) | (torch.arange(t, device=seqlens.device) < last_tile)


@planted(
    "D12",
    source=("https://github.com/vllm-project/vllm/pull/14253",),
    symptom="inaccurate, or an illegal access",
    shows_when="a batch mixes sequences of one and of several new tokens",
    killed_by=(AGREES, ALONE),
)
class DecodesFirst(TorchExplicit):
    """Sequences with one query are computed first, and their rows are not put back in place."""

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        spans = super().sequences(cu_seqlens_q, cu_seqlens_k)
        return sorted(spans, key=lambda span: span[0].stop - span[0].start != 1)


@planted(
    "E7-prefill",
    source=(
        "https://github.com/vllm-project/vllm/pull/57012",
        "https://github.com/sgl-project/sglang/issues/9363",
    ),
    symptom="crash, or silently wrong merges",
    shows_when="several heads and tokens",
    killed_by=(LSE_AGREES, CHUNKED, EQUALS_DECODE),
)
class LseByTokenPacked(TorchAbsorbed):
    """The LSE is stored [tokens, h] and returned as [h, tokens]."""

    def prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().prefill(*args, **options)
        assert lse is not None
        return out, lse.T.reshape(lse.shape)


@planted(
    "E22-prefill",
    source=(
        "https://github.com/ROCm/aiter/pull/3391",
        "https://github.com/ROCm/aiter/commit/ff61bb399",
    ),
    symptom="rows of the neighbouring sequence are overwritten",
    shows_when="ragged queries, fewer than a tile",
    killed_by=(AGREES, ALONE),
)
class WholeTilesStored(TorchExplicit):
    """A tile of 4 rows is stored for each sequence, also where it has fewer; the first sequence finishes last."""

    def prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().prefill(*args, **options)
        first = int(args[3][1])
        if 0 < first < 4:
            out[first:4] = 0.0
        return out, lse


@planted(
    "F21-prefill",
    source=(
        "https://github.com/ikawrakow/ik_llama.cpp/pull/2031",
        "https://github.com/ikawrakow/ik_llama.cpp/commit/4553cd005",
    ),
    symptom="fine for short contexts, garbage for longer ones",
    shows_when="V narrower than QK, and more keys than its width",
    killed_by=(AGREES, CHUNKED),
)
class PackedValueRowsByWidth(TorchExplicit):
    """The loop over keys steps by blocks of the width of QK, that over values by blocks of the width of V."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        key = torch.arange(k.shape[-2], device=k.device)
        width, width_v = k.shape[-1], v.shape[-1]
        value = (key // width * width_v + key % width).clamp(max=max(0, len(key) - 1))
        return super().attend(q, k, v[..., value, :], visible, softmax_scale)


@planted(
    "G13-prefill",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/4014",),
    symptom="the second call uses the scale of the first",
    shows_when="an equal shape with another scale than before",
    killed_by=("test_prefill_calls_are_independent",),
)
class PackedScaleOfFirstCall(TorchAbsorbed):
    """The key under which a compiled graph is kept lacks the scale."""

    def __init__(self) -> None:
        self.captured: dict[Any, float] = {}

    def prefill(self, q: Tensor, k: Tensor, *args: Any, softmax_scale: float, **options: Any) -> Any:
        scale = self.captured.setdefault((q.shape, k.shape), softmax_scale)
        return super().prefill(q, k, *args, softmax_scale=scale, **options)


@planted(
    "K4-prefill",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/5412",),
    symptom="wrong weight gradients",
    shows_when="the caller uses q again",
    killed_by=("test_prefill_does_not_modify_its_inputs",),
)
class PackedQueryScaledInPlace(TorchAbsorbed):
    """A fused step writes the query in place, which another step has kept."""

    def prefill(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        result = super().prefill(q, *args, **options)
        q.mul_(0.5)
        return result


@planted(
    "X60",
    symptom="answers mention the neighbour's prompt",
    shows_when="several sequences in one call",
    killed_by=(ALONE, AGREES),
)
class PackedAsOneSequence(TorchExplicit):
    """The boundaries of the sequences are not looked at."""

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        return super().sequences(cu_seqlens_q[[0, -1]], cu_seqlens_k[[0, -1]])


@planted(
    "X61",
    symptom="wrong only for models whose V is as wide as QK",
    shows_when="V is as wide as QK, or was padded to it",
    killed_by=(PADDED,),
)
class EqualWidthsMeanLatent(TorchAbsorbed):
    """V as wide as QK is taken for the latent cache, whose rows are keys and values at once."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().prefill(q, k, k if v.shape == k.shape else v, *args, **options)


@planted(
    "X62",
    symptom="wrong only when V comes from the joint projection",
    shows_when="V is a slice of a wider row",
    killed_by=("test_prefill_reads_strides",),
)
class ValuesIgnoreStrides(TorchAbsorbed):
    """V is taken to be contiguous."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().prefill(q, k, as_if_contiguous(v), *args, **options)


@planted(
    "X63",
    symptom="the output of the last layer changes when the next layer runs",
    shows_when="an output is kept over a call",
    killed_by=("test_prefill_output_is_not_aliased",),
)
class PackedOutputBufferReused(TorchExplicit):
    """Outputs of one shape share one buffer."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().prefill(*args, **options)
        return self.buffers.setdefault((out.shape, out.dtype), out.clone()).copy_(out), lse
