"""Cases of a layer whose heads are divided among ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.layer import LayerCase
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.tensor_parallel import shard_config
from mla_spec.reference.typing import Array


@dataclass(frozen=True, kw_only=True)
class ShardedLayerCase(LayerCase):
    """A layer, and among how many ranks its heads are divided."""

    kind = "sharded-layer"
    ranks: int = 1

    def gradients(self) -> list[dict[str, Array]]:
        """For each rank gradients of its weights: small integers, whose sums are exact in every dtype."""
        rng = np.random.default_rng([self.seed, 6])
        shapes = weight_shapes(shard_config(self.config, self.ranks))
        return [
            {name: rng.integers(-8, 9, shape).astype(float) for name, shape in shapes.items()}
            for _ in range(self.ranks)
        ]
