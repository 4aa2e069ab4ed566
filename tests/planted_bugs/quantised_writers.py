"""Faults of writing quantised caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.cache_layout import CacheLayout
from mla_spec.reference.formats import format_of

BYTES = "test_quantised_pages_have_the_bytes_of_the_layout"
SCALES = "test_scales_are_within_limits"
NEAREST = "test_codes_are_the_nearest"
ZEROS = "test_groups_of_zeros_stay_zero"
ROPE = "test_latent_codes_do_not_depend_on_k_pe"
STRIDES = "test_quantize_cache_reads_strides"


@planted(
    "I6-quantize_cache",
    source=("https://github.com/sgl-project/sglang/pull/34765",),
    symptom="calibrated scales make the answers worse",
    shows_when="the scale of the tensor is not 1",
    killed_by=(NEAREST,),
)
class WritesWithUnitScale(TorchExplicit):
    """Codes are made with the scale 1, whatever the scale is that they are read with."""

    def quantize_cache(self, rows: Tensor, *, tensor_scale: float, **options: Any) -> Tensor:
        return super().quantize_cache(rows, tensor_scale=1.0, **options)


@planted(
    "I8",
    source=("https://github.com/ROCm/aiter/pull/4195",),
    symptom="rows of garbage",
    shows_when="a group is all 0",
    killed_by=(ZEROS, NEAREST),
)
class ZeroGroupHasScaleZero(TorchExplicit):
    """The scale has no floor, and 0 / 0 is NaN."""

    def scales(self, groups: Tensor, layout: CacheLayout) -> Tensor:
        return self.stored_scale(self.amax(groups) / format_of(layout.code).max_finite, layout)


@planted(
    "I11",
    source=("https://github.com/vllm-project/vllm/pull/36297",),
    symptom="none in its test, which inverted the scale as well",
    shows_when="the scale is not 1",
    killed_by=(NEAREST,),
)
class MultipliesByScale(TorchExplicit):
    """Rows are multiplied by the scale where they should be divided."""

    def codes(self, groups: Tensor, scales: Tensor, layout: CacheLayout) -> Tensor:
        return groups * scales[..., None]


@planted(
    "X81",
    symptom="the latent loses bits in some layers",
    shows_when="k_pe is much larger than the latent",
    killed_by=(ROPE, SCALES),
)
class ScaleCoversRope(TorchExplicit):
    """The largest magnitude is taken of the whole row, k_pe with it."""

    def quantize_cache(self, rows: Tensor, **options: Any) -> Tensor:
        self.largest = rows.float().abs().amax(dim=-1, keepdim=True)
        return super().quantize_cache(rows, **options)

    def amax(self, groups: Tensor) -> Tensor:
        return self.largest.expand(groups.shape[:-1])


@planted(
    "X82",
    symptom="small channels of the latent are rounded away",
    shows_when="groups of a row differ in size",
    killed_by=(SCALES,),
)
class OneScalePerRow(TorchExplicit):
    """All groups of a row have the scale of the largest."""

    def amax(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(dim=(1, 2))[:, None].expand(groups.shape[:-1])


@planted(
    "X83",
    symptom="a bias of the latent, most of it in small numbers",
    shows_when="always",
    killed_by=(NEAREST,),
)
class CodesTruncated(TorchExplicit):
    """Codes are cut to four significant bits before they are cast."""

    def codes(self, groups: Tensor, scales: Tensor, layout: CacheLayout) -> Tensor:
        return (super().codes(groups, scales, layout).view(torch.int32) >> 20 << 20).view(torch.float32)


@planted(
    "X84",
    symptom="NaN from one token on",
    shows_when="a number is beyond what its format holds",
    killed_by=(NEAREST,),
)
class OverflowIsNaN(TorchExplicit):
    """The cast to e4m3 does not saturate."""

    def cast(self, x: Tensor, name: str) -> Tensor:
        beyond = x.abs() > format_of(name).max_finite
        return super().cast(x, name).float().masked_fill(beyond, torch.nan).to(super().cast(x, name).dtype)


@planted(
    "X85",
    symptom="the largest elements of many groups are too small",
    shows_when="the wanted scale is no power of two",
    killed_by=(SCALES,),
)
class ScaleRoundedDown(TorchAbsorbed):
    """Scales are rounded down to a power of two, and the largest elements saturate."""

    def stored_scale(self, wanted: Tensor, layout: CacheLayout) -> Tensor:
        return super().stored_scale(wanted, layout) / 2


@planted(
    "X-one-page-more",
    symptom="the pool is full too early, or the next sequence's first page is cleared",
    shows_when="the tokens fill their last page",
    killed_by=(BYTES,),
)
class OnePageMore(TorchExplicit):
    """Pages are counted as tokens // page size + 1."""

    def paged(self, x: Tensor, page_size: int) -> Tensor:
        return super().paged(F.pad(x, (0, 0, 0, int(len(x) % page_size == 0))), page_size)


@planted(
    "X86",
    symptom="pages overlap, or the last ones lie beyond the pool",
    shows_when="a page's bytes are no multiple of its alignment",
    killed_by=(BYTES,),
)
class PagesNotPadded(TorchExplicit):
    """A page has the bytes of its tokens, without the padding to its alignment."""

    def page_bytes(self, layout: CacheLayout, page_size: int) -> int:
        return page_size * layout.bytes_per_token


@planted(
    "X87",
    symptom="garbage as soon as another kernel reads the cache",
    shows_when="a page holds more than one token",
    killed_by=(SCALES, NEAREST),
)
class ScalesBesideRows(TorchExplicit):
    """Each row is followed by its scales, where the layout has all rows of the page first."""

    def pack(self, segments: dict[str, Tensor], layout: CacheLayout, page_size: int) -> Tensor:
        return super().pack(segments, replace(layout, row=layout.row + layout.tail, tail=()), page_size)


@planted(
    "X88",
    symptom="neighbouring channels are exchanged",
    shows_when="codes have four bits",
    killed_by=(NEAREST,),
)
class HighHalfFirst(TorchExplicit):
    """Of two codes the first is in the high half of the byte."""

    def pairs(self, pattern: Tensor) -> Tensor:
        return pattern[..., 0::2] << 4 | pattern[..., 1::2]


@planted(
    "X89",
    symptom="the cache holds pieces of other rows",
    shows_when="rows are slices of one projection",
    killed_by=(STRIDES,),
)
class WriterIgnoresStrides(TorchExplicit):
    """Rows are taken to be contiguous."""

    def quantize_cache(self, rows: Tensor, **options: Any) -> Tensor:
        return super().quantize_cache(as_if_contiguous(rows), **options)
