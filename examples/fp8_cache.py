"""An FP8 cache in the layout ``fp8_per_tensor``: 576 codes a token, one scale for all of them.

    mla-spec check examples/fp8_cache.py:Fp8Cache

Three operations share the format: one writes pages, one reads them, one attends to them. Each is judged on pages that the
reference made, so that two faults cannot cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec import Profile, Supports

LARGEST = 448.0
"""The largest finite number of float8_e4m3fn."""


def read(pages: Tensor, page_size: int, tensor_scale: float) -> Tensor:
    """Rows [pages, page_size, 576] in float32 of pages [pages, page_size · 576] (uint8)."""
    codes = pages.unflatten(-1, (page_size, 576)).view(torch.float8_e4m3fn)
    return codes.float() * tensor_scale


class Fp8Cache:
    """The subject."""

    name = "fp8-cache"
    supports = Supports(dtypes=("float32", "bfloat16"), cache_formats=("fp8_per_tensor",), lse=False, backward=())
    profile = {dtype: Profile.default(dtype, probabilities="float32") for dtype in supports.dtypes}

    def quantize_cache(self, rows: Tensor, *, format: str, page_size: int, tensor_scale: float) -> Tensor:
        """Pages [pages, bytes per page] of rows [n, 576]."""
        count = -(-len(rows) // page_size)
        codes = (rows.float() / tensor_scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        pages = torch.zeros(count * page_size, 576, dtype=torch.uint8, device=rows.device)
        pages[: len(rows)] = codes.view(torch.uint8)
        return pages.view(count, -1)

    def dequantize_cache(
        self, pages: Tensor, *, format: str, page_size: int, tensor_scale: float, dtype: torch.dtype
    ) -> Tensor:
        """Rows [pages, page_size, 1, 576]."""
        return read(pages, page_size, tensor_scale).to(dtype)[:, :, None]

    def decode_quantized(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        format: str,
        page_size: int,
        tensor_scale: float,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, None]:
        """Out [b, s, h, head_dim_v]; reads the pages of one sequence at a time, and only those."""
        out = q.new_zeros(*q.shape[:3], head_dim_v)
        for i, length in enumerate(cache_seqlens.tolist()):
            used = block_table[i, : -(-length // page_size)].long()
            rows = read(pages[used], page_size, tensor_scale).flatten(0, 1)[:length]  # [t, 576]
            for j in range(q.shape[1]):
                keys = rows[: max(length - q.shape[1] + j + 1, 0)] if causal else rows
                p = torch.softmax(q[i, j].float() @ keys.T * softmax_scale, dim=-1)  # [h, t]
                out[i, j] = (p @ keys[:, :head_dim_v]).to(q.dtype)  # zero without keys
        return out, None
