"""Quantised latent caches of the PyTorch subjects.

Numbers are made and read in float32, which holds every code, scale and plain element. Each step is a method, so that a
variant overrides exactly one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.reference.cache_layout import CacheLayout, layout_of
from mla_spec.reference.formats import format_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Numbers of float4_e2m1fn by their patterns without sign."""

CASTS = {"float8_e4m3fn": torch.float8_e4m3fn, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Formats that torch casts to."""


class TorchQuantisedCache:
    """Writing and reading the pages of a quantised cache."""

    def quantize_cache(self, rows: Tensor, *, format: str, page_size: int, tensor_scale: float) -> Tensor:
        """Pages [pages, bytes per page] of rows [n, width]."""
        layout = layout_of(format)
        scaled, plain = rows.float().split([layout.scaled_dim, layout.plain_dim], dim=-1)
        groups = scaled.unflatten(-1, (layout.groups, layout.group))  # [n, groups, group]
        scales = self.scales(groups, layout) if layout.scale else groups.new_full((len(rows), 1), tensor_scale)
        segments = {
            "codes": self.to_bytes(self.codes(groups, scales, layout).flatten(1), layout.code),
            "plain": self.to_bytes(plain, layout.plain),
        }
        if layout.scale:
            segments["scales"] = self.scale_bytes(scales, layout)
        return self.pack(segments, layout, page_size)

    def scales(self, groups: Tensor, layout: CacheLayout) -> Tensor:
        """The scale of each group of [n, groups, group], a number of the layout's format; [n, groups]."""
        wanted = self.amax(groups) / format_of(layout.code).max_finite
        return self.stored_scale(wanted.clamp(min=max(layout.scale_floor, 2.0**-126)), layout)

    def amax(self, groups: Tensor) -> Tensor:
        """[n, groups] of [n, groups, group]."""
        return groups.abs().amax(dim=-1)

    def stored_scale(self, wanted: Tensor, layout: CacheLayout) -> Tensor:
        """``wanted`` > 0 in the format of scales: as it is, rounded to e4m3, or up to a power of two in e8m0."""
        if layout.scale == "float8_e4m3fn":
            return self.cast(wanted, layout.scale).float()
        return power_of_two_above(wanted) if layout.scale == "float8_e8m0fnu" else wanted

    def codes(self, groups: Tensor, scales: Tensor, layout: CacheLayout) -> Tensor:
        """What is stored for the groups with these scales, before it is rounded to the format of codes."""
        return groups / scales[..., None]

    def cast(self, x: Tensor, name: str) -> Tensor:
        """x in a format that torch casts to, saturating."""
        largest = format_of(name).max_finite
        return x.clamp(-largest, largest).to(CASTS[name])

    def to_bytes(self, x: Tensor, name: str) -> Tensor:
        """Numbers [n, count] rounded to a format, as they lie in memory."""
        if name == "float4_e2m1fn":
            return self.pairs(e2m1_pattern(x))
        if name == "float8_e8m0fnu":
            return (x.view(torch.int32) >> 23).to(torch.uint8)
        return self.cast(x, name).contiguous().view(torch.uint8)

    def pairs(self, pattern: Tensor) -> Tensor:
        """Bytes of two four-bit patterns each, the first in the low half."""
        return pattern[..., 0::2] | pattern[..., 1::2] << 4

    def scale_bytes(self, scales: Tensor, layout: CacheLayout) -> Tensor:
        """The segment of scales, with its padding."""
        if layout.transposed:
            scales = scales.unflatten(-1, layout.transposed).transpose(-1, -2).flatten(-2)
        return F.pad(self.to_bytes(scales.contiguous(), layout.scale), (0, layout.scale_padding))

    def pack(self, segments: dict[str, Tensor], layout: CacheLayout, page_size: int) -> Tensor:
        """Pages of the segments of all rows; padding and unused rows are 0."""
        blocks = [
            self.paged(torch.cat([segments[name] for name in names], dim=-1), page_size)
            for names in (layout.row, layout.tail)
            if names
        ]
        pages = torch.cat(blocks, dim=-1)
        return F.pad(pages, (0, self.page_bytes(layout, page_size) - pages.shape[-1]))

    def page_bytes(self, layout: CacheLayout, page_size: int) -> int:
        return layout.bytes_per_page(page_size)

    def paged(self, x: Tensor, page_size: int) -> Tensor:
        """[n, bytes] as [pages, page_size · bytes]."""
        return F.pad(x, (0, 0, 0, -len(x) % page_size)).reshape(-1, page_size * x.shape[-1])

    def dequantize_cache(
        self, pages: Tensor, *, format: str, page_size: int, tensor_scale: float, dtype: torch.dtype
    ) -> Tensor:
        """All rows of the pages, [pages, page_size, 1, width]."""
        layout = layout_of(format)
        codes = self.from_bytes(self.segment(pages, layout, page_size, "codes"), layout.code)
        scales = codes.new_full((*codes.shape[:-1], 1), tensor_scale)
        if layout.scale:
            scales = self.read_scales(self.segment(pages, layout, page_size, "scales"), layout)
        if dtype == torch.float64:
            codes, scales = codes.double(), scales.double()
        rows = [(codes.unflatten(-1, (layout.groups, layout.group)) * scales[..., None]).flatten(-2).to(dtype)]
        if layout.plain_dim:
            rows.append(self.from_bytes(self.segment(pages, layout, page_size, "plain"), layout.plain).to(dtype))
        return torch.cat(rows, dim=-1)[:, :, None]

    def segment(self, pages: Tensor, layout: CacheLayout, page_size: int, name: str) -> Tensor:
        """One segment of every token, [pages, page_size, bytes]."""
        start = 0
        for names in (layout.row, layout.tail):
            sizes = [layout.segment_bytes(each) for each in names]
            block = pages[:, start : start + page_size * sum(sizes)].unflatten(-1, (page_size, -1)) if names else pages
            if name in names:
                found: Tensor = block.split(sizes, dim=-1)[names.index(name)]
                return found
            start += page_size * sum(sizes)
        raise ValueError(f"{layout.name} has no segment {name!r}")

    def from_bytes(self, raw: Tensor, name: str) -> Tensor:
        """The numbers of a format in bytes [..., bytes], in float32."""
        if name == "float4_e2m1fn":
            return self.unpaired(raw)
        if name == "float8_e8m0fnu":
            # The exponent 0 is 2^-127, which is subnormal in float32.
            exponent = raw.to(torch.int32)
            return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)
        return raw.contiguous().view(CASTS[name]).float()

    def unpaired(self, raw: Tensor) -> Tensor:
        """The float4_e2m1fn numbers of bytes [..., n], [..., 2 n]."""
        pattern = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2).long()
        numbers = torch.tensor([*E2M1, *(-x for x in E2M1)], device=raw.device)
        return numbers[pattern]

    def read_scales(self, raw: Tensor, layout: CacheLayout) -> Tensor:
        """Scales [..., groups] of their segment."""
        scales = self.from_bytes(raw[..., : raw.shape[-1] - layout.scale_padding], layout.scale)
        if layout.transposed:
            scales = scales.unflatten(-1, layout.transposed[::-1]).transpose(-1, -2).flatten(-2)
        return scales


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is not below a normal float32 number x > 0."""
    bits = x.view(torch.int32) + ((1 << 23) - 1)
    return (bits >> 23 << 23).view(torch.float32)


def e2m1_pattern(x: Tensor) -> Tensor:
    """Patterns of x rounded to float4_e2m1fn, to nearest with ties to even, saturating; uint8."""
    size = x.abs().clamp(max=E2M1[-1])
    quantum = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    size = torch.round(size / quantum) * quantum
    pattern = torch.searchsorted(torch.tensor(E2M1, device=x.device), size)
    return (pattern + 8 * torch.signbit(x)).to(torch.uint8)
