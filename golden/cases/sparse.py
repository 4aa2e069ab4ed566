"""Cases of sparse attention: holes, repetitions, lengths and sinks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.golden.cases.case import (
    CANONICAL_NAN,
    Case,
    Numbers,
    on_github,
)
from mla_spec.reference.typing import Array

BEYOND = 2**31 - 1


def sparse_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield _sparse_prefill(
        "sparse-prefill-holes",
        "-1, the number of keys and the largest integer anywhere among the indices, which select nothing; one row is empty; "
        "rows that nothing selects hold NaN, the first one among them",
        "an entry valid by its place and not by its value; -1 clamped to 0 or read from the end; lanes that select nothing "
        "reading row 0 with weight 0; NaN in empty rows",
        (
            "NVIDIA/cudnn-frontend/pull/298",
            "flashinfer-ai/flashinfer/issues/5095",
            "sgl-project/sglang/pull/39288",
            "ROCm/aiter/pull/2106",
        ),
        indices=[
            [3, -1, 7, 1, -1],
            [-1, -1, 5, -1, 2],
            [-1, -1, -1, -1, -1],
            [9, 6, BEYOND, 2, 9],
            [4, 1, 2, 3, 5],
        ],
        unread=(0, 8),
    )
    yield _sparse_prefill(
        "sparse-prefill-repeated",
        "indices that occur two and three times in a row are as many keys; every key of some rows is the same",
        "repetitions counted once, as a set",
        (),
        indices=[[2, 2, 5, 2], [0, 1, 1, 0], [6, 6, 6, 6], [3, -1, 3, 4]],
    )
    yield _sparse_prefill(
        "sparse-prefill-length",
        "topk_length from 0 to the number of indices; entries from there on name rows of NaN or none",
        "topk_length not passed on, taken for one length for all rows, or for the last entry that is read",
        ("vllm-project/vllm/pull/36616",),
        indices=[[1, 2, 8, 8], [3, 4, 5, 8], [8, 8, 8, 8], [7, 6, 5, 4], [2, -1, 3, -1]],
        topk_length=[2, 3, 0, 4, 3],
        unread=(0, 8),
    )
    yield _sparse_prefill(
        "sparse-prefill-sink",
        "one sink per head: none (-inf), far below, near and far above the LSE, and all (+inf); max_logits and LSE do not "
        "count it",
        "the sink dropped, counted in the LSE, or one value for all heads; inf minus inf; a sink in base 2",
        ("vllm-project/vllm/pull/54568",),
        indices=[[0, 3, 5], [-1, 2, 4], [-1, -1, -1], [6, 6, 1]],
        attn_sink=[-math.inf, -20.0, 1.25, 3.5, 300.0, math.inf],
    )
    yield _equal_sink()
    yield _sparse_decode(
        "sparse-decode-paged",
        "slots of a paged pool, page times page size plus row, for two queries of three sequences, with a length for each "
        "sequence and a sink; slots that nothing selects hold NaN",
        "slots taken for token numbers; lengths laid out by query before sequence; an LSE [b, s, h]",
        ("vllm-project/vllm/pull/57012", "sgl-project/sglang/issues/9363"),
        indices=[
            [[8, 2, 11, 5], [3, 8, 8, 15]],
            [[4, -1, 5, 0], [0, 0, 0, 0]],
            [[-1, 20, 1, 9], [10, 9, 1, 3]],
        ],
        topk_length=[3, 0, 4],
        attn_sink=[0.5, -math.inf],
        unread=(5, 6, 7, 15, 16, 17),
    )
    yield _sparse_decode(
        "sparse-decode-every-slot",
        "every slot of the pool in another order for each query: decode over all of them, in bfloat16",
        "an index counted from the page's start; anything that depends on the order of the indices",
        (),
        indices=[[[17, 3, 5, 0, 11, 8, 2, 14, 9, 16, 1, 6, 12, 4, 10, 15, 7, 13]], [list(range(18))]],
        dtype="bfloat16",
    )


def _shared(numbers: Numbers, rows: tuple[int, ...], unread: tuple[int, ...], dtype: str) -> Array:
    """Rows [*rows, 1, c+r], NaN where no index leads."""
    c, r = 5, 2
    sign = np.array([1.0, -1.0] * c)[:c]
    count = math.prod(rows)
    kv = np.concatenate(
        [sign * numbers.array(count, c, centre=1.0, dtype=dtype), numbers.array(count, r, dtype=dtype)], axis=-1
    )
    kv[list(unread)] = CANONICAL_NAN
    return kv.reshape(*rows, 1, c + r)


def _options(topk_length: list[int] | None, attn_sink: list[float] | None) -> dict[str, NDArray[Any]]:
    options: dict[str, NDArray[Any]] = {}
    if attn_sink is not None:
        options["attn_sink"] = np.array(attn_sink)
    if topk_length is not None:
        options["topk_length"] = np.array(topk_length, dtype=np.int32)
    return options


def _sparse_prefill(
    name: str,
    purpose: str,
    catches: str,
    sources: tuple[str, ...],
    *,
    indices: list[list[int]],
    topk_length: list[int] | None = None,
    attn_sink: list[float] | None = None,
    unread: tuple[int, ...] = (),
) -> Case:
    numbers = Numbers(name)
    heads = 2 if attn_sink is None else len(attn_sink)
    return Case(
        name=name,
        operation="sparse_prefill",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"softmax_scale": 0.5, "head_dim_v": 5},
        inputs={
            "q": numbers.array(len(indices), heads, 7, size=2.0),
            "kv": _shared(numbers, (9,), unread, "float64"),
            "indices": np.array(indices, dtype=np.int32)[:, None],
            **_options(topk_length, attn_sink),
        },
    )


def _sparse_decode(
    name: str,
    purpose: str,
    catches: str,
    sources: tuple[str, ...],
    *,
    indices: list[list[list[int]]],
    topk_length: list[int] | None = None,
    attn_sink: list[float] | None = None,
    unread: tuple[int, ...] = (),
    dtype: str = "float64",
) -> Case:
    numbers = Numbers(name)
    b, s = len(indices), len(indices[0])
    return Case(
        name=name,
        operation="sparse_decode",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"softmax_scale": 0.5, "head_dim_v": 5},
        inputs={
            "q": numbers.array(b, s, 2, 7, size=2.0, dtype=dtype),
            "kv_cache": _shared(numbers, (6, 3), unread, dtype),
            "indices": np.array(indices, dtype=np.int32),
            **_options(topk_length, attn_sink),
        },
        dtype=dtype,
        dtypes={} if dtype == "float64" else {"attn_sink": "float32"},
    )


def _equal_sink() -> Case:
    numbers = Numbers("sparse-prefill-equal-sink")
    c, r = 4, 2
    return Case(
        name="sparse-prefill-equal-sink",
        operation="sparse_prefill",
        purpose="queries of 0 that select one key each, beside a sink of 0: the out is exactly half of the value, the LSE 0",
        catches="a sink that takes more or less than its share, or that is scaled like a score",
        sources=on_github("vllm-project/vllm/pull/54568"),
        parameters={"softmax_scale": 0.5, "head_dim_v": c},
        inputs={
            "q": np.zeros((3, 2, c + r)),
            "kv": numbers.integers(4, 1, c + r),
            "indices": np.array([[[2, -1]], [[-1, 0]], [[3, 4]]], dtype=np.int32),
            "attn_sink": np.zeros(2),
        },
        exact=("out", "max_logits", "lse"),
    )
