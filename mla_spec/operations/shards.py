"""``shard_layer`` and ``gather_gradients``: tensor parallelism, whose ranks are simulated in one process.

shard_layer(weights, config, *, ranks): rank i gets the weights and configuration of a ``layer`` of its own with heads
i·h/ranks .. (i + 1)·h/ranks - 1. These are their rows of q_proj or q_b_proj and of kv_b_proj, of g_proj and sinks where
there are such, their columns of o_proj, and all of the other weights. The outputs of the ranks' layers add up to the layer's.
ranks divides num_heads.

gather_gradients(gradients, *, config): ``gradients`` are those of each rank's weights, by name, in the order of
``shard_layer``, of a loss that depends on the sum of the ranks' outputs. Returned is the gradient of each weight of the whole
layer, whose configuration is ``config``. Gradients of the weights of heads are joined; those of what every rank has are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mla_spec.operations import layer
from mla_spec.operations.layer import LayerCase, LayerDriver, make_layer
from mla_spec.operations.regimes import Regime
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.tensor_parallel import shard_config
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver, Result
from mla_spec.subjects.violation import Violation


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


class Shard:
    """One rank's weights and configuration, as the subject returned them."""

    def __init__(self, driver: Driver, rank: int, weights: Mapping[str, torch.Tensor], config: MLAConfig) -> None:
        self.driver, self.rank, self.config = driver, rank, config
        self._weights = dict(weights)

    def weights(self) -> dict[str, Result]:
        """The weights as plain data; Violation unless their names and shapes are those of the configuration."""
        shapes, what = weight_shapes(self.config), f"of rank {self.rank}"
        if set(self._weights) != set(shapes):
            raise Violation(f"weights {what} must be {', '.join(shapes)}, got {', '.join(self._weights)}")
        return {name: self.driver.result(self._weights[name], f"{name} {what}", shapes[name]) for name in shapes}

    def layer(self) -> LayerDriver:
        """The rank's layer."""
        made = make_layer(self.driver, self._weights, self.config)
        return LayerDriver(self.driver, made, self._weights)


class ParallelDriver:
    """A driver's subject with tensor parallelism."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def weights(self, weights: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Weights or gradients as tensors."""
        return {name: self.driver.tensor(w) for name, w in weights.items()}

    def shards(self, weights: Mapping[str, Array], config: MLAConfig, ranks: int) -> list[Shard]:
        """Every rank's part; Violation unless they are ``ranks`` layers of num_heads / ranks heads."""
        tensors = self.weights(weights)
        returned = self.driver.guard(lambda: self.driver.subject.shard_layer(tensors, config, ranks=ranks))
        if not (isinstance(returned, Sequence) and len(returned) == ranks and all(map(_is_shard, returned))):
            raise Violation(
                f"shard_layer must return {ranks} pairs (weights, MLAConfig), got {type(returned).__name__}"
            )
        for rank, (_, own) in enumerate(returned):
            if own.num_heads * ranks != config.num_heads:
                raise Violation(f"rank {rank} must have {config.num_heads // ranks} heads, got {own.num_heads}")
        return [Shard(self.driver, rank, *shard) for rank, shard in enumerate(returned)]

    def gathered(self, gradients: Sequence[Mapping[str, torch.Tensor]], config: MLAConfig) -> dict[str, Result]:
        """Gradients of the whole layer; Violation unless their names and shapes are those of its weights."""
        returned = self.driver.guard(lambda: self.driver.subject.gather_gradients(gradients, config=config))
        shapes = weight_shapes(config)
        if not (isinstance(returned, Mapping) and set(returned) == set(shapes)):
            raise Violation(f"gather_gradients must return gradients of {', '.join(shapes)}")
        return {name: self.driver.result(returned[name], f"gradient of {name}", shapes[name]) for name in shapes}


def _is_shard(returned: Any) -> bool:
    return (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[0], Mapping)
        and isinstance(returned[1], MLAConfig)
    )


REGIMES: tuple[Regime, ...] = (
    *layer.REGIMES,
    *layer.DECODING,
    ("one rank", lambda case: case.ranks == 1),
    ("ranks", lambda case: case.ranks > 1),
)
