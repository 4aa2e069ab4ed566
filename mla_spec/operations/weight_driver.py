"""Calls ``dequantize_weight`` of a subject."""

from __future__ import annotations

from typing import Any

import torch

from mla_spec.operations.dequantize_weight import QuantisedLayerInputs, WeightInputs
from mla_spec.reference.block_scales import CODE
from mla_spec.reference.formats import encode
from mla_spec.subjects.driver import (
    TORCH_DTYPES,
    Driver,
    LayerDriver,
    Result,
)

Tensors = dict[str, torch.Tensor]


class WeightDriver:
    """A driver's subject with that operation."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def tensors(self, inputs: WeightInputs) -> Tensors:
        """The tensor arguments by name; the codes as bytes."""
        codes = torch.from_numpy(encode(inputs.codes, CODE)).to(self.driver.device)
        return {"codes": codes, "scales": torch.from_numpy(inputs.scales).to(self.driver.device, torch.float32)}

    def raw(self, inputs: WeightInputs, tensors: Tensors) -> Any:
        """What ``dequantize_weight`` returned, unread."""
        return self.driver.guard(
            lambda: self.driver.subject.dequantize_weight(
                tensors["codes"].view(torch.float8_e4m3fn),
                tensors["scales"],
                block_size=inputs.block_size,
                dtype=TORCH_DTYPES[self.driver.dtype],
            )
        )

    def call(self, inputs: WeightInputs, tensors: Tensors | None = None) -> Result:
        """The weight [out, in]. ``tensors`` replace those built from ``inputs``."""
        weight = self.raw(inputs, tensors or self.tensors(inputs))
        rows, columns = inputs.codes.shape
        return self.driver.result(weight, "weight", (rows, columns))

    def layer(self, inputs: QuantisedLayerInputs) -> LayerDriver:
        """A layer of the weights as the subject dequantised them."""
        driver, config = self.driver, inputs.layer.config
        tensors = {name: driver.tensor(w) for name, w in inputs.layer.weights.items() if name not in inputs.quantised}
        for name, each in inputs.quantised.items():
            tensors[name] = self.raw(each, self.tensors(each))
            driver.result(tensors[name], name, each.codes.shape)
        return LayerDriver(driver, driver.guard(lambda: driver.subject.layer(tensors, config)), tensors)
