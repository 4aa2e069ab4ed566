"""Cases of gradients of attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mla_spec.golden.cases.case import (
    CANONICAL_NAN,
    Case,
    Numbers,
    on_github,
)


def gradient_cases() -> Iterator[Case]:
    """Of packed sequences, and of sparse attention."""
    yield _prefill()
    yield _sparse()


def _prefill() -> Case:
    numbers = Numbers("prefill-gradients")
    queries, keys = np.cumsum([0, 2, 0, 3, 1]), np.cumsum([0, 4, 2, 2, 0])
    q, k, v = numbers.array(6, 2, 3, size=2.0), numbers.array(8, 2, 3), numbers.array(8, 2, 2)
    return Case(
        name="prefill-gradients",
        operation="prefill_backward",
        purpose="a loss that depends on out and on the LSE; sequences with more and fewer keys than queries, with no queries, "
        "and with no keys",
        catches="NaN or anything but 0 for queries that see no key and keys that no query sees; gradients of one sequence in "
        "another; the scale left out; the gradient of the LSE ignored",
        sources=on_github("Dao-AILab/flash-attention/pull/2421", "ROCm/flash-attention/pull/179"),
        parameters={"softmax_scale": 0.6, "causal": True},
        inputs={
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": queries.astype(np.int32),
            "cu_seqlens_k": keys.astype(np.int32),
            "out_grad": numbers.array(6, 2, 2),
            "lse_grad": numbers.array(2, 6),
        },
    )


def _sparse() -> Case:
    numbers = Numbers("sparse-prefill-gradients")
    c, r, rows = 3, 2, 6
    kv = numbers.array(rows, 1, c + r)
    kv[5] = CANONICAL_NAN
    return Case(
        name="sparse-prefill-gradients",
        operation="sparse_prefill_backward",
        purpose="each row of kv gets the gradients of a key and of a value, from every query and entry that selects it, "
        "repetitions included; a finite sink; a row of indices that selects nothing, and a row of kv that holds NaN",
        catches="gradients of repeated indices stored over each other; gradients of -1 in some row; the value's part left out; "
        "the sink's share left out",
        sources=on_github("tile-ai/tilelang/pull/1588", "Dao-AILab/flash-attention/pull/2755"),
        parameters={"softmax_scale": 0.6, "head_dim_v": c},
        inputs={
            "q": numbers.array(4, 2, c + r, size=2.0),
            "kv": kv,
            "indices": np.array([[1, 1, 4], [-1, 0, 1], [-1, 6, -1], [3, 1, 3]], dtype=np.int32)[:, None],
            "attn_sink": np.array([0.5, -1.25]),
            "out_grad": numbers.array(4, 2, c),
            "lse_grad": numbers.array(4, 2),
        },
    )
