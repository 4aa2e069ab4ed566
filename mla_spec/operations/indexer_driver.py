"""Calls ``project_indexer`` of a subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mla_spec.operations.project_indexer import ProjectIndexerInputs
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result
from mla_spec.subjects.violation import Violation

Tensors = dict[str, torch.Tensor]
WEIGHT = "weights."
"""What the names of weights begin with among the tensor arguments."""


@dataclass(frozen=True)
class IndexerOperands:
    """What ``project_indexer`` returned."""

    q: Result  # [tokens, h, d]
    k: Result  # [tokens, d]
    weights: Result  # [tokens, h]

    def parts(self) -> dict[str, Result]:
        """All of it by name."""
        return {"q": self.q, "k": self.k, "weights": self.weights}


class ProjectIndexerDriver:
    """A driver's subject with ``project_indexer``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def tensors(self, inputs: ProjectIndexerInputs) -> Tensors:
        """The tensor arguments by name."""
        driver = self.driver
        weights = {WEIGHT + name: driver.tensor(w) for name, w in inputs.weights.items()}
        return {
            "hidden": driver.tensor(inputs.hidden),
            "q_latent": driver.tensor(inputs.q_latent),
            "positions": driver.integers(inputs.positions, torch.int64),
            **weights,
        }

    def raw(self, inputs: ProjectIndexerInputs, tensors: Tensors) -> tuple[Any, ...]:
        """What ``project_indexer`` returned, unread."""
        weights = {name.removeprefix(WEIGHT): x for name, x in tensors.items() if name.startswith(WEIGHT)}
        arguments = (tensors["hidden"], tensors["q_latent"], tensors["positions"], weights, inputs.config)
        returned = self.driver.guard(lambda: self.driver.subject.project_indexer(*arguments))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise Violation(f"project_indexer must return (q, k, weights), got {type(returned).__name__}")
        return returned

    def call(self, inputs: ProjectIndexerInputs, tensors: Tensors | None = None) -> IndexerOperands:
        """The operands. ``tensors`` replace those built from ``inputs``."""
        q, k, weights = self.raw(inputs, tensors or self.tensors(inputs))
        tokens, h, d = len(inputs.hidden), inputs.config.index_n_heads, inputs.config.index_head_dim
        wide = TORCH_DTYPES["float64" if self.driver.dtype == "float64" else "float32"]
        return IndexerOperands(
            self.driver.result(q, "q", (tokens, h, d)),
            self.driver.result(k, "k", (tokens, d)),
            self.driver.result(weights, "weights", (tokens, h), (wide,)),
        )
