"""A decode in two calls, as FlashMLA has it: a plan made from the lengths, and a kernel that follows the plan.

    mla-spec check examples/flash_mla_like.py:FlashMLALike

``get_metadata`` and ``decode_with_plan`` stand for the kernel under test and know nothing of this suite. ``FlashMLALike``
adapts them: one method, and a declaration of what the kernel takes and how it rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec import Profile, Supports

PAGE = 64
PART = 2 * PAGE
"""Keys of one part of the plan."""


def get_metadata(cache_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """The plan: (sequence, first key, end) of each part; a sequence without keys has none."""
    lengths = enumerate(cache_seqlens.tolist())
    return [(i, start, min(start + PART, length)) for i, length in lengths for start in range(0, length, PART)]


def decode_with_plan(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    plan: list[tuple[int, int, int]],
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out [b, s, h, head_dim_v], lse [b, h, s]) of q [b, s, h, 576] and kv_cache [pages, 64, 1, 576].

    A running maximum m, sum l and weighted sum o of each row are corrected after every 64 keys.
    """
    b, s, h, _ = q.shape
    m = q.new_full((b, s, h, 1), -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(m)
    out = q.new_zeros((b, s, h, head_dim_v), dtype=torch.float32)
    for i, start, end in plan:
        for first in range(start, end, PAGE):
            token = torch.arange(first, min(first + PAGE, end), device=q.device)  # [t]
            rows = kv_cache[block_table[i, first // PAGE].long(), : len(token), 0].float()  # [t, 576]
            x = q[i].float() @ rows.T * softmax_scale  # [s, h, t]
            if causal:
                last = cache_seqlens[i] - s + torch.arange(s, device=q.device)  # [s]
                x = x.masked_fill((token > last[:, None])[:, None], -torch.inf)
            new = torch.maximum(m[i], x.amax(dim=-1, keepdim=True))  # [s, h, 1]
            finite = new.masked_fill(new == -torch.inf, 0.0)  # a row that has seen no key yet
            p, kept = torch.exp(x - finite), torch.exp(m[i] - finite)
            total[i] = total[i] * kept + p.sum(dim=-1, keepdim=True)
            out[i] = out[i] * kept + p.to(q.dtype).float() @ rows[:, :head_dim_v]
            m[i] = new
    empty = total == 0
    out = (out / total.masked_fill(empty, 1.0)).to(q.dtype)
    lse = (m + total.log()).masked_fill(empty, torch.inf)  # FlashMLA gives +inf to a row without keys
    return out, lse[..., 0].transpose(1, 2).contiguous()


class FlashMLALike:
    """The adapter."""

    name = "flash-mla-like"
    supports = Supports(
        dtypes=("float16", "bfloat16"),
        page_sizes=(PAGE,),
        latent_dims=((512, 64),),
        empty_row="zero/+inf",
        backward=(),
    )
    profile = {dtype: Profile.default(dtype, tile=PAGE) for dtype in supports.dtypes}

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
        plan = get_metadata(cache_seqlens)
        return decode_with_plan(q, kv_cache, block_table, cache_seqlens, head_dim_v, plan, softmax_scale, causal)
