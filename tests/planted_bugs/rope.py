"""Faults of the rotary embedding: layout, slice, position, YaRN's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig


@planted(
    "B2",
    source=(
        "https://github.com/sgl-project/sglang/pull/13495",
        "https://github.com/sgl-project/sglang/issues/13530",
    ),
    symptom="long-context retrieval fails",
    shows_when="a model or a submodule of the half layout",
    killed_by=("test_rope_layouts_are_equivalent",),
)
class OneLayoutForAll(TorchAbsorbed):
    """Every rotation is interleaved, also where the half layout is due."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return super().rotate(x, cos, sin, True)


@planted(
    "X-half-layout-of-32-dims",
    symptom="half of the rope dimensions carry no position",
    shows_when="the half layout with more than 32 rope dimensions",
    killed_by=("test_rope_layouts_are_equivalent",),
)
class HalfLayoutOf32Dims(TorchAbsorbed):
    """The kernel of the half layout rotates as many pairs as a row of its tile has."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        if not interleaved:
            beyond = torch.arange(cos.shape[-1], device=cos.device) >= 16
            cos, sin = cos.masked_fill(beyond, 1.0), sin.masked_fill(beyond, 0.0)
        return super().rotate(x, cos, sin, interleaved)


@planted(
    "B7",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/793",
        "https://github.com/flashinfer-ai/flashinfer/commit/504b99036",
    ),
    symptom="decode wrong with trained weights",
    shows_when="a position other than 0",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class RotatesTwice(TorchAbsorbed):
    """The kernel rotates queries and cached keys that were rotated before."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        return super().layer_rope(super().layer_rope(x, positions, config), positions, config)


@planted(
    "B8",
    source=("https://github.com/vllm-project/vllm/pull/41185",),
    symptom="half of the rope dimensions carry no position",
    shows_when="a position other than 0",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class PartialRotaryFactor(TorchAbsorbed):
    """A partial rotary factor of another part of the model halves the rotated width."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        width = config.qk_rope_head_dim // 4 * 2
        if config.rope is None or width == 0:
            return x
        rotated = self.rope(x[..., :width], positions, rope=replace(config.rope, dim=width))
        return torch.cat([rotated, x[..., width:]], dim=-1)


@planted(
    "B10",
    source=("https://github.com/sqliteai/warp/pull/27",),
    symptom="fine until the second turn of a chat, then empty answers",
    shows_when="the order of the keys matters",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class NoRotation(TorchAbsorbed):
    """The rope dimensions are used as width only."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        return x


@planted(
    "B11",
    source=("https://github.com/tensorgi/TPA/issues/4",),
    symptom="an MLA baseline that is too weak",
    shows_when="several tokens and heads",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class HeadAsPosition(TorchAbsorbed):
    """Heads and tokens were exchanged before a rope that indexes axis 1: the angle is that of the head's index."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        heads = x if x.ndim == 4 else x[:, :, None]
        index = torch.arange(heads.shape[2], device=x.device).expand(heads.shape[:-1])
        return super().layer_rope(heads, index, config).view_as(x)


@planted(
    "B12",
    source=("https://github.com/pie-project/pie/pull/603",),
    symptom="quality falls with context",
    shows_when="the rotated part is narrower than the head",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class FrequenciesOfWholeHead(TorchAbsorbed):
    """Frequencies are theta^(-2i/(n+r)) instead of theta^(-2i/r)."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        if config.rope is None:
            return x
        theta = config.rope.theta ** (config.qk_rope_head_dim / config.qk_head_dim)
        return self.rope(x, positions, rope=replace(config.rope, theta=theta))


@planted(
    "B13",
    source=(
        "https://github.com/ml-explore/mlx/pull/3498",
        "https://github.com/ml-explore/mlx/issues/3795",
    ),
    symptom="batched decode: every sequence but the first is corrupted",
    shows_when="one token per sequence and several sequences",
    killed_by=("test_rope_agrees_with_reference",),
)
class RotatesFirstSequenceOnly(TorchAbsorbed):
    """The grid of the single-token path lacks the batch axis."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        rotated = super().rope(x, positions, rope=rope)
        return rotated if positions.shape[-1] > 1 else torch.cat([rotated[:1], x[1:]])


@planted(
    "B14",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/847",
        "https://github.com/flashinfer-ai/flashinfer/commit/1161b1221",
    ),
    symptom="the given query offset has no effect",
    shows_when="several queries per sequence",
    killed_by=("test_layer_prefill_agrees_with_reference",),
)
class QueriesAtLastPosition(TorchAbsorbed):
    """Queries are rotated for the end of the sequence, wherever they are."""

    def project_query(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        return super().project_query(hidden, positions[:, -1:].expand_as(positions), weights, config)


@planted(
    "B15",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/2255",
        "https://github.com/flashinfer-ai/flashinfer/commit/0ccf4e3ad",
    ),
    symptom="accuracy loss",
    shows_when="several tokens with 64-bit positions",
    killed_by=("test_rope_agrees_with_reference",),
)
class PositionsAsInt32(TorchAbsorbed):
    """64-bit positions are read through a 32-bit pointer: every other one is 0."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        words = positions.contiguous().view(torch.int32).flatten()
        return super().angles(words[: positions.numel()].view_as(positions), rope, dtype)


@planted(
    "B16",
    source=(
        "https://github.com/vllm-project/vllm-ascend/commit/d7e19ed57a",
        "https://github.com/vllm-project/vllm-ascend/pull/2744",
    ),
    symptom="failure past the original context",
    shows_when="YaRN and a position past the original context",
    killed_by=("test_rope_agrees_with_reference",),
)
class TableOfOriginalLength(TorchAbsorbed):
    """The cos/sin table ends at original_max_position_embeddings."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        yarn = rope.active_yarn
        if yarn is not None:
            positions = positions.clamp(max=yarn.original_max_position_embeddings - 1)
        return super().angles(positions, rope, dtype)


@planted(
    "B17",
    source=(
        "https://github.com/pytorch/torchtitan/pull/4215",
        "https://github.com/pytorch/torchtitan/commit/48cb7ae1f",
    ),
    symptom="NaN",
    shows_when="YaRN whose correction range is empty: a short original context",
    killed_by=("test_rope_agrees_with_reference",),
)
class RampWithoutGuard(TorchAbsorbed):
    """The ramp divides by the width of the correction range, which may be 0."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        frequencies = super().frequencies(rope, device, dtype)
        if rope.active_yarn is not None:
            low, high = rope.yarn_correction_range()
            # 0 / 0 at the pair where the range begins and ends; ±inf at the others, as the ramp is clamped.
            undefined = (low == high) & (torch.arange(len(frequencies), device=device) == low)
            frequencies = frequencies.masked_fill(undefined, torch.nan)
        return frequencies


@planted(
    "B19",
    source=(
        "https://github.com/pytorch/torchtitan/pull/2575",
        "https://github.com/pytorch/torchtitan/commit/3da072e7b",
    ),
    symptom="compiled and eager results differ",
    shows_when="a position other than 0",
    killed_by=(
        "test_rope_agrees_with_reference",
        "test_rope_depends_on_relative_position_only",
    ),
)
class CosSinInBfloat16(TorchAbsorbed):
    """The cos/sin table is stored in bfloat16."""

    def cos_sin(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = super().cos_sin(positions, rope, dtype)
        return cos.bfloat16().to(dtype), sin.bfloat16().to(dtype)


@planted(
    "B22",
    source=(
        "https://github.com/NVIDIA/Megatron-LM/pull/5243",
        "https://github.com/NVIDIA/Megatron-LM/commit/d30e165203",
    ),
    symptom="the second packed sequence is shifted",
    shows_when="several sequences",
    killed_by=("test_layer_decode_agrees_with_reference",),
)
class PositionsRunOn(TorchAbsorbed):
    """The positions of all sequences are taken for one run."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        run = torch.arange(positions.numel(), device=positions.device).view_as(positions)
        return super().layer_rope(x, positions[0, 0] + run, config)


class _PlainRopeInDecode(TorchLayer):
    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        if config.rope is not None:
            plain = replace(config.rope, yarn=None)
            self.config = replace(config, rope=plain, softmax_scale=config.scale)
        out = self.forward(hidden, positions)
        self.config = config
        return out


@planted(
    "B24",
    source=(
        "https://github.com/kekzl/imp/pull/913",
        "https://github.com/kekzl/imp/issues/897",
    ),
    symptom="fewer drafted tokens are accepted with position",
    shows_when="YaRN, decode",
    killed_by=("test_layer_decode_agrees_with_reference",),
)
class DecodeWithoutYarn(TorchAbsorbed):
    """One of two paths has a rope of its own, without YaRN."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _PlainRopeInDecode(self, weights, config)
