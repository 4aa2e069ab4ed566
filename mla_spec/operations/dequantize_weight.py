"""``dequantize_weight``: a weight from its codes and the scales of its blocks.

codes are float8_e4m3fn [out, in] and scales float32 [blocks of rows, blocks of columns], the ``weight_scale_inv`` of
checkpoints. ``block_size`` is (rows, columns) of a block; the last blocks may be smaller
(``mla_spec.reference.block_scales``). Returned is the weight [out, in] in ``dtype``: code times scale, computed in float32
or better (float64 for float64), and rounded to the dtype once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import dequantised_error
from mla_spec.operations.case import Case
from mla_spec.operations.layer import LayerCase, LayerDriver, LayerInputs
from mla_spec.operations.operation import Answers, Operation, Within
from mla_spec.reference.block_scales import CODE, BlockSize, dequantise_weight, quantise_weight, scales_shape
from mla_spec.reference.formats import decode_bits, format_of, round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed


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

    ``power_of_two``: all scales are powers of two. ``small``: they are those of weights of about 0.01, in which float16 has few
    bits.
    """

    kind = "weight"
    optional = ("small",)
    rows: int = 1
    columns: int = 1
    block_rows: int = 1
    block_columns: int = 1
    power_of_two: bool = False
    small: bool = False

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
        exponents = (-17, -12) if self.small else (-8, 6) if self.dtype == "float16" else (-30, 30)
        blocks = scales_shape(shape, self.block_size)
        scales = np.ldexp(1.0, rng.integers(*exponents, blocks))
        if not self.power_of_two:
            scales = round_to(scales * rng.uniform(1, 2, blocks), "float32")
        return WeightInputs(codes, scales, self.block_size, dequantise_weight(codes, scales, self.block_size))


def _partial(case: Any) -> bool:
    """Whether the last blocks of rows or columns are smaller than the others."""
    return bool(case.rows % case.block_rows or case.columns % case.block_columns)


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


def expected(inputs: WeightInputs, profile: Profile, supports: Supports) -> Answers:
    """Code times scale, rounded to the dtype."""
    return (Within(inputs.weight, dequantised_error(inputs.weight, profile)),)


def _distant(case: WeightCase) -> WeightInputs:
    return replace(case, rows=3, block_rows=1).build()


OPERATION = Operation(
    name="dequantize_weight",
    sizes=("weight_block_sizes",),
    contract=__doc__,
    case=WeightCase,
    arguments=(
        Argument("codes", "[out, in]", "codes", far=True),
        Argument("scales", "[blocks of rows, blocks of columns]", "float32", far=True),
    ),
    keywords=("block_size", "dtype"),
    outputs=(Output("weight", "[out, in]", lambda inputs: inputs.codes.shape),),
    expected=expected,
    views={
        "codes as a slice of wider rows": viewed(slice_of_wider, "codes", -1, ROW_PADDING),
        "codes stored column by column": viewed(transposed, "codes", 0, 1),
        "scales as a slice of wider rows": viewed(slice_of_wider, "scales", -1, 3),
        "scales stored column by column": viewed(transposed, "scales", 0, 1),
    },
    regimes=(
        ("whole blocks", lambda case: not _partial(case)),
        ("smaller last blocks", lambda case: _partial(case)),
        ("several blocks", lambda case: case.rows > case.block_rows and case.columns > case.block_columns),
        ("published block size", lambda case: case.block_size == (128, 128)),
        ("powers of two", lambda case: case.power_of_two),
        ("any scales", lambda case: not case.power_of_two),
    ),
    others=lambda case: (replace(case, seed=case.seed + 1).build(),),
    distant=_distant,
)


def layer_of_dequantised(driver: Driver, inputs: QuantisedLayerInputs) -> LayerDriver:
    """A layer of the weights as the driver's subject dequantised them."""
    tensors = {name: driver.tensor(w) for name, w in inputs.layer.weights.items() if name not in inputs.quantised}
    for name, each in inputs.quantised.items():
        (tensors[name],) = driver.raw(OPERATION, each, driver.tensors(OPERATION, each))
        driver.result(tensors[name], name, each.codes.shape)
    made: LayerDriver = there(LayerDriver.holding, driver, tensors, inputs.layer.config)
    return made
