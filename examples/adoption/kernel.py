"""A kernel with a known limitation: it takes the memory of its cache for dense."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec import Supports


class InHouse:
    """The subject."""

    name = "in-house"
    supports = Supports(dtypes=("float32",), max_s=1, lse=False, backward=())

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, None]:
        pages, page_size, _, width = kv_cache.shape
        dense = kv_cache.as_strided((pages * page_size, width), (width, 1))
        out = q.new_zeros(*q.shape[:3], head_dim_v)
        for i, length in enumerate(cache_seqlens.tolist()):
            token = torch.arange(length, device=q.device)
            rows = dense[block_table[i, token // page_size].long() * page_size + token % page_size]  # [t, c+r]
            out[i] = torch.softmax(q[i] @ rows.T * softmax_scale, dim=-1) @ rows[:, :head_dim_v]
        return out, None
