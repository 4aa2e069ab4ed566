"""Faults of memory: arguments written to, outputs that share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig


@planted(
    "F26",
    source=("https://github.com/vllm-project/vllm/pull/38719",),
    symptom="gibberish with full graphs only",
    shows_when="slot 0 is in use, or the cache is compared",
    killed_by=("test_decode_does_not_modify_its_inputs",),
)
class WarmUpWritesSlot0(TorchAbsorbed):
    """A dummy run before the call writes its token to slot 0 of the cache."""

    def decode(self, q: Tensor, kv_cache: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        kv_cache[0, 0] = 0
        return super().decode(q, kv_cache, *args, **options)


@planted(
    "K4",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/5412",),
    symptom="wrong weight gradients",
    shows_when="the caller has kept the unrotated vector",
    killed_by=("test_rope_does_not_modify_its_inputs",),
)
class RotatedInPlace(TorchAbsorbed):
    """The rotation is written over its operand, which the projection before it has kept."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        x.copy_(super().rotate(x, cos, sin, interleaved))
        return x.clone()


@planted(
    "X-positions-advanced-in-place",
    symptom="every layer but the first rotates by the next token's position",
    shows_when="the caller uses its positions again",
    killed_by=("test_rope_does_not_modify_its_inputs",),
)
class PositionsAdvancedInPlace(TorchAbsorbed):
    """The positions are advanced for the next step, in the caller's tensor."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        out = super().rope(x, positions, rope=rope)
        positions += 1
        return out


@planted(
    "X40",
    symptom="another step that has kept the query sees it scaled",
    shows_when="the caller uses q again",
    killed_by=("test_decode_does_not_modify_its_inputs",),
)
class QueryScaledInPlace(TorchAbsorbed):
    """A fused step writes the query in place, which another step has kept."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        scores = super().scores(q, k, softmax_scale)
        q.mul_(softmax_scale)
        return scores


@planted(
    "X5",
    symptom="results change when the next call is made",
    shows_when="an output is kept over a call",
    killed_by=("test_decode_output_is_not_aliased",),
)
class OutputBufferReused(TorchAbsorbed):
    """Outputs of one shape share one buffer."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*args, **options)
        return self.buffers.setdefault((out.shape, out.dtype), out.clone()).copy_(out), lse


@planted(
    "X6",
    symptom="a page loses tokens that another sequence writes to it",
    shows_when="a page is partly filled and the cache is compared",
    killed_by=("test_decode_does_not_modify_its_inputs",),
)
class ClearsTailOfPage(TorchExplicit):
    """NaN in the tail of the last page is kept out by clearing it, in the caller's cache."""

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        page_size = kv_cache.shape[1]
        if length % page_size:
            kv_cache[table[length // page_size].long(), length % page_size :] = 0
        return super().gather(kv_cache, table, length)


class _WritesOverHidden(TorchLayer):
    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden.copy_(super().forward(hidden, positions))


@planted(
    "X7",
    symptom="the residual connection adds the layer's output to itself",
    shows_when="the caller uses the hidden states again",
    killed_by=("test_layer_does_not_modify_its_inputs",),
)
class OutputOverHidden(TorchAbsorbed):
    """A layer returns its output in the memory of its input."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _WritesOverHidden(self, weights, config)


class _OneLayerBuffer:
    """A layer whose outputs of equal shapes are written to the same memory."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.buffers: dict[Any, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def _buffered(self, x: Tensor) -> Tensor:
        return self.buffers.setdefault((tuple(x.shape), x.dtype), torch.empty_like(x)).copy_(x)

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self._buffered(self.layer.prefill(hidden, positions))

    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self._buffered(self.layer.decode(hidden, positions))


@planted(
    "X-one-buffer-layer",
    symptom="a token's output changes when the next token is decoded",
    shows_when="a second call with the same shapes",
    killed_by=("test_layer_output_is_not_aliased",),
)
class OneBufferLayer(TorchAbsorbed):
    """The layer keeps a buffer for its output, as for a CUDA graph."""

    supports = replace(TorchAbsorbed.supports, backward=())

    def layer(self, weights: Mapping[str, Tensor], config: Any) -> Any:
        return _OneLayerBuffer(super().layer(weights, config))


class _PositionsByAddress:
    """A layer that keeps the positions of a tensor by its address and autograd's version."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.kept: dict[Any, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        key = positions.data_ptr(), positions._version, tuple(positions.shape)
        out: Tensor = self.layer.prefill(hidden, self.kept.setdefault(key, positions.clone()))
        return out


@planted(
    "X-plan-by-address-layer",
    symptom="tokens are rotated by the positions of an earlier step",
    shows_when="positions overwritten by a kernel, which autograd's version counter does not see",
    killed_by=("test_layer_reads_its_tensors_anew",),
)
class PositionsByAddressLayer(TorchAbsorbed):
    """Tables of angles are kept for a tensor of positions as long as its address and version stay the same."""

    def layer(self, weights: Mapping[str, Tensor], config: Any) -> Any:
        return _PositionsByAddress(super().layer(weights, config))
