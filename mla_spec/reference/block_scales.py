"""Weights in float8_e4m3fn with one float32 scale per block, as DeepSeek-V3's checkpoints store them.

A weight [out, in] is cut into blocks of ``block_size`` rows and columns, 128 by 128 there; where that does not divide the
weight, the last blocks are smaller. Element (i, j) is

    w_ij = code_ij · scale[i // rows of a block, j // columns of a block]

The checkpoints call the scales ``weight_scale_inv``, since they are what codes are multiplied by; the configuration gives
``block_size`` as ``weight_block_size``. kv_a_proj_with_mqa has 576 rows, so that its last block of rows has 64.

Sources: DeepSeek-V3 repository, README_WEIGHTS.md, "FP8 Weight Documentation", and inference/kernel.py, ``weight_dequant``.
"""

from __future__ import annotations

import numpy as np

from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, IntArray

CODE = "float8_e4m3fn"
BlockSize = tuple[int, int]
"""Rows and columns of a block."""


def scales_shape(shape: tuple[int, int], block_size: BlockSize) -> tuple[int, int]:
    """How many blocks of rows and of columns a weight of this shape has."""
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def block_of(shape: tuple[int, int], block_size: BlockSize) -> tuple[IntArray, IntArray]:
    """The block of rows of each row [out, 1], and the block of columns of each column [in]."""
    return np.arange(shape[0])[:, None] // block_size[0], np.arange(shape[1]) // block_size[1]


def dequantise_weight(codes: Array, scales: Array, block_size: BlockSize) -> Array:
    """The exact weight: float64 holds every product of a code and a float32 scale.

    Args:
        codes: [out, in], numbers of float8_e4m3fn.
        scales: [blocks of rows, blocks of columns], numbers of float32.

    Raises:
        ValueError: not one scale per block.
    """
    rows, columns = codes.shape
    if scales.shape != scales_shape((rows, columns), block_size):
        want = [*scales_shape((rows, columns), block_size)]
        raise ValueError(
            f"a weight {[rows, columns]} in blocks of {block_size} has scales {want}, got {[*scales.shape]}"
        )
    return codes * scales[block_of((rows, columns), block_size)]


def quantise_weight(weight: Array, block_size: BlockSize, *, power_of_two: bool = False) -> tuple[Array, Array]:
    """Codes and scales of a weight: in each block the least scale with which no code saturates, and the nearest codes.

    Args:
        weight: [out, in], finite.
        power_of_two: round scales up to powers of two, as DeepSeek-V3.1's checkpoints have them.

    Returns:
        (codes [out, in], scales [blocks of rows, blocks of columns]); the scale of a block of zeros is 1.
    """
    rows, columns = weight.shape
    blocks = block_of((rows, columns), block_size)
    largest = np.zeros(scales_shape((rows, columns), block_size))
    np.maximum.at(largest, blocks, np.abs(weight))
    scales = np.where(largest > 0, largest / format_of(CODE).max_finite, 1.0)
    scales = np.exp2(np.ceil(np.log2(scales))) if power_of_two else round_to(scales, "float32")
    return round_to(weight / scales[blocks], CODE), scales
