"""Faults of block-quantised weights: which block an element is in, and what its scale does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.config import MLAConfig

PRODUCT = "test_dequantised_weight_is_code_times_scale_of_its_block"
LAYER = "test_layer_of_dequantised_weights"


@planted(
    "C5",
    source=("https://github.com/NVIDIA/TensorRT-LLM/pull/14793",),
    symptom="a benchmark score drops by five points",
    shows_when="blocks do not divide the weight, as those of 128 rows do not divide 576",
    killed_by=(PRODUCT, LAYER),
)
class BlocksOfEqualSize(TorchExplicit):
    """The size of a block is taken to be the weight's over the number of its blocks, rounded up: 116 of 576 rows."""

    def blocks(self, n: int, size: int, codes: Tensor) -> Tensor:
        return super().blocks(n, math.ceil(n / math.ceil(n / size)), codes)


@planted(
    "C6",
    source=(
        "https://github.com/ModelTC/LightLLM/pull/744",
        "https://github.com/ModelTC/LightLLM/commit/808d8325f",
    ),
    symptom="absorbed weights are wrong after dequantising",
    shows_when="a weight has more blocks of rows than of columns, or fewer",
    killed_by=(PRODUCT, LAYER),
)
class ScalesInShapeOfWeight(TorchAbsorbed):
    """Scales are given the shape of the weight as it lies transposed for the product, not that of their own."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        return super().scaled_codes(codes, scales.reshape(scales.shape[::-1]).T, block_size)


@planted(
    "C4-dequantize_weight",
    source=("https://github.com/vllm-project/vllm/pull/56773",),
    symptom="garbage from attention",
    shows_when="always",
    killed_by=(PRODUCT, LAYER),
)
class PackedCodesReadRowMajor(TorchAbsorbed):
    """Codes were packed for another kernel, and are dequantised as if they were not."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        return super().scaled_codes(codes.T.reshape(codes.shape), scales, block_size)


@planted(
    "X-block-scales-transposed",
    symptom="right for weights of one block, or with equal scales; else wrong",
    shows_when="several blocks of rows and of columns, as many of each",
    killed_by=(PRODUCT,),
)
class ScalesTransposed(TorchAbsorbed):
    """The scales of a square grid of blocks are looked up by column and row."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        square = scales.shape[0] == scales.shape[1]
        return super().scaled_codes(codes, scales.T if square else scales, block_size)


@planted(
    "X-last-block-has-scale-of-neighbour",
    symptom="the rope rows of kv_a_proj_with_mqa are off by a factor",
    shows_when="the last block of rows is not whole",
    killed_by=(PRODUCT, LAYER),
)
class LastBlockHasScaleOfNeighbour(TorchExplicit):
    """Blocks are counted by whole ones, so that the rest has the scale of the last whole block."""

    def blocks(self, n: int, size: int, codes: Tensor) -> Tensor:
        return super().blocks(n, size, codes).clamp(max=max(n // size - 1, 0))


@planted(
    "I11-dequantize_weight",
    source=("https://github.com/vllm-project/vllm/pull/36297",),
    symptom="none in its test, which inverted the scale as well",
    shows_when="the scale is not 1",
    killed_by=(PRODUCT, LAYER),
)
class DividedByScaleInv(TorchExplicit):
    """Codes are divided by ``weight_scale_inv``, whose name says that it is the inverse of what divides."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        return super().scaled_codes(codes, 1 / scales, block_size)


@planted(
    "I5-dequantize_weight",
    source=("https://github.com/NVIDIA/TensorRT-LLM/pull/16916",),
    symptom="74.5 points instead of 96.4, fewer with length",
    shows_when="the scale is not 1",
    killed_by=(PRODUCT, LAYER),
)
class WithoutScales(TorchExplicit):
    """The scales do not reach the kernel, which takes 1."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        return super().scaled_codes(codes, torch.ones_like(scales), block_size)


@planted(
    "I2-dequantize_weight",
    source=("https://github.com/vllm-project/vllm/pull/49435",),
    symptom="writer and reader use different scales",
    shows_when="a scale is no power of two",
    killed_by=(PRODUCT,),
)
class ScalesInBfloat16(TorchAbsorbed):
    """Scales are rounded to bfloat16 when they are read."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        return super().scaled_codes(codes, scales.bfloat16().to(scales.dtype), block_size)


@planted(
    "X-block-codes-ignore-strides",
    symptom="wrong only where a weight is a slice of a fused one",
    shows_when="codes are no contiguous tensor",
    killed_by=("test_dequantize_weight_reads_strides",),
)
class CodesIgnoreStrides(TorchAbsorbed):
    """Codes are taken to follow each other."""

    def dequantize_weight(self, codes: Tensor, scales: Tensor, **options: Any) -> Tensor:
        return super().dequantize_weight(as_if_contiguous(codes), scales, **options)


@planted(
    "X-block-scales-inverted-in-place",
    symptom="a weight that is loaded a second time is garbage",
    shows_when="the scales are used again",
    killed_by=("test_dequantize_weight_does_not_modify_its_inputs",),
)
class ScalesInvertedInPlace(TorchExplicit):
    """The checkpoint's scales are replaced by those that the product takes."""

    def dequantize_weight(self, codes: Tensor, scales: Tensor, **options: Any) -> Tensor:
        weight = super().dequantize_weight(codes, scales, **options)
        scales.reciprocal_()
        return weight


@planted(
    "X-block-scales-of-first-weight",
    symptom="the first layer is right, later ones are not",
    shows_when="a second weight has the shape of the first",
    killed_by=("test_dequantize_weight_calls_are_independent",),
)
class ScalesOfFirstWeight(TorchAbsorbed):
    """Scales are prepared once for each shape."""

    def __init__(self) -> None:
        self.known: dict[Any, Tensor] = {}

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        known = self.known.setdefault((codes.shape, block_size, scales.dtype), scales)
        return super().scaled_codes(codes, known, block_size)


class WeightsColumnByColumn(TorchAbsorbed):
    """Correct: dequantised weights lie in memory column by column, as the products of a layer read them."""

    name = "torch-column-major"

    def dequantize_weight(self, codes: Tensor, scales: Tensor, **options: Any) -> Tensor:
        return super().dequantize_weight(codes, scales, **options).T.contiguous().T

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        return super().absorb(self.row_by_row(kv_b_proj), config=config)

    def row_by_row(self, weight: Tensor) -> Tensor:
        return weight.contiguous()


@planted(
    "X-dequantised-weight-read-row-major",
    symptom="garbage with quantised weights, while each weight is right",
    shows_when="always",
    killed_by=(LAYER,),
)
class AbsorbsRowMajor(WeightsColumnByColumn):
    """What was dequantised column by column is absorbed as if it lay row by row."""

    def row_by_row(self, weight: Tensor) -> Tensor:
        return torch.as_strided(weight, weight.shape, (weight.shape[1], 1))
