"""Faults of dividing a layer's heads among ranks, and of gathering the ranks' gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig

PARTITION = "test_shards_partition_the_weights"
OUTPUTS = "test_outputs_of_shards_add_up"
GRADIENTS = "test_gathered_gradients_are_exact"


@planted(
    "X-o-proj-by-rows",
    symptom="garbage with tensor parallelism",
    shows_when="several ranks",
    killed_by=(PARTITION, OUTPUTS),
)
class OutputShardedByRows(TorchAbsorbed):
    """o_proj is cut where its memory is, by rows, and each piece is viewed as columns of the rank's heads."""

    def shard_weight(self, name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
        if name != "o_proj":
            return super().shard_weight(name, weight, rank, ranks)
        return weight.flatten().chunk(ranks)[rank].view(len(weight), -1)


@planted(
    "X-heads-dealt-in-turn",
    symptom="garbage with tensor parallelism",
    shows_when="several heads on each rank",
    killed_by=(PARTITION, OUTPUTS),
)
class HeadsDealtInTurn(TorchExplicit):
    """Heads of keys and values are dealt to the ranks in turn, those of queries in blocks."""

    def shard_layer(
        self, weights: Mapping[str, Tensor], config: MLAConfig, *, ranks: int
    ) -> list[tuple[dict[str, Tensor], MLAConfig]]:
        shards = super().shard_layer(weights, config, ranks=ranks)
        heads = weights["kv_b_proj"].unflatten(0, (config.num_heads, -1))  # [h, n+v, c]
        for rank, (own, _) in enumerate(shards):
            own["kv_b_proj"] = heads[rank::ranks].flatten(0, 1)
        return shards


@planted(
    "X-partial-outputs-averaged",
    symptom="attention counts less the more ranks there are",
    shows_when="several ranks",
    killed_by=(PARTITION, OUTPUTS),
)
class PartialOutputsAveraged(TorchExplicit):
    """The ranks' outputs are to be averaged: each has o_proj divided by their number."""

    def shard_weight(self, name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
        own = super().shard_weight(name, weight, rank, ranks)
        return own / ranks if name == "o_proj" else own


@planted(
    "X-queries-of-rank-0",
    symptom="all ranks but the first are wrong",
    shows_when="several ranks",
    killed_by=(PARTITION, OUTPUTS),
)
class QueriesOfFirstRank(TorchAbsorbed):
    """The loader of the query's up-projection does not know its rank."""

    def shard_weight(self, name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
        return super().shard_weight(name, weight, 0 if name in ("q_proj", "q_b_proj") else rank, ranks)


class _CacheDivided(TorchLayer):
    ranks = 1

    def cache_bytes(self) -> int:
        return super().cache_bytes() // self.ranks


@planted(
    "X-cache-divided-by-ranks",
    symptom="out of memory with tensor parallelism",
    shows_when="several ranks",
    killed_by=("test_every_shard_caches_the_whole_latent",),
)
class CacheDividedByRanks(TorchAbsorbed):
    """The cache is counted as if ranks shared it, as they do where keys have heads."""

    ranks = 1

    def shard_layer(
        self, weights: Mapping[str, Tensor], config: MLAConfig, *, ranks: int
    ) -> list[tuple[dict[str, Tensor], MLAConfig]]:
        self.ranks, self.whole = ranks, weights["kv_b_proj"]
        return super().shard_layer(weights, config, ranks=ranks)

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        made = _CacheDivided(self, weights, config)
        if self.ranks > 1 and weights["kv_b_proj"].shape != self.whole.shape:
            made.ranks = self.ranks
        return made


@planted(
    "K5-shards",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/6839",),
    symptom="the gradient of the shared rope key is that of some heads only",
    shows_when="several ranks and a rope part",
    killed_by=(GRADIENTS,),
)
class RopeRowsOfFirstRank(TorchAbsorbed):
    """The rope rows of kv_a_proj_with_mqa keep the first rank's gradient; the latent rows are summed."""

    def gather_gradient(self, name: str, parts: list[Tensor], config: MLAConfig) -> Tensor:
        total = super().gather_gradient(name, parts, config)
        if name == "kv_a_proj_with_mqa":
            total[config.kv_lora_rank :] = parts[0][config.kv_lora_rank :]
        return total


@planted(
    "X-kv-a-gradient-averaged",
    symptom="the down-projection learns more slowly the more ranks there are",
    shows_when="several ranks",
    killed_by=(GRADIENTS,),
)
class LatentGradientAveraged(TorchExplicit):
    """The gradient of kv_a_proj_with_mqa is averaged, as that of data-parallel replicas."""

    def gather_gradient(self, name: str, parts: list[Tensor], config: MLAConfig) -> Tensor:
        total = super().gather_gradient(name, parts, config)
        return total / len(parts) if name == "kv_a_proj_with_mqa" else total


@planted(
    "X-norm-gradients-of-rank-0",
    symptom="ranks drift apart, or train the norms on some heads only",
    shows_when="several ranks",
    killed_by=(GRADIENTS,),
)
class NormGradientsOfFirstRank(TorchAbsorbed):
    """Norms are taken to have the same gradient on every rank."""

    def gather_gradient(self, name: str, parts: list[Tensor], config: MLAConfig) -> Tensor:
        return parts[0] if name.endswith("layernorm") else super().gather_gradient(name, parts, config)


@planted(
    "X-o-proj-gradient-by-rows",
    symptom="the output projection does not learn",
    shows_when="several ranks",
    killed_by=(GRADIENTS,),
)
class OutputGradientByRows(TorchExplicit):
    """Columns of o_proj are gathered one rank after the other in memory, and viewed as the weight."""

    def gather_gradient(self, name: str, parts: list[Tensor], config: MLAConfig) -> Tensor:
        if name != "o_proj":
            return super().gather_gradient(name, parts, config)
        return torch.cat(parts).view(len(parts[0]), -1)


@planted(
    "X-gradients-summed-in-place",
    symptom="the first rank's gradient counts again when gradients are accumulated",
    shows_when="gradients are used after they were gathered",
    killed_by=("test_gather_gradients_does_not_modify_its_inputs",),
)
class SumsInPlace(TorchExplicit):
    """The sum is formed in the memory of the first rank's gradient."""

    def sum_over_ranks(self, parts: list[Tensor]) -> Tensor:
        total: Any = parts[0]
        for part in parts[1:]:
            total += part
        return total.clone()
