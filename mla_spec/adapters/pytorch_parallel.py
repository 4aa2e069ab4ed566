"""Tensor parallelism of the PyTorch subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mla_spec.adapters.pytorch_steps import wide
from mla_spec.reference.config import MLAConfig


class TorchTensorParallel:
    """Heads are divided among ranks; what has no heads is whole on every rank."""

    def shard_layer(
        self, weights: Mapping[str, Tensor], config: MLAConfig, *, ranks: int
    ) -> list[tuple[dict[str, Tensor], MLAConfig]]:
        """(weights, configuration) of each rank's layer; weights are views."""
        own = replace(config, num_heads=config.num_heads // ranks)
        return [
            ({name: self.shard_weight(name, w, rank, ranks) for name, w in weights.items()}, own)
            for rank in range(ranks)
        ]

    def head_axis(self, name: str) -> int | None:
        """The axis of a weight along which its heads lie."""
        rows = ("q_proj", "q_b_proj", "q_gate_proj", "kv_b_proj", "g_proj", "sinks")
        return {**dict.fromkeys(rows, 0), "o_proj": 1}.get(name)

    def shard_weight(self, name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
        """What ``rank`` has of a weight."""
        axis = self.head_axis(name)
        return weight if axis is None else weight.chunk(ranks, dim=axis)[rank]

    def gather_gradients(self, gradients: Sequence[Mapping[str, Tensor]], *, config: MLAConfig) -> dict[str, Tensor]:
        """Gradients of the whole layer's weights from those of the ranks'."""
        return {name: self.gather_gradient(name, [g[name] for g in gradients], config) for name in gradients[0]}

    def gather_gradient(self, name: str, parts: list[Tensor], config: MLAConfig) -> Tensor:
        """The gradient of one weight from its ranks'."""
        axis = self.head_axis(name)
        return self.sum_over_ranks(parts) if axis is None else torch.cat(parts, dim=axis)

    def sum_over_ranks(self, parts: list[Tensor]) -> Tensor:
        """An all-reduce, in the wide dtype."""
        return torch.stack(parts).to(wide(parts[0].dtype)).sum(dim=0).to(parts[0].dtype)
