"""Cases of ``dequantize_weight``, and of layers whose weights went through it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.operations.layer import LayerCase, LayerInputs
from mla_spec.reference.block_scales import CODE, BlockSize, dequantise_weight, quantise_weight, scales_shape
from mla_spec.reference.formats import decode_bits, format_of, round_to
from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class WeightInputs:
    """Arguments of ``dequantize_weight``, and the exact weight."""

    codes: Array  # [out, in], numbers of float8_e4m3fn
    scales: Array  # [blocks of rows, blocks of columns], numbers of float32
    block_size: BlockSize
    weight: Array  # [out, in]


@dataclass(frozen=True, kw_only=True)
class WeightCase(Case):
    """A weight of any finite codes, 0 and -0 among them, whose blocks have scales of very different size.

    ``power_of_two``: all scales are powers of two.
    """

    kind = "weight"
    rows: int = 1
    columns: int = 1
    block_rows: int = 1
    block_columns: int = 1
    power_of_two: bool = False

    @property
    def block_size(self) -> BlockSize:
        return self.block_rows, self.block_columns

    def build(self) -> WeightInputs:
        """The inputs."""
        rng = self.generator()
        shape = self.rows, self.columns
        codes = decode_bits(rng.integers(0, format_of(CODE).largest_pattern + 1, shape), CODE)
        codes *= rng.choice([-1.0, 1.0], shape)
        # in the middle of the dtype's range, so that no product leaves it
        exponents = (-8, 6) if self.dtype == "float16" else (-30, 30)
        blocks = scales_shape(shape, self.block_size)
        scales = np.ldexp(1.0, rng.integers(*exponents, blocks))
        if not self.power_of_two:
            scales = round_to(scales * rng.uniform(1, 2, blocks), "float32")
        return WeightInputs(codes, scales, self.block_size, dequantise_weight(codes, scales, self.block_size))


@dataclass(frozen=True)
class QuantisedLayerInputs:
    """A layer, and those of its weights that are matrices as codes and scales; the weights are their exact values."""

    quantised: dict[str, WeightInputs]
    layer: LayerInputs


@dataclass(frozen=True, kw_only=True)
class QuantisedLayerCase(LayerCase):
    """A layer whose matrices were quantised with scales that are powers of two, so that the dtype holds their values."""

    kind = "quantised-layer"
    block_rows: int = 1
    block_columns: int = 1

    def build_quantised(self) -> QuantisedLayerInputs:
        """The inputs."""
        inputs = self.build()
        matrices = {name: self._quantised(w) for name, w in inputs.weights.items() if w.ndim == 2}
        weights = inputs.weights | {name: each.weight for name, each in matrices.items()}
        return QuantisedLayerInputs(matrices, replace(inputs, weights=weights))

    def _quantised(self, weight: Array) -> WeightInputs:
        block_size = self.block_rows, self.block_columns
        codes, scales = quantise_weight(weight, block_size, power_of_two=True)
        exact = dequantise_weight(codes, scales, block_size)
        codes = np.where(round_to(exact, self.dtype) == exact, codes, 0.0)  # subnormals of float16
        return WeightInputs(codes, scales, block_size, dequantise_weight(codes, scales, block_size))
