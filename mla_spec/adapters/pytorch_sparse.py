"""Sparse attention and the indexer of the PyTorch subjects. Each step is a method, so that a variant overrides one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mla_spec.adapters.pytorch_steps import TorchAttention, wide


class TorchSparse(TorchAttention):
    """The selected rows of every query are gathered, as a batch of queries with one token and keys of their own."""

    def sparse_prefill(
        self,
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        attn_sink: Tensor | None = None,
        topk_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention of q [s, h, c+r] to the rows of kv [s_kv, 1, c+r] that indices [s, 1, k] select."""
        selected = self.selected(indices[:, 0], topk_length, len(kv))  # [s, k]
        rows = self.gather_rows(kv[:, None], indices[:, 0], selected)  # [s, k, c+r]
        out, lse = self.attend_rows(q, rows, selected, head_dim_v, softmax_scale, attn_sink)
        return out, self.max_logits(q, rows, selected, softmax_scale), lse

    def sparse_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        indices: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        attn_sink: Tensor | None = None,
        topk_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q [b, s, h, c+r] to the slots of kv_cache [pages, page_size, 1, c+r] that indices [b, s, k] name."""
        b, s = q.shape[:2]
        slots = indices.flatten(0, 1)  # [b·s, k]
        if topk_length is not None:
            topk_length = topk_length.repeat_interleave(s)
        selected = self.selected(slots, topk_length, kv_cache.shape[0] * kv_cache.shape[1])
        rows = self.gather_rows(kv_cache, slots, selected)
        out, lse = self.attend_rows(q.flatten(0, 1), rows, selected, head_dim_v, softmax_scale, attn_sink)
        return out.unflatten(0, (b, s)), self.by_sequence(lse, b, s)

    def by_sequence(self, lse: Tensor, b: int, s: int) -> Tensor:
        """[b, h, s] of [b·s, h]."""
        return lse.reshape(b, s, -1).transpose(1, 2)

    def selected(self, indices: Tensor, topk_length: Tensor | None, s_kv: int) -> Tensor:
        """Which entries of indices [s, k] select a row."""
        selected = (indices >= 0) & (indices < s_kv)
        if topk_length is not None:
            selected &= torch.arange(indices.shape[1], device=indices.device) < topk_length[:, None]
        return selected

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        """Rows of pool [pages, page_size, 1, d] at indices [s, k], 0 where nothing is selected; [s, k, d]."""
        slot = indices.long().masked_fill(~selected, 0)
        page_size = pool.shape[1]
        return pool[slot // page_size, slot % page_size, 0].masked_fill(~selected[..., None], 0.0)

    def attend_rows(
        self,
        q: Tensor,
        rows: Tensor,
        selected: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        attn_sink: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(out [s, h, c], lse [s, h]) of q [s, h, d] over rows [s, k, d]."""
        keys = rows[:, None]  # [s, 1, k, d]
        scores = self.scores(q[:, :, None], keys, softmax_scale)  # [s, h, 1, k]
        p, lse = self.softmax(self.masked(scores, selected[:, None, None]))
        out = self.weighted_values(p, keys[..., :head_dim_v])[:, :, 0]  # [s, h, c]
        lse = lse[..., 0]
        if attn_sink is not None:
            out = out * self.sink_share(lse, attn_sink)[..., None]
        return out.to(q.dtype), lse

    def max_logits(self, q: Tensor, rows: Tensor, selected: Tensor, softmax_scale: float) -> Tensor | None:
        """The largest score of each row, [s, h]."""
        scores = self.scores(q[:, :, None], rows[:, None], softmax_scale)  # [s, h, 1, k]
        return self.masked(scores, selected[:, None, None]).amax(dim=-1)[..., 0]

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, top_k: int
    ) -> tuple[Tensor | None, Tensor]:
        """Logits and selected keys of q [tokens, h, d], k [key tokens, d] and weights [tokens, h], sequence by sequence."""
        logits = q.new_zeros(len(q), len(k), dtype=wide(q.dtype))
        indices = cu_seqlens_k.new_full((len(q), top_k), -1)
        spans_q, spans_k = pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())
        for (q0, q1), (k0, k1) in zip(spans_q, spans_k, strict=True):
            block = self.indexer_logits(q[q0:q1], k[k0:k1], weights[q0:q1])  # [s, t]
            visible = self.indexer_visible(q1 - q0, k1 - k0, q.device)
            logits[q0:q1, k0:k1] = block
            chosen = self.largest(block.masked_fill(~visible, -torch.inf), top_k)  # [s, k]
            seen = visible.sum(dim=-1, keepdim=True)  # [s, 1]
            rank = torch.arange(chosen.shape[1], device=q.device)
            indices[q0:q1, : chosen.shape[1]] = torch.where(rank < seen, chosen + k0, -1).to(indices.dtype)
        return logits, indices

    def indexer_visible(self, s: int, t: int, device: torch.device) -> Tensor:
        """Which of t keys each of s queries sees, [s, t]."""
        return self.visible(s, t, torch.tensor([t], device=device), causal=True)[0, 0]

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """Σ_h weights · relu(q·k), [s, t], of q [s, h, d], k [t, d] and weights [s, h]."""
        dtype = wide(q.dtype)
        scores = torch.relu(q.to(dtype) @ k.to(dtype).T)  # [s, h, t]
        return (scores * weights[..., None]).sum(dim=1)

    def largest(self, logits: Tensor, top_k: int) -> Tensor:
        """Keys with the largest logits [s, t] of each row, of equal ones the first; [s, min(top_k, t)]."""
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


class TorchSparseByQuery(TorchSparse):
    """One query after the other, over the rows that it selects and no others."""

    def attend_rows(
        self,
        q: Tensor,
        rows: Tensor,
        selected: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        attn_sink: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            super(TorchSparseByQuery, self).attend_rows(
                q[i : i + 1],
                rows[i : i + 1, selected[i]],
                selected[i : i + 1, selected[i]],
                head_dim_v,
                softmax_scale,
                attn_sink,
            )
            for i in range(len(q))
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)


class TorchSparseSDPA(TorchSparse):
    """With attention that returns neither LSE nor scores, and so takes no sink."""

    def attend_rows(
        self,
        q: Tensor,
        rows: Tensor,
        selected: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        attn_sink: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        keys = rows[:, None]
        out, lse = self.attend(q[:, :, None], keys, keys[..., :head_dim_v], selected[:, None, None], softmax_scale)
        return out[:, :, 0], lse

    def by_sequence(self, lse: Tensor, b: int, s: int) -> Tensor:
        return lse

    def max_logits(self, q: Tensor, rows: Tensor, selected: Tensor, softmax_scale: float) -> Tensor | None:
        return None

    def indexer_logits(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """With the sum over heads as a matrix product."""
        dtype = wide(q.dtype)
        scores = torch.relu(q.to(dtype) @ k.to(dtype).T)
        return (weights[:, None] @ scores)[:, 0]
