"""Faults of reading quantised caches, and of decoding from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.adapters.pytorch_quantised import power_of_two_above
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.cache_layout import CacheLayout, layout_of

PRODUCT = "test_dequantised_rows_are_code_times_scale"
UNUSED = "test_dequantising_ignores_unused_bytes"
STRIDES = "test_dequantize_cache_reads_strides"
CALLS = "test_dequantize_cache_calls_are_independent"
DECODE = "test_quantised_decode_agrees_with_reference"
DECODE_UNUSED = "test_quantised_decode_ignores_unused_bytes"
DECODE_MOVED = "test_quantised_page_relabelling_changes_nothing"
DECODE_STRIDES = "test_decode_quantized_reads_strides"
DECODE_CALLS = "test_decode_quantized_calls_are_independent"
DECODE_INPUTS = "test_decode_quantized_does_not_modify_its_inputs"

Decoded = tuple[Tensor, Tensor | None]


@planted(
    "F25",
    source=("https://github.com/vllm-project/vllm/issues/48611", "https://github.com/vllm-project/vllm/pull/48642"),
    symptom="wrong keys and values",
    shows_when="the format is fp8_ds_mla, and a page holds more than one token",
    killed_by=(PRODUCT, DECODE),
)
class RowsOf576Bytes(TorchExplicit):
    """Rows of 656 bytes are taken to follow each other every 576."""

    def segment(self, pages: Tensor, layout: CacheLayout, page_size: int, name: str) -> Tensor:
        if layout.name == "fp8_ds_mla":
            rows = pages.as_strided((len(pages), page_size, 656), (pages.stride(0), 576, 1))
            pages = rows.reshape(len(pages), -1)
        return super().segment(pages, layout, page_size, name)


@planted(
    "I2",
    source=("https://github.com/vllm-project/vllm/pull/49435",),
    symptom="writer and reader use different scales",
    shows_when="a scale is no power of two",
    killed_by=(PRODUCT, DECODE),
)
class ScalesReadAsBfloat16(TorchExplicit):
    """Scales are rounded to bfloat16 when they are read."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        return super().read_scales(raw, layout).bfloat16().float()


@planted(
    "I2-decode_quantized",
    source=("https://github.com/vllm-project/vllm/pull/49435",),
    symptom="writer and reader use different scales",
    shows_when="a scale is no power of two",
    killed_by=(DECODE,),
)
class ScalesReadAsPowersOfTwo(TorchExplicit):
    """Scales are rounded up to powers of two when they are read."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        return power_of_two_above(super().read_scales(raw, layout))


@planted(
    "X90",
    symptom="all tokens of a page but the first are off by a factor",
    shows_when="tokens of a page have different scales",
    killed_by=(PRODUCT, DECODE),
)
class ScaleOfFirstToken(TorchExplicit):
    """All tokens of a page are read with the scales of its first."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        scales = super().read_scales(raw, layout)
        return scales[:, :1].expand(scales.shape).contiguous()


@planted(
    "X91",
    symptom="tokens are read with the scales of others",
    shows_when="the format is deepseek_v4, and a page holds more than one token",
    killed_by=(PRODUCT,),
)
class ScalesWithoutPadding(TorchExplicit):
    """Seven scales of a token are taken to be followed by those of the next, without the byte between."""

    def segment(self, pages: Tensor, layout: CacheLayout, page_size: int, name: str) -> Tensor:
        if name != "scales" or not layout.scale_padding:
            return super().segment(pages, layout, page_size, name)
        scales = super().segment(pages, replace(layout, scale_padding=0), page_size, name)
        return F.pad(scales, (0, layout.scale_padding))


@planted(
    "X92",
    symptom="groups are read with the scales of others",
    shows_when="the format is nvfp4_ds_mla",
    killed_by=(PRODUCT,),
)
class ScalesNotTransposed(TorchExplicit):
    """Scales are taken to lie in the order of their groups."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        return super().read_scales(raw, replace(layout, transposed=None))


@planted(
    "X93",
    symptom="neighbouring channels are exchanged",
    shows_when="codes have four bits",
    killed_by=(PRODUCT, DECODE),
)
class ReadsHighHalfFirst(TorchExplicit):
    """Of two codes the first is taken from the high half of the byte."""

    def unpaired(self, raw: Tensor) -> Tensor:
        return super().unpaired(raw << 4 | raw >> 4)


@planted(
    "X94",
    symptom="whole pages vanish",
    shows_when="a page is not full, and what follows its tokens is NaN",
    killed_by=(UNUSED, DECODE_UNUSED),
)
class NaNClearsPage(TorchExplicit):
    """A page with a scale that is NaN is read as zeros."""

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        scales = super().read_scales(raw, layout)
        return scales.masked_fill(scales.isnan().any(dim=(1, 2), keepdim=True), 0.0)


@planted(
    "X-padding-read-as-scale",
    symptom="a page that is used again is read wrongly, a fresh one is not",
    shows_when="the padding behind the scales of a token is not 0",
    killed_by=(UNUSED,),
)
class PaddingReadAsScale(TorchExplicit):
    """A whole word of scales is loaded, and a token whose padding is not 0 is taken to have none."""

    def dequantize_cache(self, pages: Tensor, *, format: str, page_size: int, **options: Any) -> Tensor:
        rows = super().dequantize_cache(pages, format=format, page_size=page_size, **options)
        layout = layout_of(format)
        if not layout.scale_padding:
            return rows
        padding = self.segment(pages, layout, page_size, "scales")[..., -layout.scale_padding :]
        return rows.masked_fill((padding != 0).any(dim=-1)[..., None, None], 0.0)

    def decode_quantized(self, *args: Any, **options: Any) -> Decoded:
        return TorchExplicit().decode_quantized(*args, **options)


@planted(
    "X95",
    symptom="garbage from a pool that layers share",
    shows_when="pages lie further apart than their bytes",
    killed_by=(STRIDES, DECODE_STRIDES),
)
class PagesIgnoreStrides(TorchExplicit):
    """Pages are taken to follow each other."""

    def dequantize_cache(self, pages: Tensor, **options: Any) -> Tensor:
        return super().dequantize_cache(as_if_contiguous(pages), **options)

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        return super().named_pages(as_if_contiguous(pages), block_table)


@planted(
    "X96",
    symptom="the first answer is right, later ones are not",
    shows_when="a second call has pages of the same shape",
    killed_by=(CALLS, DECODE_CALLS),
)
class ScalesOfFirstCall(TorchExplicit):
    """Scales are read once for each shape."""

    def __init__(self) -> None:
        self.known: dict[Any, Tensor] = {}

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        return self.known.setdefault((layout.name, raw.shape), super().read_scales(raw, layout))


@planted(
    "I1",
    source=("https://github.com/vllm-project/vllm/pull/37054",),
    symptom="gibberish",
    shows_when="the scale of the tensor is not 1",
    killed_by=(DECODE,),
)
class OutputScaledTwice(TorchExplicit):
    """The output is multiplied by the scale of the values, which the rows carry already."""

    def decode_quantized(self, *tensors: Tensor, tensor_scale: float, **options: Any) -> Decoded:
        out, lse = super().decode_quantized(*tensors, tensor_scale=tensor_scale, **options)
        return out * tensor_scale, lse


@planted(
    "I5",
    source=("https://github.com/NVIDIA/TensorRT-LLM/pull/16916",),
    symptom="74.5 points instead of 96.4, fewer with length",
    shows_when="the scale of the tensor is not 1",
    killed_by=(DECODE,),
)
class DecodesWithoutScale(TorchExplicit):
    """The scale does not reach the kernel, which takes 1."""

    def decode_quantized(self, *tensors: Tensor, tensor_scale: float, **options: Any) -> Decoded:
        return super().decode_quantized(*tensors, tensor_scale=1.0, **options)


class ScalesKnownFormats(TorchExplicit):
    """Correct: the scale of the tensor is handed on with a format that is known to have one."""

    name = "torch-known-formats"

    def decode_quantized(self, *tensors: Tensor, format: str, tensor_scale: float, **options: Any) -> Decoded:
        scale = tensor_scale if self.needs_scale(format) else 1.0
        return super().decode_quantized(*tensors, format=format, tensor_scale=scale, **options)

    def needs_scale(self, format: str) -> bool:
        return format in ("fp8_per_tensor", "fp8_e4m3")


@planted(
    "H13",
    source=("https://github.com/ROCm/ATOM/pull/1772",),
    symptom="answers are almost all wrong with an alias of a cache dtype",
    shows_when="the scale of the tensor is not 1",
    killed_by=(DECODE,),
)
class AliasNotKnown(ScalesKnownFormats):
    """The format is known by another of its names only, and taken for one without a scale."""

    def needs_scale(self, format: str) -> bool:
        return format == "fp8_e4m3"


@planted(
    "I6-decode_quantized",
    source=("https://github.com/sgl-project/sglang/pull/34765",),
    symptom="calibrated scales make the answers worse",
    shows_when="the scale of the tensor is not 1",
    killed_by=(DECODE,),
)
class ValuesNotScaled(TorchExplicit):
    """Keys are scaled, values are not."""

    def decode_quantized(self, *tensors: Tensor, tensor_scale: float, **options: Any) -> Decoded:
        out, lse = super().decode_quantized(*tensors, tensor_scale=tensor_scale, **options)
        return out / tensor_scale, lse


@planted(
    "X97",
    symptom="NaN now and then",
    shows_when="a page is not full, and what follows its tokens is NaN",
    killed_by=(DECODE_UNUSED,),
)
class WholePagesDequantised(TorchAbsorbed):
    """Rows past a sequence's length have the weight 0, and 0 · NaN is NaN."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        page_size = kv_cache.shape[1]
        token = torch.arange(int(cache_seqlens.max()), device=kv_cache.device)
        return kv_cache[block_table[:, token // page_size].long(), token % page_size, 0]


@planted(
    "X98",
    symptom="sequences that begin in the first page lose tokens",
    shows_when="page 0 is in use",
    killed_by=(DECODE_MOVED, DECODE),
)
class PageZeroIsEmpty(TorchExplicit):
    """Page 0 is taken for the page that padding points at, and read as zeros."""

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        return super().named_pages(torch.cat([torch.zeros_like(pages[:1]), pages[1:]]), block_table)


@planted(
    "X99",
    symptom="the next layer sees another query",
    shows_when="the query is used again",
    killed_by=(DECODE_INPUTS,),
)
class QueryScaledInPlace(TorchExplicit):
    """The scale of the keys is multiplied into the caller's query."""

    def decode_quantized(self, q: Tensor, *tensors: Tensor, tensor_scale: float, **options: Any) -> Decoded:
        decoded = super().decode_quantized(q, *tensors, tensor_scale=tensor_scale, **options)
        q.mul_(tensor_scale)
        return decoded
