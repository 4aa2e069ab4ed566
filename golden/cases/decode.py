"""Cases of decode from a paged cache."""

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


def paged(numbers: Numbers, rows: list[Array], *, page_size: int) -> dict[str, NDArray[Any]]:
    """A paged cache of the rows [t, c+r] of each sequence: pages shuffled, every unused slot NaN."""
    lengths = [len(r) for r in rows]
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + 1  # one that no sequence uses
    order = numbers.permutation(pages)
    cache = np.full((pages, page_size, 1, rows[0].shape[1]), CANONICAL_NAN)
    table = np.full((len(rows), max(needed) + 1), order[-1], dtype=np.int32)
    free = iter(order)
    for sequence, count, own in zip(rows, needed, table, strict=True):
        own[:count] = [next(free) for _ in range(count)]
        for j, row in enumerate(sequence):
            cache[own[j // page_size], j % page_size, 0] = row
    return {"kv_cache": cache, "block_table": table, "cache_seqlens": np.array(lengths, dtype=np.int32)}


def latent_rows(numbers: Numbers, length: int, c: int, r: int, dtype: str = "float64") -> Array:
    """Rows [t, c+r] of latents around ±1 and rope keys around 0."""
    sign = np.array([1.0, -1.0] * c)[:c]
    latent = sign * numbers.array(length, c, centre=1.0, dtype=dtype)
    return np.concatenate([latent, numbers.array(length, r, dtype=dtype)], axis=-1)


def _decode_case(
    name: str,
    purpose: str,
    catches: str,
    *sources: str,
    seqlens: tuple[int, ...],
    s: int = 1,
    h: int = 3,
    c: int = 6,
    r: int = 4,
    page_size: int = 4,
    causal: bool = True,
    dtype: str = "float64",
    scale: float = 0.4,
) -> Case:
    numbers = Numbers(name)
    rows = [latent_rows(numbers, n, c, r, dtype) for n in seqlens]
    return Case(
        name=name,
        operation="decode",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"softmax_scale": scale, "head_dim_v": c, "causal": causal},
        inputs={
            "q": numbers.array(len(seqlens), s, h, c + r, size=2.0, dtype=dtype),
            **paged(numbers, rows, page_size=page_size),
        },
        dtype=dtype,
    )


def decode_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield _decode_case(
        "decode-paged",
        "ragged lengths in shuffled pages, one of them 0; unused slots hold NaN, unused table entries a page of NaN",
        "pages taken in the order of storage; slots past the length read, even with weight 0; 0/0 in the empty sequence",
        "flashinfer-ai/flashinfer/pull/942",
        "vllm-project/vllm/pull/49427",
        seqlens=(5, 0, 13, 1),
    )
    yield _decode_case(
        "decode-several-queries",
        "three queries per sequence, aligned at the end; the first ones of short sequences see no key",
        "query i sees i keys too many or too few; rows without keys that are not 0 and -inf",
        "flashinfer-ai/flashinfer/pull/348",
        "vllm-project/vllm/pull/51065",
        "ROCm/aiter/pull/2106",
        seqlens=(0, 1, 2, 6),
        s=3,
    )
    yield _decode_case(
        "decode-not-causal",
        "three queries per sequence, each seeing all keys",
        "the causal mask applied whatever the flag says; a mask of 0 and 1 that is added",
        "huggingface/transformers/pull/48363",
        seqlens=(2, 5),
        s=3,
        causal=False,
    )
    yield _decode_case(
        "decode-long",
        "131 keys in pages of 64, so the last page and the last tile of 128 hold three",
        "a tail of the keys left out or read beyond its end; values stepped by c where rows are c + r wide",
        "ikawrakow/ik_llama.cpp/pull/2031",
        "flashinfer-ai/flashinfer/pull/3022",
        seqlens=(131,),
        h=2,
        c=4,
        r=2,
        page_size=64,
    )
    yield _decode_case(
        "decode-deepseek-v3",
        "the dimensions that kernels are built for: 512/64 in pages of 64, bfloat16, a page with one key",
        "anything that only shows at these dimensions: tiles, vector loads, the scale (128 + 64)^-1/2 taken for 576^-1/2",
        "flashinfer-ai/flashinfer/pull/787",
        "ROCm/aiter/pull/2954",
        seqlens=(65,),
        h=4,
        c=512,
        r=64,
        page_size=64,
        dtype="bfloat16",
        scale=192**-0.5,
    )
    yield from _large_logits()
    yield _one_hot()
    yield _uniform()
    yield _huge_logits()
    for dtype in ("bfloat16", "float16"):
        yield _decode_case(
            f"decode-{dtype}",
            f"{dtype} inputs taken as the exact numbers they are; the results are float64",
            "inputs rounded again, or read in another 16-bit format or byte order",
            "ml-explore/mlx-lm/pull/868",
            seqlens=(5, 0, 9),
            h=2,
            c=8,
            dtype=dtype,
        )


def kernel_cases() -> Iterator[Case]:
    """The widths that kernels are built for, with few keys."""
    yield _decode_case(
        "decode-kernel-dims",
        "512 + 64 in pages of 2, bfloat16: two queries of a sequence with five keys, the newest two of them their own",
        "values read from the rope columns, or 576 of them; the second query without its own key; the scale of 576 columns",
        "flashinfer-ai/flashinfer/pull/787",
        "flashinfer-ai/flashinfer/pull/348",
        seqlens=(5,),
        s=2,
        h=1,
        c=512,
        r=64,
        page_size=2,
        dtype="bfloat16",
        scale=192**-0.5,
    )


def option_cases() -> Iterator[Case]:
    """A sink of each head, and a window of keys."""
    name, sinks = "decode-sink", [-math.inf, -20.0, 1.25, 3.5, 300.0, math.inf]
    c, r = 4, 2
    numbers = Numbers(name)
    yield Case(
        name=name,
        operation="decode",
        purpose="one sink per head: none (-inf), far below, near and far above the LSE, and all (+inf), which the LSE does not "
        "count; a sequence without keys",
        catches="the sink dropped, added once for each split of the keys, or taken of another head; inf minus inf; a sink in base 2",
        sources=on_github(
            "vllm-project/vllm/pull/52156", "ROCm/rocm-libraries/pull/12229", "modular/modular/pull/6591"
        ),
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": True},
        inputs={
            "q": numbers.array(2, 1, len(sinks), c + r, size=2.0),
            **paged(numbers, [latent_rows(numbers, n, c, r) for n in (9, 0)], page_size=4),
            "attn_sink": np.array(sinks),
        },
    )
    window, lengths, s = 4, (11, 3), 2
    numbers = Numbers("decode-window")
    rows = [latent_rows(numbers, n, c, r) for n in lengths]
    yield Case(
        name="decode-window",
        operation="decode",
        purpose="two queries that see four keys each, the last ones up to their own",
        catches="a window of one key more or less, aligned at the start of the keys, or the same for both queries",
        sources=on_github("vllm-project/vllm/pull/52156"),
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": True, "window": window},
        inputs={"q": numbers.array(len(lengths), s, 2, c + r, size=2.0), **paged(numbers, rows, page_size=4)},
    )


def _large_logits() -> Iterator[Case]:
    for name, size, catches, sources in (
        (
            "decode-large-logits",
            78.125,
            "softmax without its maximum subtracted; a mask or a first maximum of -1e4; logits in 16 bits",
            (),
        ),
        (
            "decode-beyond-float16",
            781.25,
            "a mask or a first maximum of -5e4, below which keys vanish; scores that overflow in float16",
            ("flashinfer-ai/flashinfer/pull/4401", "lablup/mlxcel/pull/618"),
        ),
    ):
        numbers = Numbers(name)
        c, r, lengths = 4, 2, (6, 9)
        rows = [numbers.array(n, c + r) for n in lengths]
        for row in rows:
            row[:, 0] = size
        q = numbers.array(len(lengths), 1, 2, c + r, size=2.0)
        q[..., 0] = [128.0, -128.0]
        yield Case(
            name=name,
            operation="decode",
            purpose=f"logits near {128 * size:g} and {-128 * size:g} that differ by about 1, so several keys share the weight",
            catches=catches,
            sources=on_github(*sources),
            parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
            inputs={"q": q, **paged(numbers, rows, page_size=4)},
        )


def _one_hot() -> Case:
    numbers = Numbers("decode-one-hot-rope")
    c, r, length, page_size = 3, 2, 7, 3
    targets = (0, page_size - 1, page_size, length - 1)
    rows = []
    for target in targets:
        row = np.zeros((length, c + r))
        row[:, :c] = np.arange(length)[:, None] + np.array([1.0, 0.5, -64.0])  # the value names its token
        row[target, c] = 64.0
        rows.append(row)
    q = np.zeros((len(targets), 1, 2, c + r))
    q[..., c] = [4.0, 8.0]
    return Case(
        name="decode-one-hot-rope",
        operation="decode",
        purpose="one key leads by 256 through its rope part alone: first and last of a page, of the sequence, of another",
        catches="the rope part left out of the scores or read from the wrong columns; a token taken from its neighbour",
        sources=on_github("sqliteai/warp/pull/27", "flashinfer-ai/flashinfer/pull/3022"),
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **paged(numbers, rows, page_size=page_size)},
        exact=("out", "lse"),
    )


def _uniform() -> Case:
    numbers = Numbers("decode-uniform")
    c, r = 4, 2
    rows = [np.concatenate([numbers.integers(n, c), numbers.array(n, r)], axis=-1) for n in (8, 16)]
    return Case(
        name="decode-uniform",
        operation="decode",
        purpose="queries of 0: the mean of small integers over 8 and 16 keys, and lse log 8 and log 16",
        catches="a key counted twice or not at all; an LSE in base 2; an output scaled as a whole",
        sources=on_github("flashinfer-ai/flashinfer/pull/3838", "vllm-project/vllm/pull/47079"),
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": True},
        inputs={"q": np.zeros((2, 1, 2, c + r)), **paged(numbers, rows, page_size=4)},
        exact=("out",),
    )


def _huge_logits() -> Case:
    numbers = Numbers("decode-huge-logits")
    c, big = 3, 2.0**499
    rows = np.concatenate([numbers.integers(5, c), np.zeros((5, 2))], axis=-1)
    rows[:, c] = big * np.array([1.0, 0.75, -1.5, 1.125, -1.0])
    rows[:, c + 1] = -big * np.array([1.5, 1.25, 1.0, 1.75, 1.125])
    q = np.zeros((1, 1, 3, c + 2))
    q[0, 0, 0, c] = q[0, 0, 2, c + 1] = big / 2
    q[0, 0, 1, c] = -big / 2
    return Case(
        name="decode-huge-logits",
        operation="decode",
        purpose="logits of about 1e300, of both signs and all negative, each exact in float64",
        catches="a mask or a first maximum that is finite, such as -1e30; overflow to NaN",
        sources=on_github("flashinfer-ai/flashinfer/pull/4401"),
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **paged(numbers, [rows], page_size=2)},
        exact=("out", "lse"),
    )
