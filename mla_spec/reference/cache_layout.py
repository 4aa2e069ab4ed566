"""Layouts of quantised latent caches: where codes, scales and plain elements lie in a page, byte by byte.

A page holds ``page_size`` tokens: the ``row`` segments of each token one after the other, then the ``tail`` segments of
each token, then padding to ``page_alignment``. Numbers are little-endian; of two four-bit codes the first is in the low
half of a byte. Padding and unused rows may hold anything; ``pack`` writes zeros.

Sources, in the repository of vLLM: csrc/cache_kernels.cu (fp8_per_tensor, fp8_ds_mla, indexer_fp8);
csrc/nvfp4_ds_mla_cache_kernels.cu; vllm/v1/attention/backends/mla/flashmla_sparse.py (all but the indexers);
vllm/models/deepseek_v4/common/ops/cache_utils.py and deepseek_v41/common/ops/{cache_utils,indexer_k_store}.py
(deepseek_v4, deepseek_v4_1, indexer_mxfp4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.formats import format_of, from_bytes, round_to, to_bytes
from mla_spec.reference.typing import Array, BoolArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """Where the codes, scales and plain elements of each token lie, and what they are.

    Attributes:
        scaled_dim, group: codes per token, and how many consecutive ones share a scale.
        code, scale: formats of codes and of stored scales; ``scale`` "" where one float32 scale of the whole tensor is
            kept outside of the pages.
        scale_floor: the smallest scale of the published quantisers; a group of zeros gets it.
        plain_dim, plain: count and format of the elements without scale.
        row, tail: the segments, of "codes", "scales" and "plain", that are stored per token, and after all rows.
        scale_padding: unused bytes after the scales of a token.
        transposed: the scales, viewed in this shape, are stored transposed.
        page_alignment: a page is padded to a multiple of so many bytes.
    """

    name: str
    scaled_dim: int
    group: int
    code: str = "float8_e4m3fn"
    scale: str = "float32"
    scale_floor: float = 0.0
    plain_dim: int = 0
    plain: str = "bfloat16"
    row: tuple[str, ...]
    tail: tuple[str, ...] = ()
    scale_padding: int = 0
    transposed: tuple[int, int] | None = None
    page_alignment: int = 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.scaled_dim + self.plain_dim

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.scaled_dim // self.group

    def segment_bytes(self, segment: str) -> int:
        """Bytes of one token's "codes", "scales" (with their padding) or "plain" elements."""
        if segment == "codes":
            return self.scaled_dim * format_of(self.code).bits // 8
        if segment == "scales":
            return self.groups * format_of(self.scale).itemsize + self.scale_padding
        return self.plain_dim * format_of(self.plain).itemsize

    @property
    def bytes_per_token(self) -> int:
        return sum(map(self.segment_bytes, self.row + self.tail))

    def bytes_per_page(self, page_size: int) -> int:
        """Bytes of a page of ``page_size`` tokens, with its padding."""
        return -(-page_size * self.bytes_per_token // self.page_alignment) * self.page_alignment


LAYOUTS: Final[dict[str, CacheLayout]] = {
    layout.name: layout
    for layout in (
        CacheLayout(name="fp8_per_tensor", scaled_dim=576, group=576, scale="", row=("codes",)),
        CacheLayout(
            name="fp8_ds_mla",
            scaled_dim=512,
            group=128,
            scale_floor=1e-4,
            plain_dim=64,
            row=("codes", "scales", "plain"),
        ),
        CacheLayout(
            name="deepseek_v4",
            scaled_dim=448,
            group=64,
            scale="float8_e8m0fnu",
            scale_floor=1e-4 / 448,
            plain_dim=64,
            row=("codes", "plain"),
            tail=("scales",),
            scale_padding=1,
            page_alignment=576,
        ),
        CacheLayout(
            name="deepseek_v4_1",
            scaled_dim=512,
            group=32,
            scale="float8_e8m0fnu",
            scale_floor=1e-4 / 448,
            row=("codes",),
            tail=("scales",),
            page_alignment=512,
        ),
        CacheLayout(
            name="nvfp4_ds_mla",
            scaled_dim=512,
            group=16,
            code="float4_e2m1fn",
            scale="float8_e4m3fn",
            scale_floor=2.0**-9,
            plain_dim=64,
            plain="float8_e4m3fn",
            row=("codes", "plain", "scales"),
            transposed=(8, 4),
        ),
        CacheLayout(
            name="indexer_fp8",
            scaled_dim=128,
            group=128,
            scale_floor=1e-4 / 448,
            row=("codes",),
            tail=("scales",),
        ),
        CacheLayout(
            name="indexer_mxfp4",
            scaled_dim=128,
            group=32,
            code="float4_e2m1fn",
            scale="float8_e8m0fnu",
            scale_floor=2.0**-126,
            row=("codes",),
            tail=("scales",),
        ),
    )
}


def layout_of(name: str) -> CacheLayout:
    """The layout called ``name``; ValueError lists the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown cache layout {name!r}; known layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


@dataclass(frozen=True)
class QuantisedRows:
    """Rows as they are stored, every number exact.

    Attributes:
        codes: [..., scaled_dim], numbers of the layout's code format.
        scales: [..., groups], numbers of its scale format.
        plain: [..., plain_dim], numbers of its plain format.
    """

    codes: Array
    scales: Array
    plain: Array


def segment(pages: Bytes, layout: CacheLayout, page_size: int, name: str) -> Bytes:
    """A view of one segment of every token, [pages, page_size, bytes of the segment]."""
    start = 0
    for names in (layout.row, layout.tail):
        stops = np.cumsum([0, *map(layout.segment_bytes, names)]).tolist()
        block = pages[:, start : start + page_size * stops[-1]].reshape(len(pages), page_size, stops[-1])
        if name in names:
            at = names.index(name)
            return block[..., stops[at] : stops[at + 1]]
        start += page_size * stops[-1]
    raise ValueError(f"{layout.name} has no segment {name!r}")


def pack(stored: QuantisedRows, layout: CacheLayout, page_size: int) -> Bytes:
    """Pages [pages, bytes per page] that hold n rows in token order; padding and unused rows are 0.

    Raises:
        ValueError: numbers that the layout's formats do not hold.
    """
    tokens = len(stored.codes)
    pages = np.zeros((-(-tokens // page_size), layout.bytes_per_page(page_size)), dtype=np.uint8)
    for name in layout.row + layout.tail:
        raw = _segment_of(stored, layout, name)
        rows = np.zeros((len(pages) * page_size, raw.shape[-1]), dtype=np.uint8)
        rows[:tokens] = raw
        segment(pages, layout, page_size, name)[..., : raw.shape[-1]] = rows.reshape(
            len(pages), page_size, raw.shape[-1]
        )
    return pages


def unpack(pages: Bytes, layout: CacheLayout, page_size: int, *, tensor_scale: float = 1.0) -> QuantisedRows:
    """What pages hold, all rows of all pages, [pages, page_size, ...]; unused rows as they are.

    Raises:
        ValueError: pages that are not uint8 of the layout's bytes per page.
    """
    if pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != layout.bytes_per_page(page_size):
        want = f"uint8 [pages, {layout.bytes_per_page(page_size)}]"
        raise ValueError(f"{layout.name} pages of {page_size} tokens are {want}, got {pages.dtype} {[*pages.shape]}")
    shape = (len(pages), page_size)
    codes = from_bytes(segment(pages, layout, page_size, "codes"), layout.code)
    plain, scales = np.zeros((*shape, 0)), tensor_scales(tensor_scale, shape)
    if layout.plain_dim:
        plain = from_bytes(segment(pages, layout, page_size, "plain"), layout.plain)
    if layout.scale:
        raw = segment(pages, layout, page_size, "scales")
        scales = from_bytes(raw[..., : raw.shape[-1] - layout.scale_padding], layout.scale)
        scales = scales[..., np.argsort(_scale_order(layout))]
    return QuantisedRows(codes, scales, plain)


def used_bytes(layout: CacheLayout, page_size: int, tokens: int) -> BoolArray:
    """Which bytes of the pages hold ``tokens`` rows; the others may hold anything. [pages, bytes per page]."""
    mask = np.zeros((-(-tokens // page_size), layout.bytes_per_page(page_size)), dtype=np.uint8)
    held = np.arange(len(mask) * page_size).reshape(-1, page_size) < tokens
    for name in layout.row + layout.tail:
        padding = layout.scale_padding if name == "scales" else 0
        view = segment(mask, layout, page_size, name)
        view[..., : view.shape[-1] - padding] = held[..., None]
    return mask.astype(bool)


def tensor_scales(tensor_scale: float, shape: tuple[int, ...]) -> Array:
    """The one scale of a whole tensor, [*shape, 1]; ValueError unless it is a positive float32 number."""
    if not (0 < tensor_scale < math.inf and round_to(np.array(tensor_scale), "float32") == tensor_scale):
        raise ValueError(f"tensor_scale must be a positive float32 number, got {tensor_scale!r}")
    return np.full((*shape, 1), tensor_scale)


def _segment_of(stored: QuantisedRows, layout: CacheLayout, name: str) -> Bytes:
    """The bytes of one segment of each row, without padding."""
    if name == "codes":
        return to_bytes(stored.codes, layout.code)
    if name == "scales":
        return to_bytes(stored.scales[..., _scale_order(layout)], layout.scale)
    return to_bytes(stored.plain, layout.plain)


def _scale_order(layout: CacheLayout) -> NDArray[np.integer[Any]]:
    """Which group's scale is stored at each place."""
    groups = np.arange(layout.groups)
    return groups.reshape(layout.transposed).T.ravel() if layout.transposed else groups
