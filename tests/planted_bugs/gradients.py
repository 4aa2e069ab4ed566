"""Faults of the backward pass of attention. What attention returns is right in all of them; its gradients are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.fused_backward import FusedBackward
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

AGREE = "test_prefill_gradients_agree_with_reference"
EXACT = "test_prefill_gradients_of_exact_steps"
UNSEEN = "test_prefill_gradients_where_nothing_is_seen"
ALONE = "test_prefill_gradients_of_sequences_are_independent"
STRIDES = "test_prefill_gradients_read_strides"
SPARSE = "test_sparse_prefill_gradients_agree_with_reference"
SPARSE_STRIDES = "test_sparse_prefill_gradients_read_strides"


@planted(
    "J1",
    source=("https://github.com/Dao-AILab/flash-attention/pull/2755",),
    symptom="the backward pass writes before its buffer",
    shows_when="-1 among the indices",
    killed_by=(SPARSE,),
)
class ScattersInvalidEntries(FusedBackward):
    """Gradients of entries that select nothing, all of them 0, are added to row -1."""

    def scatter(self, total: Tensor, indices: Tensor, selected: Tensor, rows: Tensor) -> None:
        super().scatter(total, indices, torch.ones_like(selected), rows)


@planted(
    "J11",
    source=(
        "https://github.com/tile-ai/tilelang/pull/1588",
        "https://github.com/tile-ai/tilelang/commit/bb7f30c9c",
    ),
    symptom="gradients of key and value rows are wrong",
    shows_when="the backward pass of sparse attention",
    killed_by=(SPARSE, SPARSE_STRIDES),
)
class ScattersOneOfFourColumns(FusedBackward):
    """Where a vector of four columns was added at once, only the first is."""

    def scatter(self, total: Tensor, indices: Tensor, selected: Tensor, rows: Tensor) -> None:
        first = torch.arange(rows.shape[-1], device=rows.device) % 4 == 0
        super().scatter(total, indices, selected, rows * first)


@planted(
    "K1",
    source=("https://github.com/deepseek-ai/FlashMLA/commit/c759027",),
    symptom="gradients are less accurate than they should be",
    shows_when="16 bits",
    killed_by=(EXACT,),
)
class ProductsOfDeltaInDtype(FusedBackward):
    """The products of out and its gradient, whose sum is D, are rounded to the dtype."""

    def delta(self, out: Tensor, out_grad: Tensor) -> Tensor:
        products = out * out_grad
        return super().delta(products, torch.ones_like(products))


@planted(
    "K2",
    source=("https://github.com/Dao-AILab/flash-attention/issues/2552",),
    symptom="columns of the gradient of v are wrong",
    shows_when="the width of V is no multiple of the columns that are reduced at once, which QK's width determines",
    killed_by=(AGREE, UNSEEN),
)
class ValueColumnsByKeyWidth(FusedBackward):
    """The reduction of dV takes as many columns at once as that of dK, and what is left over is not reduced."""

    def value_grad(self, p: Tensor, out_grad: Tensor) -> Tensor:
        dv = super().value_grad(p, out_grad)
        at_once = min(self.width, 32)
        return dv * (torch.arange(dv.shape[-1], device=dv.device) < dv.shape[-1] // at_once * at_once)

    def key_grad(self, ds: Tensor, q: Tensor, softmax_scale: float) -> Tensor:
        self.width = q.shape[-1]
        return super().key_grad(ds, q, softmax_scale)


@planted(
    "K3",
    source=(
        "https://github.com/NVIDIA/TransformerEngine/pull/1896",
        "https://github.com/NVIDIA/TransformerEngine/commit/9d173c93e",
    ),
    symptom="key and value gradients are mixed up",
    shows_when="both are in one buffer",
    killed_by=(AGREE, UNSEEN, EXACT),
)
class GradientsSplitFlat(FusedBackward):
    """The buffer [tokens, keys and values] of the gradients is split by elements, not by columns."""

    def split(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([dk, dv], dim=-1).flatten()
        return both[: dk.numel()].reshape(dk.shape), both[dk.numel() :].reshape(dv.shape)


@planted(
    "K8",
    source=(
        "https://github.com/Dao-AILab/flash-attention/pull/2421",
        "https://github.com/ROCm/flash-attention/pull/179",
    ),
    symptom="NaN in the gradients of sequences without queries",
    shows_when="a sequence has keys and no query",
    killed_by=(UNSEEN,),
)
class NothingWrittenWithoutQueries(FusedBackward):
    """Where there is no query, no block of the gradients of keys and values is written; memory holds NaN."""

    def split(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        return (dk, dv) if self.queries else (torch.full_like(dk, torch.nan), torch.full_like(dv, torch.nan))

    def weights(self, q: Tensor, *args: Any) -> Tensor:
        self.queries = q.shape[-2]
        return super().weights(q, *args)


@planted(
    "X-query-gradient-unscaled",
    symptom="training diverges",
    shows_when="the scale is not 1",
    killed_by=(AGREE, EXACT),
)
class QueryGradientUnscaled(FusedBackward):
    """The softmax scale is left out of dQ."""

    def query_grad(self, ds: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        return super().query_grad(ds, k, 1.0)


@planted(
    "X-backward-without-delta",
    symptom="training converges to something worse",
    shows_when="the values of a row have a mean",
    killed_by=(AGREE, EXACT),
)
class NoDelta(FusedBackward):
    """D is not subtracted."""

    def delta(self, out: Tensor, out_grad: Tensor) -> Tensor:
        return torch.zeros_like(super().delta(out, out_grad))


@planted(
    "X-backward-without-mask",
    symptom="gradients of future tokens",
    shows_when="several queries under the causal mask",
    killed_by=(AGREE, UNSEEN),
)
class BackwardWithoutMask(FusedBackward):
    """P is formed anew without the causal mask."""

    def weights(self, q: Tensor, k: Tensor, visible: Tensor, lse: Tensor, softmax_scale: float) -> Tensor:
        return super().weights(q, k, torch.ones_like(visible), lse, softmax_scale)


@planted(
    "X-lse-gradient-ignored",
    symptom="a loss on the LSE, such as that of a merge, trains nothing",
    shows_when="the loss depends on the LSE",
    killed_by=("test_prefill_gradients_through_the_lse",),
)
class LseGradientIgnored(FusedBackward):
    """The gradient of the LSE is dropped."""

    def scores_grad(self, p: Tensor, dp: Tensor, delta: Tensor, lse_grad: Tensor) -> Tensor:
        return super().scores_grad(p, dp, delta, torch.zeros_like(lse_grad))


@planted(
    "X-kv-gradient-of-first-head",
    symptom="keys shared by heads are trained by one of them",
    shows_when="several heads share a key",
    killed_by=(SPARSE, SPARSE_STRIDES),
)
class KeyGradientOfFirstHead(TorchExplicit):
    """The gradient of a shared row is not summed over the heads."""

    def attend_rows(self, q: Tensor, rows: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(q[:, :1], rows, *args[:-1], None if args[-1] is None else args[-1][:1])
        rest, rest_lse = super().attend_rows(q, rows.detach(), *args)
        return torch.cat([out, rest[:, 1:]], dim=1), torch.cat([lse, rest_lse[:, 1:]], dim=1)


@planted(
    "X-key-gradient-in-whole-tiles",
    symptom="the first tokens of a sequence are not trained",
    shows_when="several sequences, the first not a multiple of 4 keys long",
    killed_by=(ALONE, AGREE),
)
class KeyGradientInWholeTiles(TorchAbsorbed):
    """A tile of 4 rows of dK is stored at the end of the first sequence, which finishes last."""

    def prefill(self, q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        end = int(args[2][1])

        def store(grad: Tensor) -> Tensor:
            row = torch.arange(len(grad), device=grad.device)
            return grad.masked_fill(((row >= end) & (row < -(-end // 4) * 4))[:, None, None], 0.0)

        return super().prefill(q, with_gradient(k, store), *args, **options)


@planted(
    "X-out-gradient-ignores-strides",
    symptom="wrong gradients where the output is transposed or summed next",
    shows_when="the gradient of out is a view",
    killed_by=(STRIDES,),
)
class OutGradientIgnoresStrides(TorchAbsorbed):
    """The gradient of out is taken to be contiguous."""

    def prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().prefill(*args, **options)
        return with_gradient(out, as_if_contiguous), lse


@planted(
    "X-sparse-out-gradient-ignores-strides",
    symptom="wrong gradients where the output is transposed next",
    shows_when="the gradient of out is a view",
    killed_by=(SPARSE_STRIDES,),
)
class SparseOutGradientIgnoresStrides(TorchAbsorbed):
    """The gradient of out is taken to be contiguous."""

    def sparse_prefill(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, *statistics = super().sparse_prefill(*args, **options)
        return with_gradient(out, as_if_contiguous), *statistics


@planted(
    "X-sparse-lse-gradient-counts-the-sink",
    symptom="a loss on the LSE trains keys that the sink outweighs too little",
    shows_when="attn_sink is given, and the loss depends on the LSE",
    killed_by=("test_sparse_prefill_gradients_through_the_lse",),
)
class SparseLseGradientCountsSink(TorchAbsorbed):
    """The gradient of the LSE is multiplied by what the sink leaves, as that of out is."""

    def attend_rows(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_rows(*args)
        if args[-1] is None:
            return out, lse
        share = self.sink_share(lse.detach(), args[-1])
        return out, with_gradient(lse, lambda grad: grad * share)


@planted(
    "X-out-gradient-scaled-in-place",
    symptom="gradients of another branch of the network are scaled",
    shows_when="the caller uses the gradient of out again",
    killed_by=("test_prefill_backward_does_not_modify_its_arguments",),
)
class OutGradientScaledInPlace(TorchAbsorbed):
    """The gradient of out is multiplied by a factor in place, and the result divided by it."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v = (with_gradient(x, lambda grad: grad / 2) for x in (q, k, v))
        out, lse = super().prefill(q, k, v, *args, **options)
        return with_gradient(out, lambda grad: grad.mul_(2)), lse


@planted(
    "X-indices-clamped-for-backward",
    symptom="entries that select nothing select row 0 in the next step of training",
    shows_when="a forward pass that autograd records, and entries of -1",
    killed_by=("test_sparse_prefill_backward_does_not_modify_its_arguments",),
)
class IndicesClampedForBackward(TorchExplicit):
    """The scatter of the backward pass wants valid indices, so the forward pass clamps them where they are."""

    def sparse_prefill(self, q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> Any:
        returned = super().sparse_prefill(q, kv, indices, **options)
        if torch.is_grad_enabled():
            indices.data.clamp_(min=0)
        return returned
