"""PyTorch's own attention kernels as subjects: each backend of scaled_dot_product_attention, and compiled flex_attention.

Each kernel computes ``prefill``, one sequence after the other, and ``decode`` of rows gathered from the pages. None is asked
for an LSE. The subjects know no device: a kernel that a device does not have raises.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from mla_spec import Accumulator, Profile, Supports

HALF = ("float16", "bfloat16")
SINGLE = (*HALF, "float32")
TENSOR_CORE = Accumulator(order="tensor-core", block=16, fraction_bits=25)
"""Products of 16-bit numbers on Hopper."""

FEW_QUERIES = 8
"""Queries of a chunk that attend one by one."""


def tensor_core_profiles(dtypes: tuple[str, ...]) -> dict[str, Profile]:
    """An online softmax over tiles, on tensor cores in 16 bits, whose keys may be split; P is rounded to the dtype."""
    return {
        dtype: Profile.default(dtype, tile=16, splits=32)
        if dtype == "float32"
        else Profile.default(dtype, score=TENSOR_CORE, value=TENSOR_CORE, tile=16, splits=32)
        for dtype in dtypes
    }


class TorchKernel:
    """``prefill`` and ``decode`` by a kernel that takes q, k, v [1, h, s or t, d] of one sequence."""

    equal_dims = True
    """Whether the kernel takes rows of one width only: the narrower ones are filled with zeros, which change nothing."""

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, None]:
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            query, key, value = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))  # [1, h, ·, ·]
            out[q0:q1] = self.attend(query, key, value, softmax_scale, causal)[0].transpose(0, 1)
        return out, None

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
        out = q.new_zeros(*q.shape[:3], head_dim_v)
        heads, page_size = q.shape[2], kv_cache.shape[1]
        for i, length in enumerate(cache_seqlens.tolist()):
            token = torch.arange(length, device=q.device)
            rows = kv_cache[block_table[i, token // page_size].long(), token % page_size]  # [t, 1, c+r]
            rows = rows.transpose(0, 1)[None].repeat(1, heads, 1, 1)  # [1, h, t, c+r]
            query = q[i].transpose(0, 1)[None]  # [1, h, s, c+r]
            out[i] = self.attend(query, rows, rows[..., :head_dim_v], softmax_scale, causal)[0].transpose(0, 1)
        return out, None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        """Out [1, h, s, v]: causal is bottom-right; a query that sees no key gives 0."""
        s, t = q.shape[2], k.shape[2]
        past = t - s  # keys before the first query's own
        if s == 0 or t == 0:
            return q.new_zeros(*q.shape[:3], v.shape[-1])
        if not causal or s == 1:
            return self.padded(q, k, v, softmax_scale, False)
        if past < 0:
            seen = self.attend(q[:, :, -past:], k, v, softmax_scale, causal)
            return F.pad(seen, (0, 0, -past, 0))
        if past and s <= FEW_QUERIES:
            each = [(q[:, :, i : i + 1], k[:, :, : past + i + 1], v[:, :, : past + i + 1]) for i in range(s)]
            return torch.cat([self.padded(*parts, softmax_scale, False) for parts in each], dim=2)
        # Kernels align to the top left: queries of zeros stand for those that came before.
        return self.padded(F.pad(q, (0, 0, past, 0)), k, v, softmax_scale, True)[:, :, past:]

    def padded(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        """The kernel's output, of rows that have one width if it needs that."""
        width = v.shape[-1]
        if self.equal_dims:
            widest = max(q.shape[-1], width)
            q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
        return self.kernel(q, k, v, softmax_scale, causal)[..., :width]

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        """Out of q, k, v [1, h, ·, d]; there are as many queries as keys where ``causal``."""
        raise NotImplementedError


class _SDPA(TorchKernel):
    backend: SDPBackend

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)


class SDPAFlash(_SDPA):
    """FlashAttention-2, as PyTorch compiles it."""

    name = "sdpa-flash"
    backend = SDPBackend.FLASH_ATTENTION
    profile = tensor_core_profiles(HALF)
    supports = Supports(
        dtypes=HALF,
        prefill_dims=((192, 128), (64, 64), (24, 16)),
        latent_dims=((128, 64), (24, 8)),
        lse=False,
        backward=(),
        negative_scale=False,
    )


class SDPAEfficient(_SDPA):
    """CUTLASS's memory-efficient attention; widths are multiples of 8. In float32 its products are sums of three of TF32."""

    name = "sdpa-efficient"
    backend = SDPBackend.EFFICIENT_ATTENTION
    equal_dims = False
    profile = tensor_core_profiles(SINGLE)
    supports = Supports(
        dtypes=SINGLE,
        prefill_dims=((192, 128), (64, 64), (24, 16)),
        latent_dims=((512, 64), (24, 8)),
        lse=False,
        backward=(),
        negative_scale=False,
    )


class SDPACudnn(_SDPA):
    """cuDNN's fused attention."""

    name = "sdpa-cudnn"
    backend = SDPBackend.CUDNN_ATTENTION
    profile = tensor_core_profiles(HALF)
    supports = Supports(
        dtypes=HALF,
        prefill_dims=((128, 128), (64, 64)),
        latent_dims=((64, 64),),
        lse=False,
        backward=(),
        negative_scale=False,
    )


class SDPAMath(_SDPA):
    """Single operations in float32 or better: q and k are multiplied by the root of the scale."""

    name = "sdpa-math"
    backend = SDPBackend.MATH
    equal_dims = False
    profile = {
        dtype: Profile.default(
            dtype,
            operand_roundings=4,
            probabilities="float64" if dtype == "float64" else "float32",
            row_sum="normalised",
        )
        for dtype in (*SINGLE, "float64")
    }
    supports = Supports(lse=False, backward=(), negative_scale=False)


@cache
def _flex(on_gpu: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if on_gpu else flex_attention


def _past(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.where(query >= key, score, -torch.inf)


class Flex(TorchKernel):
    """flex_attention, compiled on a GPU, and plain elsewhere."""

    name = "flex-attention"
    profile = tensor_core_profiles(SINGLE)
    supports = Supports(
        dtypes=SINGLE,
        prefill_dims=((128, 128), (64, 64)),
        latent_dims=((64, 64),),
        lse=False,
        backward=(),
        negative_scale=False,
    )

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        out: Tensor = _flex(q.is_cuda)(q, k, v, score_mod=_past if causal else None, scale=softmax_scale)
        return out


class Narrow(SDPAMath):
    """Takes few and small cases, for rehearsals."""

    name = "sdpa-math-narrow"
    supports = Supports(
        dtypes=("bfloat16",),
        latent_dims=((4, 2),),
        prefill_dims=((6, 4),),
        num_heads=(1,),
        max_s=1,
        lse=False,
        backward=(),
        negative_scale=False,
    )
