"""Faults of dense attention with a window of keys, and with a sink beside the scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.planted_bugs.registry import planted

SINK = ("test_decode_attention_sink", "test_prefill_attention_sink")
HALF = ("test_decode_equal_sink_takes_half", "test_prefill_equal_sink_takes_half")
WINDOW = ("test_decode_window", "test_prefill_window")
BEFORE = ("test_decode_ignores_keys_before_its_window", "test_prefill_ignores_keys_before_its_window")


@planted(
    "J20",
    source=("https://github.com/vllm-project/vllm/pull/52156",),
    symptom="models with sinks are wrong in every layer",
    shows_when="attn_sink is given",
    killed_by=(*SINK, *HALF),
)
class DenseSinkDropped(TorchAbsorbed):
    """The backend takes the sink among its further arguments, and drops it."""

    def attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().attend_beside(q, k, v, visible, softmax_scale, None)


@planted(
    "J21",
    source=("https://github.com/ROCm/rocm-libraries/pull/12229",),
    symptom="outputs are too small at lengths of several splits",
    shows_when="attn_sink is given, and there are keys for two splits",
    killed_by=SINK,
)
class SinkOncePerSplit(TorchAbsorbed):
    """Each of the splits of 16 keys adds the sink to its sum."""

    def attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if attn_sink is not None:
            attn_sink = attn_sink + math.log(max(1, -(-k.shape[-2] // 16)))
        return super().attend_beside(q, k, v, visible, softmax_scale, attn_sink)


@planted(
    "J22",
    source=("https://github.com/ROCm/rocm-libraries/pull/12229",),
    symptom="one of two kernels gives other outputs for models with sinks",
    shows_when="attn_sink is neither 0 nor infinite",
    killed_by=(*SINK, "test_sparse_prefill_attention_sink", "test_sparse_decode_attention_sink"),
)
class SinkInBaseTwo(TorchExplicit):
    """Scores are exponents of 2, and the sink is taken for one of them."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        return super().sink_share(lse, attn_sink * math.log(2))


@planted(
    "J23",
    source=("https://github.com/modular/modular/pull/6591",),
    symptom="decoding is right, prefill is not",
    shows_when="several queries, and heads with different sinks",
    killed_by=SINK,
)
class SinkOfAnotherHead(TorchAbsorbed):
    """A row takes the sink of the head that its number leaves modulo the heads, as if there were one query."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        if lse.ndim != 3:
            return super().sink_share(lse, attn_sink)
        s, h = lse.shape[1:]
        row = torch.arange(h, device=lse.device) * s + torch.arange(s, device=lse.device)[:, None]  # [s, h]
        return super().sink_share(lse, attn_sink[row % h])


@planted(
    "X-sink-scaled",
    symptom="rows have a little too little of every value",
    shows_when="attn_sink is given, and softmax_scale is not 1",
    killed_by=SINK,
)
class SinkScaled(TorchExplicit):
    """The sink joins the scores before they are scaled."""

    def attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if attn_sink is not None:
            attn_sink = attn_sink * softmax_scale
        return super().attend_beside(q, k, v, visible, softmax_scale, attn_sink)


@planted(
    "D17",
    source=(
        "https://github.com/huggingface/transformers/issues/39408",
        "https://github.com/zml/zml/pull/763",
        "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/2656",
    ),
    symptom="another model than the one that was trained, by one key a query",
    shows_when="there are more keys than the window has",
    killed_by=(*WINDOW, *BEFORE),
)
class WindowBesidesTheQuery(TorchAbsorbed):
    """A window of W is the W keys before the query, and its own."""

    def windowed(self, visible: Tensor, window: int | None) -> Tensor:
        return super().windowed(visible, None if window is None else window + 1)


@planted(
    "D18",
    source=("https://github.com/lightseekorg/tokenspeed/pull/578",),
    symptom="decoding attends to one key less than prefill",
    shows_when="a call of decode has more keys than its window",
    killed_by=WINDOW[:1],
)
class DecodeWindowWithoutItsEdge(TorchAbsorbed):
    """In decode the window counts the keys before the query, and the oldest of them is lost."""

    def decode(self, *args: Any, window: int | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().decode(*args, window=None if window is None else max(1, window - 1), **options)


@planted(
    "X-window-of-the-first-query",
    symptom="speculative decoding sees keys that its model never saw",
    shows_when="several queries, and more keys than the window has",
    killed_by=WINDOW,
)
class WindowOfTheFirstQuery(TorchExplicit):
    """All queries of a call begin where the window of the first one does."""

    def windowed(self, visible: Tensor, window: int | None) -> Tensor:
        if window is None:
            return visible
        first = super().windowed(visible, window)[..., :1, :].long()
        return visible & (first.cumsum(dim=-1) > 0)


@planted(
    "X-window-of-whole-tiles",
    symptom="differs from the model at long contexts, by up to a page of keys",
    shows_when="a window begins within a tile of 16 keys",
    killed_by=(*WINDOW, *BEFORE),
)
class WindowOfWholeTiles(TorchSDPA):
    """Tiles before the window are skipped, and none is masked."""

    def windowed(self, visible: Tensor, window: int | None) -> Tensor:
        inside = super().windowed(visible, window)
        if window is None or not inside.shape[-1]:
            return inside
        t = inside.shape[-1]
        tiles = torch.nn.functional.pad(inside, (0, -t % 16)).unflatten(-1, (-1, 16)).any(dim=-1)
        return visible & tiles.repeat_interleave(16, dim=-1)[..., :t]
