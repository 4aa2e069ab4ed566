"""Faults reported of decode or of a whole engine, planted where pages of quantised rows are written and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.adapters.pytorch_quantised import power_of_two_above
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.cache_layout import CacheLayout

NEAREST = "test_codes_are_the_nearest"
PRODUCT = "test_dequantised_rows_are_code_times_scale"


@planted(
    "I2-quantize_cache",
    source=("https://github.com/vllm-project/vllm/pull/49435",),
    symptom="writer and reader use different scales",
    shows_when="a scale is no power of two",
    killed_by=(NEAREST,),
)
class DividesByPowerOfTwo(TorchExplicit):
    """Codes are made with the scale rounded up to a power of two, and the scale is stored as it was."""

    def codes(self, groups: Tensor, scales: Tensor, layout: CacheLayout) -> Tensor:
        return super().codes(groups, power_of_two_above(scales), layout)


@planted(
    "F19-quantize_cache",
    source=("https://github.com/sgl-project/sglang/pull/38666",),
    symptom="a benchmark score of 0.34",
    shows_when="a page holds more than one token, and rows hold the rope part among other bytes",
    killed_by=(NEAREST,),
)
class RopePartWrittenPastRow(TorchExplicit):
    """The rope part, which the row ends with, is written once more behind the row: over the next one's first bytes."""

    def paged(self, x: Tensor, page_size: int) -> Tensor:
        rows = x.clone()
        if rows.shape[-1] > 2 * 128:  # rows of latents, not scales or keys of an indexer
            rows[1:, :128] = x[:-1, -128:]
        return super().paged(rows, page_size)


@planted(
    "F25-quantize_cache",
    source=("https://github.com/vllm-project/vllm/issues/48611", "https://github.com/vllm-project/vllm/pull/48642"),
    symptom="wrong keys and values",
    shows_when="the format is fp8_ds_mla, and a page holds more than one token",
    killed_by=(NEAREST,),
)
class RowsWritten576Apart(TorchExplicit):
    """Rows of 656 bytes are written every 576 of a page, the last one whole."""

    def paged(self, x: Tensor, page_size: int) -> Tensor:
        pages = super().paged(x, page_size)
        if x.shape[-1] != 656:
            return pages
        overlapping = torch.zeros_like(pages)
        for row in range(page_size):
            overlapping[:, 576 * row :][:, :656] = pages[:, 656 * row :][:, :656]
        return overlapping


@planted(
    "I1-dequantize_cache",
    source=("https://github.com/vllm-project/vllm/pull/37054",),
    symptom="gibberish",
    shows_when="the scale of the tensor is not 1",
    killed_by=(PRODUCT,),
)
class ScaledAsKeyAndAsValue(TorchExplicit):
    """A row is keys and values at once, and is multiplied by the scale of both."""

    def dequantize_cache(self, pages: Tensor, *, tensor_scale: float, **options: Any) -> Tensor:
        return super().dequantize_cache(pages, tensor_scale=tensor_scale, **options) * tensor_scale


@planted(
    "I5-dequantize_cache",
    source=("https://github.com/NVIDIA/TensorRT-LLM/pull/16916",),
    symptom="74.5 points instead of 96.4, fewer with length",
    shows_when="the scale of the tensor is not 1",
    killed_by=(PRODUCT,),
)
class ReadsWithoutScale(TorchExplicit):
    """The scale does not reach the reader, which takes 1."""

    def dequantize_cache(self, pages: Tensor, *, tensor_scale: float, **options: Any) -> Tensor:
        return super().dequantize_cache(pages, tensor_scale=1.0, **options)


@planted(
    "I11-dequantize_cache",
    source=("https://github.com/vllm-project/vllm/pull/36297",),
    symptom="none in its test, which inverted the scale as well",
    shows_when="the scale is not 1",
    killed_by=(PRODUCT,),
)
class DividesByScale(TorchAbsorbed):
    """Codes are divided by the scales that they were made with."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        return 1 / super().read_scales(raw, layout)


@planted(
    "F15-dequantize_cache",
    source=("https://github.com/ROCm/aiter/pull/2954",),
    symptom="gathered keys are corrupt",
    shows_when="the bytes of a page are no multiple of 16",
    killed_by=(PRODUCT,),
)
class PagesStartAtMultiplesOf16(TorchExplicit):
    """Pages are read in vectors of 16 bytes, so that each begins at the multiple of 16 below its address."""

    def dequantize_cache(self, pages: Tensor, **options: Any) -> Tensor:
        memory, size = pages.contiguous().flatten(), pages.shape[1]
        starts = torch.arange(len(pages), device=pages.device) * size // 16 * 16
        return super().dequantize_cache(memory[starts[:, None] + torch.arange(size, device=pages.device)], **options)


@planted(
    "X-65535-tokens-quantised",
    symptom="the end of a large batch of prompts is forgotten",
    shows_when="more than 65535 tokens are written at once",
    killed_by=("test_many_tokens_are_quantised_as_few",),
)
class TokensQuantisedBy65535Blocks(TorchAbsorbed):
    """A grid has a block for each token along its second axis, and 65535 blocks at most."""

    def quantize_cache(self, rows: Tensor, **options: Any) -> Tensor:
        token = torch.arange(len(rows), device=rows.device)
        return super().quantize_cache(rows.masked_fill((token >= 65535)[:, None], 0.0), **options)


@planted(
    "X-tokens-numbered-in-16-bits",
    symptom="the end of a long cached prompt is read as its beginning",
    shows_when="more than 65536 tokens are dequantised at once",
    killed_by=("test_many_pages_are_dequantised_as_few",),
)
class TokensNumberedIn16Bits(TorchAbsorbed):
    """The number of a token among those that are read has 16 bits without sign; rows of later ones are not written."""

    def dequantize_cache(self, pages: Tensor, **options: Any) -> Tensor:
        rows = super().dequantize_cache(pages, **options)
        late = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(rows.shape[:2]) >= 2**16
        return rows.masked_fill(late[..., None, None], 0.0)
