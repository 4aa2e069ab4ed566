"""Differentiates a layer of a subject: what a backward pass leaves in the gradients of its weights and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_spec.operations.backward_driver import BackwardDriver, Gradients, Tensors
from mla_spec.operations.layer_gradients import LayerGradientInputs
from mla_spec.subjects.driver import Driver


class LayerGradientDriver:
    """A driver's subject, of which each backward pass gets a layer of its own."""

    def __init__(self, driver: Driver) -> None:
        self.driver = BackwardDriver.of(driver)

    def tensors(self, inputs: LayerGradientInputs) -> Tensors:
        """The weights by name, "hidden", "positions" and "out_grad"."""
        layer, tensor = inputs.layer, self.driver.tensor
        return {
            **{name: tensor(w) for name, w in layer.weights.items()},
            "hidden": tensor(layer.hidden),
            "positions": self.driver.integers(layer.positions, torch.int64),
            "out_grad": tensor(inputs.out_grad),
        }

    def gradients(
        self, inputs: LayerGradientInputs, tensors: Tensors | None = None, names: Sequence[str] = ()
    ) -> Gradients:
        """Gradients of "hidden" and of the weights by name, or only those of ``names``; the others require none.

        ``tensors`` replace those built from ``inputs``.
        """
        tensors = tensors or self.tensors(inputs)
        names = names or ("hidden", *inputs.layer.weights)
        leaves = tensors | {name: tensors[name].detach().requires_grad_() for name in names}
        weights = {name: leaves[name] for name in inputs.layer.weights}
        layer = self.driver.guard(lambda: self.driver.subject.layer(weights, inputs.layer.config))
        out = self.driver.guard(lambda: layer.prefill(leaves["hidden"], leaves["positions"]))
        self.driver.result(out, "prefill output", inputs.layer.hidden.shape)
        return self.driver.gradients("layer", leaves, names, out, None)
