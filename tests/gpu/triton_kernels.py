"""vLLM's and SGLang's Triton kernels as subjects, from files that were brought along (see ``brought.py``).

In float32 Triton multiplies in TF32 unless ``TRITON_F32_DEFAULT=ieee`` is in the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_spec import Accumulator, Profile, Supports

sys.path.insert(0, str(Path(__file__).parent))
import brought

DTYPES = ("bfloat16", "float16", "float32")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LATENT_DIMS = ((16, 16), (32, 32)) if INTERPRETED else ((512, 64), (256, 32))
HEADS = (1, 2, 5, 16) if INTERPRETED else (2, 16, 20, 128)
SPLITS = 4
TENSOR_CORE = Accumulator(order="tensor-core", block=16, fraction_bits=25)


def profiles(**changes: Any) -> dict[str, Profile]:
    """Tiles of 16 keys or more on tensor cores; what is not split into four parts has one."""
    products = {"score": TENSOR_CORE, "value": TENSOR_CORE}
    return {
        dtype: Profile.default(dtype, tile=16, **({} if dtype == "float32" else products), **changes)
        for dtype in DTYPES
    }


class _Decode:
    profile = profiles(splits=SPLITS)
    supports = Supports(
        dtypes=DTYPES,
        latent_dims=LATENT_DIMS,
        num_heads=HEADS,
        max_s=1,
        empty_row="unsupported",
        negative_scale=False,
    )


class VllmDecode(_Decode):
    """vLLM's split decode; it divides 0 by 0 for a sequence without keys."""

    name = "vllm-triton-decode"

    def __init__(self) -> None:
        self.forward = brought.vllm("triton_decode_attention").decode_attention_fwd

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
        """Q [b, 1, h, c+r]; causal or not is the same for one query."""
        b, _, h, _ = q.shape
        out, lse = q.new_empty(b, h, head_dim_v), q.new_empty(b, h, dtype=torch.float32)
        parts = q.new_empty(b, h, SPLITS, head_dim_v + 1, dtype=torch.float32)
        values = kv_cache[..., :head_dim_v]
        self.forward(
            *(q[:, 0], kv_cache, values, out, lse, block_table, cache_seqlens, parts, SPLITS, softmax_scale),
            page_size=kv_cache.shape[1],
            is_mla=True,
        )
        return out[:, None], lse[:, :, None]


class VllmMerge:
    """vLLM's merge of two parts, as prefill has them: outs [2, s, h, v], lses [2, h, s]."""

    name = "vllm-triton-merge"
    supports = Supports(dtypes=DTYPES, max_parts=2, num_heads=HEADS, empty_row="zero/-inf")

    def __init__(self) -> None:
        self.forward = brought.vllm("triton_merge_attn_states").merge_attn_states

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        if len(outs) == 1:
            return outs[0].clone(), lses[0].clone()
        rows = [part.reshape(-1, *part.shape[-2:]) for part in outs]  # [tokens, h, v]
        heads_first = [part.movedim(-2, 0).reshape(part.shape[-2], -1) for part in lses]  # [h, tokens]
        out, lse = torch.empty_like(rows[0]), torch.empty_like(heads_first[0])
        self.forward(out, rows[0], heads_first[0], rows[1], heads_first[1], lse)
        by_head = lse.view(lses.shape[-2], *lses.shape[1:-2], lses.shape[-1])
        return out.view(outs.shape[1:]), by_head.movedim(0, -2).contiguous()


def token_slots(block_table: Tensor, lengths: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(starts int32 [b+1], slots int64) of the tokens of each sequence; the slots are those of a pool without pages."""
    starts = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0)).to(torch.int32)
    token = torch.arange(int(lengths.max()), device=lengths.device)
    slots = block_table[:, token // page_size].long() * page_size + token % page_size
    return starts, slots[token < lengths[:, None]]


class SglangDecode(_Decode):
    """SGLang's split decode."""

    name = "sglang-triton-decode"
    supports = Supports(
        dtypes=DTYPES,
        latent_dims=LATENT_DIMS,
        num_heads=HEADS,
        max_s=1,
        lse=False,
        empty_row="unsupported",
        negative_scale=False,
    )

    def __init__(self) -> None:
        self.forward = brought.sglang("decode_attention").decode_attention_fwd

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
        """Q [b, 1, h, c+r]; causal or not is the same for one query."""
        b, _, h, _ = q.shape
        pool = kv_cache.flatten(0, 1)  # [slots, 1, c+r]
        starts, slots = token_slots(block_table, cache_seqlens, kv_cache.shape[1])
        out = q.new_empty(b, h, head_dim_v)
        parts, lses = (q.new_empty(b, h, SPLITS, *more, dtype=torch.float32) for more in ((head_dim_v,), ()))
        splits = torch.full((b,), SPLITS, dtype=torch.int32, device=q.device)
        values = pool[..., :head_dim_v]
        self.forward(
            *(q[:, 0], pool, values, out, starts, slots, parts, lses, splits, SPLITS, softmax_scale, 1.0, 1.0),
        )
        return out[:, None], None


class SglangExtend:
    """SGLang's attention of new tokens over a cache: the last s of each sequence are given apart, as a server has them."""

    name = "sglang-triton-extend"
    profile = profiles()
    supports = Supports(
        dtypes=DTYPES,
        latent_dims=LATENT_DIMS,
        num_heads=HEADS,
        causal=(True,),
        empty_row="unsupported",
        negative_scale=False,
    )

    def __init__(self) -> None:
        self.forward = brought.sglang("extend_attention").extend_attention_fwd

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
        pool = kv_cache.flatten(0, 1)  # [slots, 1, c+r]
        ends, slots = token_slots(block_table, cache_seqlens, kv_cache.shape[1])
        last = ends[1:, None].long() - s + torch.arange(s, device=q.device)  # [b, s]
        new = pool[slots[last.flatten()]]  # [b·s, 1, c+r]
        starts, before = token_slots(block_table, cache_seqlens - s, kv_cache.shape[1])
        out, lse = q.new_empty(b * s, h, head_dim_v), q.new_empty(b * s, h, dtype=torch.float32)
        queries = torch.arange(0, b * s + 1, s, dtype=torch.int32, device=q.device)
        before = before if len(before) else before.new_zeros(1)
        self.forward(
            *(q.reshape(b * s, h, d), new, new[..., :head_dim_v], out, pool, pool[..., :head_dim_v]),
            *(queries, starts, before, None, True, None, s, 1.0, 1.0),
            sm_scale=softmax_scale,
            lse_extend=lse,
        )
        return out.view(b, s, h, head_dim_v), lse.view(b, s, h).transpose(1, 2)
