"""Block-quantised weights of the PyTorch subjects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch_steps import wide


class TorchBlockWeights:
    """A scale for each element, looked up by its row and column."""

    def dequantize_weight(
        self, codes: Tensor, scales: Tensor, *, block_size: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Codes [out, in] in float8_e4m3fn times the scales of their blocks, in ``dtype``."""
        return self.scaled_codes(codes.to(wide(dtype)), scales.to(wide(dtype)), block_size).to(dtype)

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        rows, columns = (self.blocks(n, size, codes) for n, size in zip(codes.shape, block_size, strict=True))
        return codes * scales[rows[:, None], columns]

    def blocks(self, n: int, size: int, codes: Tensor) -> Tensor:
        """The block of each of n rows or columns, [n]."""
        return torch.arange(n, device=codes.device) // size


class TorchBlockWeightsByBlock(TorchBlockWeights):
    """Whole blocks at once, after padding."""

    def scaled_codes(self, codes: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
        (rows, columns), (height, width) = codes.shape, block_size
        padded = F.pad(codes, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [blocks, height, blocks, width]
        scaled: Tensor = (blocks * scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        return scaled[:rows, :columns]
