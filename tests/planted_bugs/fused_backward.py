"""A correct subject with a backward pass of its own, in steps of which a bug changes one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchExplicit, wide


class _Attention(torch.autograd.Function):
    """Attention of one dense batch, which keeps its LSE and forms P anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, subject: FusedBackward, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = super(FusedBackward, subject).attend(q, k, v, visible, softmax_scale)
        ctx.save_for_backward(q, k, v, visible, out, lse)
        ctx.subject, ctx.softmax_scale = subject, softmax_scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.subject.gradients(*ctx.saved_tensors, *grads, ctx.softmax_scale), None, None


class _Gather(torch.autograd.Function):
    """Rows by their indices, whose gradients are scattered."""

    @staticmethod
    def forward(ctx: Any, subject: FusedBackward, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        ctx.save_for_backward(indices, selected)
        ctx.subject, ctx.shape = subject, pool.shape
        return super(FusedBackward, subject).gather_rows(pool, indices, selected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, selected = ctx.saved_tensors
        total = grads[0].new_zeros(ctx.shape.numel() // ctx.shape[-1], ctx.shape[-1], dtype=wide(grads[0].dtype))
        ctx.subject.scatter(total, indices.long(), selected, grads[0].to(total.dtype))
        return None, total.to(grads[0].dtype).reshape(ctx.shape), None, None


class FusedBackward(TorchExplicit):
    """Correct: gradients of attention by FlashAttention's formulas, and of sparse attention's rows by a scatter."""

    name = "torch-fused-backward"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _Attention.apply(self, q, k, v, visible, softmax_scale)  # type: ignore[no-untyped-call]
        return out, lse

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        rows: Tensor = _Gather.apply(self, pool, indices, selected)  # type: ignore[no-untyped-call]
        return rows

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor,
        out: Tensor,
        lse: Tensor,
        out_grad: Tensor,
        lse_grad: Tensor,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q [b, h, s, d], k [b, h, t, d] and v [b, h, t, v]."""
        dtype = wide(q.dtype)
        p = self.weights(q, k, visible, lse, softmax_scale)  # [b, h, s, t]
        dp = out_grad.to(dtype) @ v.to(dtype).transpose(-1, -2)
        ds = self.scores_grad(p, dp, self.delta(out, out_grad), lse_grad)
        dk, dv = self.key_grad(ds, q, softmax_scale), self.value_grad(p, out_grad)
        return self.query_grad(ds, k, softmax_scale), *self.split(dk, dv)

    def weights(self, q: Tensor, k: Tensor, visible: Tensor, lse: Tensor, softmax_scale: float) -> Tensor:
        """P = exp(S - lse), 0 where nothing is seen."""
        scores = self.masked(self.scores(q, k, softmax_scale), visible)
        return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])

    def delta(self, out: Tensor, out_grad: Tensor) -> Tensor:
        """D, [b, h, s, 1]."""
        dtype = wide(out.dtype)
        return (out.to(dtype) * out_grad.to(dtype)).sum(dim=-1, keepdim=True)

    def scores_grad(self, p: Tensor, dp: Tensor, delta: Tensor, lse_grad: Tensor) -> Tensor:
        return p * (dp - delta + lse_grad[..., None])

    def query_grad(self, ds: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return (ds @ k.to(ds.dtype) * softmax_scale).to(k.dtype)

    def key_grad(self, ds: Tensor, q: Tensor, softmax_scale: float) -> Tensor:
        return (ds.transpose(-1, -2) @ q.to(ds.dtype) * softmax_scale).to(q.dtype)

    def value_grad(self, p: Tensor, out_grad: Tensor) -> Tensor:
        return (p.transpose(-1, -2) @ out_grad.to(p.dtype)).to(out_grad.dtype)

    def split(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values as they leave the kernel."""
        return dk, dv

    def scatter(self, total: Tensor, indices: Tensor, selected: Tensor, rows: Tensor) -> None:
        """Add rows [s, k, d] to total [s_kv, d] where indices [s, k] select something."""
        total.index_add_(0, indices[selected], rows[selected])
