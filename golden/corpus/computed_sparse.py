"""What the float64 reference computes from cases of sparse attention, its indexer, and the caches; as in ``computed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.project_indexer import project_indexer_with_bound
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.sparse import indexer_with_bound, max_logits_with_bound, sparse_attention
from mla_spec.golden.cases.case import (
    Parameters,
    Values,
    indexer_config_from,
    layer_weights,
    rope_from,
)
from mla_spec.golden.corpus.computed import (
    OWN,
    PROFILE,
    Computed,
    exactly,
)
from mla_spec.reference.cache import gather_rows, write_rows
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.quantised_cache import dequantised_cache
from mla_spec.reference.sparse import select_top_k
from mla_spec.reference.typing import Array, IntArray


def _partial_rope(x: Values, parameters: Parameters) -> Iterator[Computed]:
    rope, start = rope_from(parameters["rope"]), parameters["start"]
    part = slice(start, start + rope.dim)
    rotated, bound = rope_with_bound(x["x"][..., part], x["positions"], rope, PROFILE.rope, output="float64")
    out, error = x["x"].copy(), np.zeros(x["x"].shape)
    out[..., part], error[..., part] = rotated, bound.terms[OWN]
    yield Computed("out", out, error)


def _write_cache(x: Values, parameters: Parameters) -> Iterator[Computed]:
    yield from exactly("out", write_rows(x["kv_cache"], x["latent"], x["k_pe"], x["slot_mapping"]))


def _decode_quantized(x: Values, parameters: Parameters) -> Iterator[Computed]:
    layout = layout_of(parameters["layout"])
    cache = dequantised_cache(
        x["pages"].astype(np.uint8), layout, parameters["page_size"], tensor_scale=parameters["tensor_scale"]
    )
    rows = gather_rows(cache, x["block_table"], x["cache_seqlens"])[:, :, None]  # [b, t, 1, width]
    bounded = attention_with_bound(
        x["q"],
        rows,
        rows[..., : parameters["head_dim_v"]],
        softmax_scale=parameters["softmax_scale"],
        cache_seqlens=x["cache_seqlens"],
        causal=parameters["causal"],
        profile=PROFILE,
    )
    yield Computed("out", bounded.out, bounded.out_error.total)
    yield Computed("lse", bounded.lse, bounded.lse_error.total)


def _sparse_prefill(x: Values, parameters: Parameters) -> Iterator[Computed]:
    entries, rows = x["indices"][:, 0], x["kv"][:, 0]
    yield from _sparse(x, parameters, rows, entries)
    largest, error = max_logits_with_bound(
        x["q"],
        rows,
        entries,
        softmax_scale=parameters["softmax_scale"],
        profile=PROFILE,
        topk_length=x.get("topk_length"),
    )
    yield Computed("max_logits", largest.T, error.total.T)


def _sparse_decode(x: Values, parameters: Parameters) -> Iterator[Computed]:
    rows = x["kv_cache"].reshape(-1, x["kv_cache"].shape[-1])
    return _sparse(x, parameters, np.broadcast_to(rows, (len(x["q"]), *rows.shape)), x["indices"])


def _sparse(x: Values, parameters: Parameters, rows: Array, entries: IntArray) -> Iterator[Computed]:
    bounded = sparse_attention(
        x["q"],
        rows,
        entries,
        head_dim_v=parameters["head_dim_v"],
        softmax_scale=parameters["softmax_scale"],
        profile=PROFILE,
        attn_sink=x.get("attn_sink"),
        topk_length=x.get("topk_length"),
    )
    transposed = x["q"].ndim == 3  # [s, h] in prefill, [b, h, s] in decode
    yield Computed("out", bounded.out, bounded.out_error.total)
    lse, error = bounded.lse, bounded.lse_error.total
    yield Computed("lse", lse.T if transposed else lse, error.T if transposed else error)


def _project_indexer(x: Values, parameters: Parameters) -> Iterator[Computed]:
    config = indexer_config_from(parameters["config"])
    arguments = (x["hidden"], x["q_latent"], x["positions"], layer_weights(x), config)
    operands = project_indexer_with_bound(*arguments, PROFILE)
    yield Computed("q", operands.q, operands.q_error.total)
    yield Computed("k", operands.k, operands.k_error.total)
    yield Computed("weights", operands.weights, operands.weights_error.total)


def _indexer(x: Values, parameters: Parameters) -> Iterator[Computed]:
    logits, error = np.zeros((2, len(x["q"]), len(x["k"])))
    indices = np.full((len(x["q"]), parameters["top_k"]), -1)
    for i in range(len(x["cu_seqlens_q"]) - 1):
        queries, keys = slice(*x["cu_seqlens_q"][i : i + 2]), slice(*x["cu_seqlens_k"][i : i + 2])
        value, bound = indexer_with_bound(x["q"][queries], x["k"][keys], x["weights"][queries], PROFILE)
        s, t = value.shape
        visible = np.maximum(t - s + 1 + np.arange(s), 0)
        shown = np.arange(t) < visible[:, None]
        logits[queries, keys], error[queries, keys] = np.where(shown, value, 0.0), np.where(shown, bound.total, 0.0)
        chosen = select_top_k(value, parameters["top_k"], visible)
        indices[queries] = np.where(chosen < 0, -1, chosen + x["cu_seqlens_k"][i])
    yield Computed("logits", logits, error)
    yield from exactly("indices", indices.astype(np.float64))


COMPUTED: dict[str, Callable[[Values, Parameters], Iterator[Computed]]] = {
    "partial_rope": _partial_rope,
    "write_cache": _write_cache,
    "decode_quantized": _decode_quantized,
    "sparse_prefill": _sparse_prefill,
    "sparse_decode": _sparse_decode,
    "project_indexer": _project_indexer,
    "indexer": _indexer,
}
