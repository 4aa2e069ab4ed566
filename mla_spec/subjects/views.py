"""Arguments of ``decode`` as non-contiguous views with the same contents.

What a view leaves out is filled with ordinary numbers and valid page ids, so that code which ignores strides computes
something wrong rather than reading outside the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

ROW_PADDING = 64
"""Elements between rows: aligned rows stay aligned, as kernels may demand of real caches."""


def _slice_of_wider(x: Tensor, dim: int, extra: int) -> Tensor:
    """X as the last slice of a tensor that is ``extra`` longer in ``dim``; what is before it repeats x's own elements."""
    if x.shape[dim] == 0:
        return x
    index = torch.arange(-extra, x.shape[dim], device=x.device) % x.shape[dim]
    return x.index_select(dim, index).narrow(dim, extra, x.shape[dim])


def _transposed(x: Tensor, first: int, second: int) -> Tensor:
    """X stored with two axes exchanged, as the output of a batched matrix product."""
    return x.transpose(first, second).contiguous().transpose(first, second)


VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "q as a slice of a wider row": lambda t: t | {"q": _slice_of_wider(t["q"], -1, ROW_PADDING)},
    "q with head and batch axes exchanged in memory": lambda t: t | {"q": _transposed(t["q"], 0, 2)},
    "kv_cache with rows longer than c + r": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], -1, ROW_PADDING)},
    "kv_cache with pages further apart than a page": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], 1, 3)},
    "block_table narrowed from a wider one": lambda t: t | {"block_table": _slice_of_wider(t["block_table"], 1, 3)},
    "cache_seqlens as every other element": lambda t: (
        t | {"cache_seqlens": t["cache_seqlens"].repeat_interleave(2)[::2]}
    ),
}
"""Ways to pass the same arguments, by name."""

MERGE_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "outs with the parts innermost in memory": lambda t: t | {"outs": _transposed(t["outs"], 0, -1)},
    "outs as slices of wider rows": lambda t: t | {"outs": _slice_of_wider(t["outs"], -1, ROW_PADDING)},
    "outs stored with heads before queries": lambda t: t | {"outs": _transposed(t["outs"], -3, -2)},
    "lses stored with queries before heads": lambda t: t | {"lses": _transposed(t["lses"], -2, -1)},
    "lses narrowed from longer rows": lambda t: t | {"lses": _slice_of_wider(t["lses"], -1, 3)},
}
"""Ways to pass the same arguments of ``merge``."""


def _one_projection(t: Tensors) -> Tensors:
    """Latent and k_pe as slices of one row, as kv_a_proj_with_mqa returns them."""
    both = torch.cat([t["latent"], t["k_pe"]], dim=-1)
    c = t["latent"].shape[-1]
    return t | {"latent": both[:, :c], "k_pe": both[:, c:]}


QUANTISED_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    name: view for name, view in VIEWS.items() if not name.startswith("kv_cache")
} | {
    "pages of two layers alternating in memory": lambda t: (
        t | {"kv_cache": torch.stack([t["kv_cache"].roll(1, 0), t["kv_cache"]], dim=1).flatten(0, 1)[1::2]}
    )
}
"""Ways to pass the same arguments of ``decode_quantized``, whose pages are called "kv_cache"."""

WRITE_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "latent and k_pe as slices of one row": _one_projection,
    "slot_mapping as every other element": lambda t: t | {"slot_mapping": t["slot_mapping"].repeat_interleave(2)[::2]},
    "kv_cache with rows longer than c + r": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], -1, ROW_PADDING)},
    "kv_cache with pages further apart than a page": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], 1, 3)},
}
"""Ways to pass the same arguments of ``write_cache``."""


def _keys_and_values_together(t: Tensors) -> Tensors:
    """K and v as slices of one row per head, as kv_b_proj returns them."""
    both = torch.cat([t["k"], t["v"]], dim=-1)
    d = t["k"].shape[-1]
    return t | {"k": both[..., :d], "v": both[..., d:]}


PREFILL_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "q as a slice of a wider row": lambda t: t | {"q": _slice_of_wider(t["q"], -1, ROW_PADDING)},
    "q stored with heads before tokens": lambda t: t | {"q": _transposed(t["q"], 0, 1)},
    "k and v as slices of one row": _keys_and_values_together,
    "v padded to wider rows": lambda t: t | {"v": _slice_of_wider(t["v"], -1, ROW_PADDING)},
    "k and v stored with heads before tokens": lambda t: (
        t | {"k": _transposed(t["k"], 0, 1), "v": _transposed(t["v"], 0, 1)}
    ),
    "cu_seqlens as every other element": lambda t: (
        t | {name: t[name].repeat_interleave(2)[::2] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    ),
}
"""Ways to pass the same arguments of ``prefill``."""

_SPARSE_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "q as a slice of a wider row": lambda t: t | {"q": _slice_of_wider(t["q"], -1, ROW_PADDING)},
    "q stored with heads first": lambda t: t | {"q": _transposed(t["q"], 0, -2)},
    "rows of keys longer than c + r": lambda t: t | {"kv": _slice_of_wider(t["kv"], -1, ROW_PADDING)},
    "indices narrowed from wider rows": lambda t: t | {"indices": _slice_of_wider(t["indices"], -1, 3)},
    "topk_length as every other element": lambda t: (
        t | {name: t[name].repeat_interleave(2)[::2] for name in ("topk_length",) if name in t}
    ),
}

SPARSE_PREFILL_VIEWS = _SPARSE_VIEWS
"""Ways to pass the same arguments of ``sparse_prefill``."""

SPARSE_DECODE_VIEWS = _SPARSE_VIEWS | {
    "pages further apart than a page": lambda t: t | {"kv": _slice_of_wider(t["kv"], 1, 3)}
}
"""Ways to pass the same arguments of ``sparse_decode``, whose cache is called "kv"."""

WEIGHT_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "codes as a slice of wider rows": lambda t: t | {"codes": _slice_of_wider(t["codes"], -1, ROW_PADDING)},
    "codes stored column by column": lambda t: t | {"codes": _transposed(t["codes"], 0, 1)},
    "scales as a slice of wider rows": lambda t: t | {"scales": _slice_of_wider(t["scales"], -1, 3)},
    "scales stored column by column": lambda t: t | {"scales": _transposed(t["scales"], 0, 1)},
}
"""Ways to pass the same arguments of ``dequantize_weight``."""

INDEXER_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "q as a slice of a wider row": lambda t: t | {"q": _slice_of_wider(t["q"], -1, ROW_PADDING)},
    "q stored with heads before tokens": lambda t: t | {"q": _transposed(t["q"], 0, 1)},
    "k as a slice of a wider row": lambda t: t | {"k": _slice_of_wider(t["k"], -1, ROW_PADDING)},
    "weights stored with heads before tokens": lambda t: t | {"weights": _transposed(t["weights"], 0, 1)},
    "cu_seqlens as every other element": lambda t: (
        t | {name: t[name].repeat_interleave(2)[::2] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    ),
}
"""Ways to pass the same arguments of ``indexer``."""

OUT_GRAD_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "out_grad as a slice of a wider row": lambda t: t | {"out_grad": _slice_of_wider(t["out_grad"], -1, ROW_PADDING)},
    "out_grad stored with heads before tokens": lambda t: t | {"out_grad": _transposed(t["out_grad"], 0, 1)},
}
"""Ways to pass the same gradient of out to a backward pass."""


def _one_fused_projection(t: Tensors) -> Tensors:
    """Hidden and q_latent as slices of one row, as a fused projection may write them."""
    both = torch.cat([t["hidden"], t["q_latent"]], dim=-1)
    e = t["hidden"].shape[-1]
    return t | {"hidden": both[:, :e], "q_latent": both[:, e:]}


PROJECT_INDEXER_VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "hidden and q_latent as slices of one row": _one_fused_projection,
    "positions as every other element": lambda t: t | {"positions": t["positions"].repeat_interleave(2)[::2]},
    "weights stored [in, out]": lambda t: (
        t | {name: _transposed(w, 0, 1) for name, w in t.items() if name.startswith("weights.") and w.ndim == 2}
    ),
}
"""Ways to pass the same arguments of ``project_indexer``, whose weights have names that begin with "weights."."""
