"""FlashInfer's paged MLA wrapper as a subject; its kernels are compiled when they are first called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec import Accumulator, Profile, Supports

TENSOR_CORE = Accumulator(order="tensor-core", block=16, fraction_bits=25)
WORKSPACE = 128 * 2**20


class FlashInferMLA:
    """``BatchMLAPagedAttentionWrapper``: split q and cache, pages of each sequence one after the other, natural LSE."""

    name = "flashinfer-mla"
    profile = {
        dtype: Profile.default(dtype, score=TENSOR_CORE, value=TENSOR_CORE, tile=16, splits=32)
        for dtype in ("bfloat16", "float16")
    }
    supports = Supports(
        dtypes=("bfloat16", "float16"),
        latent_dims=((512, 64),),
        page_sizes=(1, 16, 64),
        num_heads=(16, 128),
        empty_row="unsupported",
        negative_scale=False,
    )

    def __init__(self) -> None:
        import flashinfer

        self.wrapper: Any = flashinfer.mla.BatchMLAPagedAttentionWrapper
        self.workspace: Tensor | None = None

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
    ) -> tuple[Tensor, Tensor]:
        b, s, h, d = q.shape
        page_size = kv_cache.shape[1]
        if self.workspace is None:
            self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
        count = (cache_seqlens + page_size - 1) // page_size
        place = torch.arange(block_table.shape[1], device=q.device)
        wrapper = self.wrapper(self.workspace, backend="fa2")
        wrapper.plan(
            torch.arange(0, b * s + 1, s, dtype=torch.int32, device=q.device),
            torch.nn.functional.pad(count.long().cumsum(0), (1, 0)).to(torch.int32),
            block_table[place < count[:, None]],
            cache_seqlens,
            h,
            head_dim_v,
            d - head_dim_v,
            page_size,
            causal,
            softmax_scale,
            q.dtype,
            kv_cache.dtype,
        )
        queries, rows = q.reshape(b * s, h, d), kv_cache[:, :, 0]  # [tokens, h, c+r], [pages, page_size, c+r]
        out, lse = wrapper.run(
            *(x.contiguous() for x in (queries[..., :head_dim_v], queries[..., head_dim_v:])),
            *(x.contiguous() for x in (rows[..., :head_dim_v], rows[..., head_dim_v:])),
            return_lse=True,
            return_lse_base_on_e=True,
        )
        return out.view(b, s, h, head_dim_v), lse.view(b, s, h).transpose(1, 2)
