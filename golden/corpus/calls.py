"""How a subject is asked what a golden case asks for: the operation, and the inputs of the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.golden.cases.case import config_from, indexer_config_from, layer_weights, rope_from
from mla_spec.golden.corpus.stored import StoredCase
from mla_spec.operations import (
    absorb,
    decode,
    dequantize_weight,
    indexer,
    merge,
    prefill,
    project_indexer,
    quantised_cache,
    quantised_decode,
    ragged,
    rank_decode,
    rope,
    sparse,
    write_cache,
)
from mla_spec.operations.operation import Operation
from mla_spec.reference.block_scales import CODE, dequantise_weight
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.formats import decode_bits, round_to
from mla_spec.reference.quantised_cache import dequantised_cache

WIDE = ("attn_sink", "lses", "scales", "weights")
"""Inputs that are float32, or float64 where the case is, whatever the dtype of a subject."""


def _arguments(case: StoredCase, *names: str) -> dict[str, Any]:
    """Inputs and parameters of a case by name; None for what it does not have."""
    return {name: case.inputs.get(name, case.parameters.get(name)) for name in names}


def _decode(case: StoredCase) -> Any:
    names = ("q", "kv_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale", "causal")
    return decode.DecodeInputs(**_arguments(case, *names, *decode.OPTIONS))


def _ragged_decode(case: StoredCase) -> Any:
    names = ("q", "kv_cache", "block_table", "cache_seqlens", "cu_seqlens_q", "head_dim_v", "softmax_scale", "causal")
    return ragged.RaggedDecodeInputs(**_arguments(case, *names))


def _rank_decode(case: StoredCase) -> Any:
    names = ("q", "kv_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale", "causal")
    return rank_decode.RankDecodeInputs(**_arguments(case, *names, "ranks", "rank", "interleave"))


def _sparse(case: StoredCase, rows: str) -> Any:
    names = ("q", "indices", "head_dim_v", "softmax_scale", "attn_sink", "topk_length")
    return sparse.SparseInputs(kv=case.inputs[rows], **_arguments(case, *names))


def _decode_quantized(case: StoredCase) -> Any:
    page_size, pages = case.parameters["page_size"], case.inputs["pages"].astype(np.uint8)
    scale = case.parameters["tensor_scale"]
    rows = dequantised_cache(pages, layout_of(case.parameters["layout"]), page_size, tensor_scale=scale)
    exact = _decode(replace(case, inputs={**case.inputs, "kv_cache": rows}))
    return quantised_decode.QuantisedDecodeInputs(
        pages=pages, exact=exact, format=case.parameters["layout"], page_size=page_size, tensor_scale=scale
    )


def _unpack(case: StoredCase) -> Any:
    return quantised_cache.PagesInputs(
        pages=case.inputs["pages"].astype(np.uint8),
        rows=case.expected["rows"],
        format=case.parameters["layout"],
        page_size=case.parameters["page_size"],
        tensor_scale=case.parameters["tensor_scale"],
    )


def _weight(case: StoredCase) -> Any:
    codes, block_size = decode_bits(case.inputs["codes"], CODE), tuple(case.parameters["block_size"])
    scales = case.inputs["scales"]
    weight = dequantise_weight(codes, scales, block_size)
    return dequantize_weight.WeightInputs(codes, scales, block_size, weight)


def _project_indexer(case: StoredCase) -> Any:
    names = ("hidden", "q_latent", "positions")
    config = indexer_config_from(case.parameters["config"])
    return project_indexer.ProjectIndexerInputs(
        weights=layer_weights(case.inputs), config=config, **_arguments(case, *names)
    )


PREFILL = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "softmax_scale", "causal", *decode.OPTIONS)
INDEXER = ("q", "k", "weights", "cu_seqlens_q", "cu_seqlens_k", "top_k")
WRITE = ("latent", "k_pe", "kv_cache", "slot_mapping")

CALLS: dict[str, tuple[Operation, Callable[[StoredCase], Any]]] = {
    "rope": (
        rope.OPERATION,
        lambda case: rope.RopeInputs(case.inputs["x"], case.inputs["positions"], rope_from(case.parameters["rope"])),
    ),
    "absorb": (
        absorb.OPERATION,
        lambda case: absorb.AbsorbInputs(case.inputs["kv_b_proj"], config_from(case.parameters["config"])),
    ),
    "prefill": (prefill.OPERATION, lambda case: prefill.PrefillInputs(**_arguments(case, *PREFILL))),
    "decode": (decode.OPERATION, _decode),
    "ragged_decode": (ragged.OPERATION, _ragged_decode),
    "rank_decode": (rank_decode.OPERATION, _rank_decode),
    "merge": (merge.OPERATION, lambda case: merge.MergeInputs(**_arguments(case, "outs", "lses"))),
    "write_cache": (write_cache.OPERATION, lambda case: write_cache.WriteInputs(**_arguments(case, *WRITE))),
    "dequantize_weight": (dequantize_weight.OPERATION, _weight),
    "unpack": (quantised_cache.DEQUANTIZE_CACHE, _unpack),
    "decode_quantized": (quantised_decode.OPERATION, _decode_quantized),
    "sparse_prefill": (sparse.SPARSE_PREFILL, partial(_sparse, rows="kv")),
    "sparse_decode": (sparse.SPARSE_DECODE, partial(_sparse, rows="kv_cache")),
    "project_indexer": (project_indexer.OPERATION, _project_indexer),
    "indexer": (indexer.OPERATION, lambda case: indexer.IndexerInputs(**_arguments(case, *INDEXER))),
}
"""By the operation of a golden case, the operation of a subject that computes it, and the inputs of the call."""


def dtypes_of(case: StoredCase, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``dtypes`` that hold every input of a case exactly."""

    def holds(dtype: str) -> bool:
        for name, x in case.inputs.items():
            if x.dtype.kind == "f":
                wide = "float64" if dtype == "float64" else "float32"
                fmt = wide if name in WIDE else dtype
                if not np.array_equal(round_to(x, fmt), x, equal_nan=True):
                    return False
        return True

    return tuple(dtype for dtype in dtypes if holds(dtype))
