"""The PyTorch subjects that ship: three ways to compute MLA, on any device, in any dtype.

Each is built from small steps, so that a variant (or a planted bug) overrides exactly one. Arithmetic is float32, or
float64 for float64 inputs; a layer rounds every intermediate to the dtype of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch_indexer import TorchIndexerProjection
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.adapters.pytorch_parallel import TorchTensorParallel
from mla_spec.adapters.pytorch_quantised import TorchQuantisedCache, power_of_two_above
from mla_spec.adapters.pytorch_sparse import TorchSparse, TorchSparseByQuery, TorchSparseSDPA
from mla_spec.adapters.pytorch_steps import TorchCache, wide
from mla_spec.adapters.pytorch_weights import TorchBlockWeights, TorchBlockWeightsByBlock
from mla_spec.bounds.profile import Profile
from mla_spec.reference.cache_layout import CacheLayout
from mla_spec.subjects.supports import BACKWARD, DTYPES, Supports

__all__ = ["TorchAbsorbed", "TorchExplicit", "TorchLayer", "TorchSDPA", "wide"]


def _profiles(**changes: Any) -> Mapping[str, Profile]:
    """Per dtype: arithmetic in the wide dtype, with P kept there."""
    return {
        dtype: Profile.default(dtype, probabilities="float64" if dtype == "float64" else "float32", **changes)
        for dtype in DTYPES
    }


class TorchExplicit(
    TorchIndexerProjection, TorchTensorParallel, TorchBlockWeights, TorchCache, TorchQuantisedCache, TorchSparse
):
    """Plain PyTorch; a layer expands keys and values per head, attention takes one sequence at a time."""

    name = "torch-explicit"
    profile = _profiles(form="explicit")
    supports = Supports(
        backward=BACKWARD,
        dense_sink=("decode", "prefill", "layer"),
        sliding_window=("decode", "prefill"),
        output_gate=("head", "element", "query"),
    )

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
        attn_sink: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of packed sequences q, k [tokens, h, n+r] and v [tokens, h, v], one after the other."""
        outs, lses = [], []
        for queries, keys in self.sequences(cu_seqlens_q, cu_seqlens_k):
            query, key, value = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))  # [1, h, ·, ·]
            s, t = query.shape[2], key.shape[2]
            visible = self.visible(s, t, torch.tensor([t], device=q.device), causal)  # [1, 1, s, t]
            out, lse = self.attend_beside(query, key, value, self.windowed(visible, window), softmax_scale, attn_sink)
            outs.append(out[0].transpose(0, 1))  # [s, h, v]
            lses.append(lse[0])  # [h, s]
        return torch.cat(outs), torch.cat(lses, dim=-1)

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
        """The tokens of each sequence's queries and keys."""
        return list(zip(self.spans(cu_seqlens_q), self.spans(cu_seqlens_k), strict=True))

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
        attn_sink: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q [b, s, h, c+r] to the cached rows of each sequence."""
        outs, lses = [], []
        for i, length in enumerate(cache_seqlens.tolist()):
            rows = self.gather(kv_cache, block_table[i], length)[None, None]  # [1, 1, t, c+r]
            visible = self.visible(q.shape[1], rows.shape[2], cache_seqlens[i : i + 1], causal)  # [1, 1, s, t]
            query = q[i : i + 1].transpose(1, 2)  # [1, h, s, c+r]
            out, lse = self.attend_beside(
                query, rows, rows[..., :head_dim_v], self.windowed(visible, window), softmax_scale, attn_sink
            )
            outs.append(out.transpose(1, 2))  # [1, s, h, c]
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def ragged_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of packed queries q [tokens, h, c+r] to the cached rows of their sequences, one after the other."""
        outs, lses = [], []
        for i, (queries, length) in enumerate(zip(self.spans(cu_seqlens_q), cache_seqlens.tolist(), strict=True)):
            rows = self.gather(kv_cache, block_table[i], length)[None, None]  # [1, 1, t, c+r]
            query = q[queries].transpose(0, 1)[None]  # [1, h, s, c+r]
            visible = self.visible(query.shape[2], length, cache_seqlens[i : i + 1], causal)  # [1, 1, s, t]
            out, lse = self.attend(query, rows, rows[..., :head_dim_v], visible, softmax_scale)
            outs.append(out[0].transpose(0, 1))  # [s, h, c]
            lses.append(lse[0])  # [h, s]
        return torch.cat(outs), torch.cat(lses, dim=-1)

    def spans(self, cu_seqlens: Tensor) -> list[slice]:
        """The tokens of each sequence."""
        return [slice(*span) for span in pairwise(cu_seqlens.tolist())]

    def rank_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
        ranks: int,
        rank: int,
        interleave: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q [b, s, h, c+r] to the rows of one rank, under a mask by the tokens' places in the whole."""
        own = self.own_tokens(cache_seqlens, ranks, rank, interleave)  # [b]
        rows = self.gather_rank(kv_cache, block_table, own)[:, None]  # [b, 1, t, c+r]
        place = self.places_in_the_whole(rows.shape[2], ranks, rank, interleave, q.device)  # [t]
        last = cache_seqlens[:, None] - 1  # [b, 1]
        if causal:
            last = last - q.shape[1] + 1 + torch.arange(q.shape[1], device=q.device)  # [b, s]
        visible = (place <= last[..., None])[:, None].expand(-1, -1, q.shape[1], -1)  # [b, 1, s, t]
        out, lse = self.attend(q.transpose(1, 2), rows, rows[..., :head_dim_v], visible, softmax_scale)
        return out.transpose(1, 2), lse

    def own_tokens(self, cache_seqlens: Tensor, ranks: int, rank: int, interleave: int) -> Tensor:
        """How many tokens of each sequence a rank holds, [b]."""
        rounds = cache_seqlens // (ranks * interleave)
        rest = cache_seqlens - rounds * ranks * interleave - rank * interleave
        return rounds * interleave + rest.clamp(0, interleave)

    def places_in_the_whole(self, t: int, ranks: int, rank: int, interleave: int, device: torch.device) -> Tensor:
        """Where the first t tokens of a rank stand in their sequence, [t]."""
        token = torch.arange(t, device=device)
        return token // interleave * ranks * interleave + rank * interleave + token % interleave

    def gather_rank(self, kv_cache: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
        """The rows of every sequence, padded with zeros to the longest; [b, t, c+r]."""
        rows = [self.gather(kv_cache, table, n) for table, n in zip(block_table, own.tolist(), strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

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
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``decode`` of the dequantised rows of those pages that tables name."""
        named, table = self.named_pages(pages, block_table)
        dtype = self.row_dtype(q.dtype)
        kv_cache = self.dequantize_cache(
            named, format=format, page_size=page_size, tensor_scale=tensor_scale, dtype=dtype
        )
        return self.decode(q, kv_cache, table, cache_seqlens, **options)

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """The pages that a table names, and a table of their places among these; an entry of no page names any."""
        numbers, table = block_table.clamp(0, len(pages) - 1).unique(return_inverse=True)
        return pages[numbers], table.int()

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of dequantised rows for queries of ``dtype``."""
        return wide(dtype)


class TorchAbsorbed(TorchSparseByQuery, TorchBlockWeightsByBlock, TorchExplicit):
    """Plain PyTorch; a layer attends to the latent cache itself, attention takes the whole batch, padded."""

    name = "torch-absorbed"
    profile = {
        dtype: replace(profile, cache_dequantised=dtype) for dtype, profile in _profiles(form="absorbed").items()
    }

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
        attn_sink: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All sequences at once, under a mask that keeps them apart."""
        visible = self.packed_visible(cu_seqlens_q.long(), cu_seqlens_k.long(), causal)[None, None]  # [1, 1, s, t]
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, h, ·, ·]
        out, lse = self.attend_beside(query, key, value, self.windowed(visible, window), softmax_scale, attn_sink)
        return out[0].transpose(0, 1), lse.squeeze(0)

    def packed_visible(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
        """Which key tokens each query token sees, [tokens, key tokens]."""
        sequence_q, query = self.places(cu_seqlens_q)
        sequence_k, key = self.places(cu_seqlens_k)
        visible = sequence_q[:, None] == sequence_k
        if causal:
            past = cu_seqlens_k.diff() - cu_seqlens_q.diff()  # [b]: keys before the first query
            visible &= key <= (query + past[sequence_q])[:, None]
        return visible

    def places(self, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """(sequence, index in its sequence) of each token, both [tokens]."""
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return sequence, torch.arange(len(sequence), device=lengths.device) - cu_seqlens[sequence]

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
        attn_sink: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        rows = self.gather_batch(kv_cache, block_table, cache_seqlens)[:, None]  # [b, 1, t, c+r]
        visible = self.visible(q.shape[1], rows.shape[2], cache_seqlens, causal)  # [b, 1, s, t]
        out, lse = self.attend_beside(
            q.transpose(1, 2), rows, rows[..., :head_dim_v], self.windowed(visible, window), softmax_scale, attn_sink
        )
        return out.transpose(1, 2), lse

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        """The rows of every sequence, padded with zeros to the longest; [b, t, c+r]."""
        page_size = kv_cache.shape[1]
        token = torch.arange(self.key_count(block_table, cache_seqlens, page_size), device=kv_cache.device)  # [t]
        used = token < cache_seqlens[:, None]  # [b, t]
        pages = block_table[:, token // page_size].long().masked_fill_(~used, 0)
        rows = kv_cache[pages, token % page_size, 0]  # [b, t, c+r]
        return rows.masked_fill_(~used[..., None], 0.0)

    def ragged_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of all sequences at once, under a mask that keeps them apart."""
        rows = self.gather_packed(kv_cache, block_table, cache_seqlens)[None, None]  # [1, 1, t, c+r]
        cu_seqlens_k = F.pad(cache_seqlens.long().cumsum(0), (1, 0))  # [b + 1]
        visible = self.packed_visible(cu_seqlens_q.long(), cu_seqlens_k, causal)[None, None]  # [1, 1, s, t]
        out, lse = self.attend(q.transpose(0, 1)[None], rows, rows[..., :head_dim_v], visible, softmax_scale)
        return out[0].transpose(0, 1), lse.squeeze(0)

    def gather_packed(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        """The rows of every sequence, one after the other; [key tokens, c+r]."""
        page_size = kv_cache.shape[1]
        token = torch.arange(int(cache_seqlens.max()), device=kv_cache.device)
        used = token < cache_seqlens[:, None]  # [b, t]
        pages = block_table[:, token // page_size][used].long()
        return kv_cache[pages, (token % page_size).expand_as(used)[used], 0]

    def gather_rank(self, kv_cache: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
        """The rows of every sequence at once."""
        return self.gather_batch(kv_cache, block_table, own)

    def key_count(self, block_table: Tensor, cache_seqlens: Tensor, page_size: int) -> int:
        """How many keys of each sequence are gathered."""
        return int(cache_seqlens.max())

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        """With the LSE itself, and no division, as kernels that combine splits do."""
        empty = (lses == -torch.inf).all(dim=0)
        lse = lses.masked_fill(empty, 0.0).logsumexp(dim=0)  # its gradient is NaN where all are -inf
        return torch.exp(lses - lse), lse.masked_fill(empty, -torch.inf)

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def stored_scale(self, wanted: Tensor, layout: CacheLayout) -> Tensor:
        """Float32 scales are powers of two."""
        wanted = super().stored_scale(wanted, layout)
        return power_of_two_above(wanted) if layout.scale == "float32" else wanted

    def codes(self, groups: Tensor, scales: Tensor, layout: CacheLayout) -> Tensor:
        """By the reciprocal of the scale."""
        return groups * (1 / scales)[..., None]

    def attend_latent(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        scale: float,
        attn_sink: Tensor | None = None,
    ) -> Tensor:
        """The absorbed form."""
        q_latent = self.linear(q_nope.transpose(1, 2), w_uk.transpose(-1, -2))  # [b, h, s, c]
        q = torch.cat([q_latent, q_pe.transpose(1, 2)], dim=-1)  # [b, h, s, c+r]
        rows = torch.cat([latent, k_pe], dim=-1)[:, None]  # [b, 1, t, c+r]
        visible = self.layer_visible(q, rows)
        out, _ = self.attend_beside(q, rows, latent[:, None], visible, scale, attn_sink)  # [b, h, s, c]
        return self.linear(out, w_uv).transpose(1, 2)


class TorchSDPA(TorchSparseSDPA, TorchAbsorbed):
    """``torch.nn.functional.scaled_dot_product_attention``, whose backends round P to the dtype and return no LSE.

    In 16 bits the CPU's exp is a polynomial of degree 3 with a relative error of 1.2e-4 (ATen/cpu/vec/vec512/vec512_float.h,
    fexp_u20).
    """

    name = "torch-sdpa"
    profile = {
        dtype: Profile.default(
            dtype,
            form="absorbed",
            tile=16,
            operand_roundings=4,
            exp_error=2048.0 if dtype in ("float16", "bfloat16") else 4.0,
            cache_dequantised=dtype,
        )
        for dtype in DTYPES
    }
    supports = Supports(
        lse=False,
        attention_sink=False,
        backward=BACKWARD,
        sliding_window=("decode", "prefill"),
        output_gate=("head", "element", "query"),
    )

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        """In base 2, as kernels compute it."""
        binary = lses * (1 / math.log(2))
        m = binary.amax(dim=0).clamp(min=torch.finfo(lses.dtype).min)
        total = torch.exp2(binary - m).sum(dim=0)
        empty = total == 0
        lse = m + total.masked_fill(empty, 1.0).log2()
        return torch.exp2(binary - lse), (lse * math.log(2)).masked_fill(empty, -torch.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        if k.shape[-2] == 0:
            return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_empty(0)
        # Heads that share their keys are as queries of one head, so that no head gets a copy of the keys.
        shared = k.shape[1] == 1
        out = F.scaled_dot_product_attention(
            q.flatten(1, 2)[:, None] if shared else q,  # [b, 1, h·s, d] or [b, h, s, d]
            k,
            v,
            attn_mask=visible.repeat(1, 1, q.shape[1], 1) if shared else visible,
            scale=softmax_scale,
        ).reshape(*q.shape[:-1], v.shape[-1])
        return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0), q.new_empty(0)
