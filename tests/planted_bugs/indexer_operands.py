"""Faults of the indexer inside a layer: projections, norm, and which dims are rotated how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.indexer import IndexerConfig

QUERIES = "test_indexer_queries_agree_with_reference"
KEYS = "test_indexer_keys_agree_with_reference"
WEIGHTS = "test_indexer_head_weights_agree_with_reference"
FIRST_DIMS = "test_indexer_rotates_only_its_first_dims"
RELATIVE = "test_indexer_scores_depend_on_relative_position_only"
TOGETHER = "test_indexer_of_projected_operands"
STRIDES = "test_project_indexer_reads_strides"
CALLS = "test_project_indexer_calls_are_independent"
UNMODIFIED = "test_project_indexer_does_not_modify_its_inputs"


@planted(
    "B6",
    source=(
        "https://github.com/NVIDIA/Megatron-LM/pull/3026",
        "https://github.com/NVIDIA/Megatron-LM/commit/b0eb9143c3",
    ),
    symptom="the sparse indexer selects other keys than the reference model",
    shows_when="some dims of the indexer are rotated and others are not",
    killed_by=(FIRST_DIMS, QUERIES, KEYS, TOGETHER),
)
class IndexerRotatesLastDims(TorchAbsorbed):
    """Rows are split as in the attention, where the rotated part comes last."""

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        if config.rope is None:
            return x
        x_nope, x_pe = x.split([config.index_head_dim - config.rope_dim, config.rope_dim], dim=-1)
        return torch.cat([x_nope, self.rope(x_pe, positions, rope=config.rope)], dim=-1)


@planted(
    "B2-project-indexer",
    source=(
        "https://github.com/sgl-project/sglang/pull/13495",
        "https://github.com/sgl-project/sglang/issues/13530",
    ),
    symptom="finds less and less in contexts longer than top_k",
    shows_when="the indexer's layout is half, where that of the attention is interleaved",
    killed_by=(QUERIES, KEYS),
)
class IndexerLayoutOfAttention(TorchAbsorbed):
    """The indexer's rotated dims are taken for interleaved pairs, whatever its configuration says."""

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        if config.rope is not None:
            config = replace(config, rope=replace(config.rope, interleaved=True))
        return super().indexer_rope(x, positions, config)


@planted(
    "J8-project-indexer",
    source=("https://github.com/tenstorrent/tt-metal/pull/47832",),
    symptom="the loss that trains the indexer is wrong; the selection is not",
    shows_when="logits are used",
    killed_by=(WEIGHTS,),
)
class IndexerScaleOfAttention(TorchExplicit):
    """The scale of q·k is that of the attention's head dim."""

    def head_weights(self, hidden: Tensor, weights_proj: Tensor, config: IndexerConfig) -> Tensor:
        return super().head_weights(hidden, weights_proj, config) * math.sqrt(config.index_head_dim / 192)


@planted(
    "J9-project-indexer",
    source=("https://github.com/sgl-project/sglang/pull/13459",),
    symptom="a little less accurate",
    shows_when="logits lie close together",
    killed_by=(WEIGHTS,),
)
class HeadWeightsInBfloat16(TorchAbsorbed):
    """The projection of the heads' weights is rounded to bfloat16."""

    def head_weights(self, hidden: Tensor, weights_proj: Tensor, config: IndexerConfig) -> Tensor:
        weights = super().head_weights(hidden, weights_proj, config)
        return weights.bfloat16().to(weights.dtype)


@planted(
    "X-indexer-keys-by-rms-norm",
    symptom="selects worse keys; nothing else is wrong",
    shows_when="always",
    killed_by=(KEYS,),
)
class KeysByRmsNorm(TorchAbsorbed):
    """The keys are normalised as the latents are, without subtracting their mean."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self.rms_norm(x, weight, eps) + bias


@planted(
    "X-indexer-keys-without-bias",
    symptom="selects worse keys with trained weights",
    shows_when="the bias of the norm is not 0",
    killed_by=(KEYS,),
)
class KeysWithoutBias(TorchExplicit):
    """The bias of the norm is not loaded."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return super().layer_norm(x, weight, torch.zeros_like(bias), eps)


@planted(
    "X-indexer-norm-with-default-eps",
    symptom="selects other keys where hidden states are small",
    shows_when="small hidden states",
    killed_by=(KEYS,),
)
class KeysWithDefaultEps(TorchAbsorbed):
    """The norm has the eps of its class, 1e-5."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return super().layer_norm(x, weight, bias, 1e-5)


@planted(
    "X-indexer-rotates-keys-only",
    symptom="selects the same keys for every query position",
    shows_when="the indexer has rotated dims",
    killed_by=(RELATIVE, FIRST_DIMS, QUERIES),
)
class IndexerRotatesKeysOnly(TorchAbsorbed):
    """The queries are not rotated."""

    def indexer_query_rope(self, q: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return q


@planted(
    "X-indexer-keys-at-chunk-positions",
    symptom="selects well up to the first chunk's end, then the keys of the wrong chunk",
    shows_when="a position of 64 or more",
    killed_by=(RELATIVE,),
)
class KeysAtChunkPositions(TorchAbsorbed):
    """The keys are rotated by their place in a chunk of 64 tokens."""

    def indexer_key_rope(self, k: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return super().indexer_key_rope(k, positions % 64, config)


@planted(
    "X-indexer-rows-as-positions",
    symptom="selects wrong keys from the second request of a batch on, and in every later chunk",
    shows_when="positions do not run from 0 in one sequence",
    killed_by=(FIRST_DIMS, QUERIES, KEYS),
)
class RowsAsPositions(TorchExplicit):
    """Tokens are rotated by their place in the batch."""

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return super().indexer_rope(x, torch.arange(len(x), device=x.device), config)


@planted(
    "X-indexer-scale-folded-in-place",
    symptom="selects worse with every step",
    shows_when="the weights are used again",
    killed_by=(UNMODIFIED,),
)
class ScaleFoldedInPlace(TorchExplicit):
    """The scale is folded into weights_proj, in place, at every call."""

    def head_weights(self, hidden: Tensor, weights_proj: Tensor, config: IndexerConfig) -> Tensor:
        weights = super().head_weights(hidden, weights_proj, config)
        weights_proj.mul_(config.weight_scale)
        return weights


@planted(
    "X-workspace-of-indexer-and-projection",
    symptom="selects arbitrary keys, while the tests of both kernels pass",
    shows_when="indexer gets the keys that project_indexer returned",
    killed_by=(TOGETHER,),
)
class KeysInWorkspace(TorchExplicit):
    """Keys are returned in scratch memory, which the indexer then uses for its queries."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def scratch(self, like: Tensor) -> Tensor:
        """Memory for the elements of ``like``, from the start of one buffer, with their values in it."""
        size = like.numel() * like.element_size()
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self.buffer[:size].view(like.dtype).view(like.shape).copy_(like)

    def indexer_key_rope(self, k: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return self.scratch(super().indexer_key_rope(k, positions, config))

    def indexer(self, q: Tensor, *args: Any, **options: Any) -> Any:
        return super().indexer(self.scratch(q), *args, **options)


@planted(
    "X-indexer-latent-ignores-strides",
    symptom="selects arbitrary keys once the down-projections are fused",
    shows_when="rows of the query latent lie further apart than they are long",
    killed_by=(STRIDES,),
)
class LatentIgnoresStrides(TorchAbsorbed):
    """The query latent is taken to be contiguous."""

    def project_indexer(
        self, hidden: Tensor, q_latent: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: IndexerConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().project_indexer(hidden, as_if_contiguous(q_latent), positions, weights, config)


@planted(
    "X-indexer-angles-of-first-call",
    symptom="selects well in the prompt and worse with every decoded token",
    shows_when="a second call with as many tokens, at other positions",
    killed_by=(CALLS, FIRST_DIMS),
)
class AnglesOfFirstCall(TorchExplicit):
    """Positions are kept by their number, for later calls."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return super().indexer_rope(x, self.kept.setdefault(len(positions), positions.clone()), config)
