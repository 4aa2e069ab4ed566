"""Faults reported of attention, planted in operations around it: the indexer's operands, and the ranks' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.indexer import IndexerConfig

KEYS = "test_indexer_keys_agree_with_reference"
QUERIES = "test_indexer_queries_agree_with_reference"
PARTITION = "test_shards_partition_the_weights"
OUTPUTS = "test_outputs_of_shards_add_up"


@planted(
    "C3-project-indexer",
    source=("https://github.com/fla-org/flash-linear-attention/commit/f494277f",),
    symptom="underflow",
    shows_when="float16 and small hidden states",
    killed_by=(KEYS,),
)
class IndexerNormInLowPrecision(TorchAbsorbed):
    """The norm of the indexer's keys squares and averages in the dtype of its input."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight + bias


@planted(
    "B12-project-indexer",
    source=("https://github.com/pie-project/pie/pull/603",),
    symptom="quality falls with context",
    shows_when="the rotated part is narrower than the head",
    killed_by=(QUERIES, KEYS),
)
class IndexerFrequenciesOfWholeHead(TorchExplicit):
    """Frequencies are theta^(-2i/d) with the width of a head, of which only the first dims are rotated."""

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        if config.rope is not None:
            theta = config.rope.theta ** (config.rope_dim / config.index_head_dim)
            config = replace(config, rope=replace(config.rope, theta=theta))
        return super().indexer_rope(x, positions, config)


@planted(
    "C7-shards",
    source=("https://github.com/ModelTC/LightLLM/commit/808d8325f",),
    symptom="shape error, or a wrong output projection",
    shows_when="v_head_dim differs from qk_nope_head_dim, and several ranks",
    killed_by=(PARTITION, OUTPUTS),
)
class OutputShardedByNopeWidth(TorchAbsorbed):
    """The columns of o_proj are taken to begin where heads of width qk_nope_head_dim would."""

    def shard_layer(
        self, weights: Mapping[str, Tensor], config: MLAConfig, *, ranks: int
    ) -> list[tuple[dict[str, Tensor], MLAConfig]]:
        shards = super().shard_layer(weights, config, ranks=ranks)
        own = config.num_heads // ranks
        for rank, (shard, _) in enumerate(shards):
            columns = rank * own * config.qk_nope_head_dim + torch.arange(
                own * config.v_head_dim, device=weights["o_proj"].device
            )
            shard["o_proj"] = weights["o_proj"][:, columns.clamp(max=weights["o_proj"].shape[1] - 1)]
        return shards
