"""Faults that cases of sparse attention, the indexer, the caches and weights name are found in a reference that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.project_indexer import project_indexer_with_bound
from mla_spec.bounds.sparse import sparse_attention
from mla_spec.golden.cases.case import rope_from
from mla_spec.golden.corpus import computed_sparse, computed_weights
from mla_spec.reference import indexer as reference_indexer
from mla_spec.reference.block_scales import dequantise_weight
from mla_spec.reference.cache import write_rows
from mla_spec.reference.mla import rms_norm
from mla_spec.reference.quantised_cache import dequantised_cache
from mla_spec.reference.sparse import select_top_k
from mla_spec.reference.tensor_parallel import gather_gradients, shard_layer
from mla_spec.reference.typing import Array, IntArray
from tests.golden.corpus_files import require_refusal

Change = Callable[[Any], Any]


def once(indices: IntArray) -> IntArray:
    """Repetitions dropped."""
    earlier = (indices[:, :, None] == indices[:, None, :]) & np.tri(indices.shape[1], k=-1, dtype=bool)
    return np.where(earlier.any(-1), -1, indices)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sparse-prefill-holes", {"indices": lambda x: np.maximum(x, 1)}),
        ("sparse-prefill-holes", {"indices": lambda x: np.where(x < 0, 0, x)}),
        ("sparse-prefill-repeated", {"indices": once}),
        ("sparse-prefill-length", {"topk_length": lambda x: None}),
        ("sparse-prefill-length", {"topk_length": lambda x: np.full_like(x, x[0])}),
        ("sparse-prefill-sink", {"attn_sink": lambda x: None}),
        ("sparse-prefill-sink", {"attn_sink": lambda x: np.full_like(x, x[2])}),
        ("sparse-prefill-equal-sink", {"attn_sink": lambda x: x + 1}),
        ("sparse-decode-paged", {"topk_length": lambda x: x[::-1]}),
        ("sparse-decode-every-slot", {"indices": lambda x: x % 3}),
    ],
)
def test_faults_of_sparse_attention(name: str, changes: dict[str, Change], monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Array, kv: Array, indices: IntArray, **options: Any) -> Any:
        edited = changes.get("indices", lambda x: x)(indices)
        others = {key: change(options[key]) for key, change in changes.items() if key != "indices"}
        return sparse_attention(q, kv, edited, **{**options, **others})

    require_refusal(monkeypatch, name, computed_sparse, "sparse_attention", attend)


def larger_index(logits: Array, k: int, visible: IntArray) -> IntArray:
    return select_top_k(logits + 1e-9 * np.arange(logits.shape[-1]), k, visible)


def every_key(logits: Array, k: int, visible: IntArray) -> IntArray:
    return select_top_k(logits, k, np.full_like(visible, logits.shape[-1]))


def rotated_last(*arguments: Any) -> Any:
    operands = project_indexer_with_bound(*arguments)
    return replace(operands, q=operands.q[..., ::-1], k=operands.k[..., ::-1])


def keys_by_rms_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return rms_norm(x, weight, eps) + bias


@pytest.mark.parametrize(
    ("name", "target", "attribute", "fault"),
    [
        ("indexer-packed", computed_sparse, "select_top_k", every_key),
        ("indexer-ties", computed_sparse, "select_top_k", larger_index),
        ("project-indexer-half", computed_sparse, "project_indexer_with_bound", rotated_last),
        ("project-indexer-interleaved", reference_indexer, "layer_norm", keys_by_rms_norm),
        ("rope-first-dims", computed_sparse, "rope_from", lambda p: replace(rope_from(p), interleaved=True)),
        ("rope-last-dims", computed_sparse, "rope_from", lambda p: replace(rope_from(p), theta=1e4 ** (4 / 10))),
    ],
)
def test_faults_of_the_indexer(
    name: str, target: Any, attribute: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_refusal(monkeypatch, name, target, attribute, fault)


def test_the_eps_of_the_norm_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference_indexer.layer_norm

    def wrong(x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return right(x, weight, bias, 1e-5)

    require_refusal(monkeypatch, "project-indexer-interleaved", reference_indexer, "layer_norm", wrong)


def first_token_only(kv_cache: Array, latent: Array, k_pe: Array, slots: IntArray) -> Array:
    return write_rows(kv_cache, latent[:1], k_pe[:1], slots[:1])


def last_slot(kv_cache: Array, latent: Array, k_pe: Array, slots: IntArray) -> Array:
    skipped = np.flatnonzero(slots < 0)[:1]
    return write_rows(kv_cache, latent, k_pe, np.where(np.arange(len(slots)) == skipped, 10, slots))


def rope_part_scaled(pages: Any, layout: Any, page_size: int, tensor_scale: float) -> Array:
    cache = dequantised_cache(pages, layout, page_size, tensor_scale=tensor_scale)
    return np.concatenate([cache[..., :512], 0.25 * cache[..., 512:]], axis=-1)


def unscaled(pages: Any, layout: Any, page_size: int, tensor_scale: float) -> Array:
    return dequantised_cache(pages, layout, page_size)


@pytest.mark.parametrize(
    ("name", "attribute", "fault"),
    [
        ("write-cache", "write_rows", first_token_only),
        ("write-cache", "write_rows", last_slot),
        ("decode-fp8-per-tensor", "dequantised_cache", unscaled),
        ("decode-fp8-ds-mla", "dequantised_cache", rope_part_scaled),
    ],
)
def test_faults_of_the_caches(name: str, attribute: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_refusal(monkeypatch, name, computed_sparse, attribute, fault)


def transposed_scales(codes: Array, scales: Array, block_size: tuple[int, int]) -> Array:
    return dequantise_weight(codes, scales.T, block_size)


def keys_then_values(weights: Any, config: Any, ranks: int) -> Any:
    parts = shard_layer(weights, config, ranks)
    halves = np.split(weights["kv_b_proj"], 2 * ranks)
    return [({**own, "kv_b_proj": np.concatenate(halves[i::ranks])}, c) for i, (own, c) in enumerate(parts)]


def latent_rows_of_one_rank(gradients: Any) -> Any:
    whole = gather_gradients(gradients)
    both = whole["kv_a_proj_with_mqa"].copy()
    both[:5] = gradients[0]["kv_a_proj_with_mqa"][:5]
    return {**whole, "kv_a_proj_with_mqa": both}


@pytest.mark.parametrize(
    ("name", "attribute", "fault"),
    [
        ("dequantize-weight", "dequantise_weight", transposed_scales),
        ("shard-layer", "shard_layer", keys_then_values),
        ("gather-gradients", "gather_gradients", latent_rows_of_one_rank),
    ],
)
def test_faults_of_weights(name: str, attribute: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_refusal(monkeypatch, name, computed_weights, attribute, fault)
