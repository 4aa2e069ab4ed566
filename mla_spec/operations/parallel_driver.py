"""Calls ``shard_layer`` and ``gather_gradients`` of a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver, LayerDriver, Result
from mla_spec.subjects.violation import Violation


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
        made = self.driver.guard(lambda: self.driver.subject.layer(self._weights, self.config))
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
