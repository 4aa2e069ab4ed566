"""Faults of the causal mask and of several queries per sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchSDPA
from mla_spec.planted_bugs.registry import planted


@planted(
    "D3",
    source=(
        "https://github.com/vllm-project/vllm/pull/51065",
        "https://github.com/vllm-project/vllm/issues/51848",
    ),
    symptom="illegal access or wrong rows",
    shows_when="several queries per sequence",
    killed_by=("test_decode_agrees_with_reference", "test_decode_two_equal_maxima_give_their_mean"),
)
class LengthsByQueryToken(TorchAbsorbed):
    """There is one program per query token, and it takes the length of the sequence with the token's number."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        b = len(seqlens)
        token = torch.arange(b * s, device=seqlens.device).clamp(max=b - 1)
        each = super().visible(s, t, seqlens[token], causal)  # [b·s, 1, s, t]
        query = torch.arange(s, device=seqlens.device).repeat(b)
        return each[torch.arange(b * s), 0, query].view(b, 1, s, t)


@planted(
    "D5",
    source=(
        "https://github.com/lablup/mlxcel/pull/998",
        "https://github.com/lablup/mlxcel/issues/619",
    ),
    symptom="degenerate text",
    shows_when="prefill; decode is right",
    killed_by=(
        "test_future_tokens_are_ignored",
        "test_prefill_equals_token_by_token_decode",
    ),
)
class PrefillWithoutMask(TorchAbsorbed):
    """The branch of several queries has no mask where the caller passes none."""

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones(q.shape[0], 1, q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)


@planted(
    "D6",
    source=("https://github.com/deepseek-ai/DeepSeek-V3/pull/1536",),
    symptom="the mask cannot be broadcast",
    shows_when="several queries after cached tokens",
    killed_by=("test_layer_decodes_several_tokens_at_once",),
)
class SquareMask(TorchAbsorbed):
    """The mask is s × s, also where there are cached keys."""

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        s = q.shape[-2]
        if s == 1:
            return super().layer_visible(q, k)
        return torch.ones(q.shape[0], 1, s, s, dtype=torch.bool, device=q.device).tril()


@planted(
    "D7",
    source=("https://github.com/deepseek-ai/FlashMLA/commit/2d291b0",),
    symptom="queries see future keys at odd lengths",
    shows_when="the last queries lie in two tiles of keys",
    killed_by=("test_decode_agrees_with_reference",),
)
class MasksLastTileOnly(TorchAbsorbed):
    """How many tiles of keys need the causal mask is computed without the number of queries."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        tile = 16
        last_tile = (seqlens - 1).clamp(min=0) // tile * tile  # [b]
        key = torch.arange(t, device=seqlens.device)
        return super().visible(s, t, seqlens, causal) | (key < last_tile[:, None])[:, None, None]


@planted(
    "D13",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/348",),
    symptom="every query but the last sees one future key",
    shows_when="several causal queries",
    killed_by=("test_decode_ignores_future_keys",),
)
class MaskOffByOne(TorchAbsorbed):
    """Keys are masked where j > length + i - s instead of where j >= that."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        own = super().visible(s, t, seqlens, causal=False)
        return super().visible(s, t, seqlens + int(causal), causal) & own


@planted(
    "D15",
    source=("https://github.com/huggingface/transformers/pull/48363",),
    symptom="future keys and padding get weight",
    shows_when="several queries, or a ragged batch",
    killed_by=("test_decode_agrees_with_reference",),
)
class BooleanMaskAdded(TorchSDPA):
    """A boolean mask is passed on as numbers, which are added to the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        heads = q.shape[1]
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.dtype), scale=softmax_scale)
        return out, q.new_empty(0)


@planted(
    "D16",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/2781",
        "https://github.com/vllm-project/vllm-ascend/commit/f4e3d22432",
    ),
    symptom="accuracy",
    shows_when="several causal queries, or a ragged batch",
    killed_by=(
        "test_decode_agrees_with_reference",
        "test_decode_equal_scores_give_the_mean",
    ),
)
class MaskOfWrongValue(TorchAbsorbed):
    """The mask adds 1 to the scores it should remove."""

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores + (~visible).to(scores.dtype)


@planted(
    "X1",
    symptom="queries after cached keys see the first keys only",
    shows_when="several causal queries, more keys than queries",
    killed_by=("test_decode_last_key_matters",),
)
class TopLeftMask(TorchAbsorbed):
    """The causal mask is aligned to the first key: query i sees keys 0 .. i."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens.clamp(max=s) if causal and s > 1 else seqlens, causal)


@planted(
    "X2", symptom="the newest token has no weight", shows_when="always", killed_by=("test_decode_last_key_matters",)
)
class LastKeyDropped(TorchAbsorbed):
    """Lengths are taken not to count the new tokens' last."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, torch.where(seqlens > 1, seqlens - 1, seqlens), causal)
