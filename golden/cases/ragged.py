"""Cases of packed queries over a paged cache, and of the keys of one rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, on_github
from mla_spec.golden.cases.decode import latent_rows, paged
from mla_spec.reference.context_parallel import own_tokens


def _ragged_case(
    name: str,
    purpose: str,
    catches: str,
    *sources: str,
    lengths: tuple[tuple[int, int], ...],
    h: int = 3,
    c: int = 6,
    r: int = 4,
    page_size: int = 4,
    causal: bool = True,
    dtype: str = "float64",
    scale: float = 0.4,
) -> Case:
    """``lengths``: queries and keys of each sequence."""
    numbers = Numbers(name)
    rows = [latent_rows(numbers, keys, c, r, dtype) for _, keys in lengths]
    offsets = np.cumsum([0, *(queries for queries, _ in lengths)]).astype(np.int32)
    return Case(
        name=name,
        operation="ragged_decode",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"softmax_scale": scale, "head_dim_v": c, "causal": causal},
        inputs={
            "q": numbers.array(int(offsets[-1]), h, c + r, size=2.0, dtype=dtype),
            **paged(numbers, rows, page_size=page_size),
            "cu_seqlens_q": offsets,
        },
        dtype=dtype,
    )


def ragged_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield _ragged_case(
        "ragged-mixed",
        "a prompt, a decoded token, a sequence without queries, a prompt after a cached prefix, a token without keys, more "
        "queries than keys; unused slots hold NaN",
        "rows of decoded tokens put first; the mask of the longest prompt; the cached prefix left out; the table or the length "
        "of the neighbor; an LSE [tokens, h]",
        "vllm-project/vllm/pull/14253",
        "xLLM-AI/xllm/pull/2161",
        "vllm-project/vllm/pull/51065",
        "vllm-project/vllm/pull/57012",
        lengths=((3, 3), (1, 7), (0, 2), (4, 9), (1, 0), (3, 2)),
    )
    yield _ragged_case(
        "ragged-not-causal",
        "every query sees every key of its sequence, of which two end with a page",
        "a mask applied all the same; a full last page taken for an empty one; keys found as if no page were partly filled",
        "sgl-project/sglang-jax/issues/1297",
        lengths=((2, 5), (1, 8), (3, 4)),
        causal=False,
    )
    yield _one_hot()
    yield _ragged_case(
        "ragged-kernel-dims",
        "512 + 64 in pages of 2, bfloat16: a decoded token with three keys, and two tokens after a prefix of three",
        "anything that only shows at these dimensions; pages taken to follow each other; the scale of 576 columns",
        "flashinfer-ai/flashinfer/issues/3219",
        "flashinfer-ai/flashinfer/pull/787",
        lengths=((1, 3), (2, 5)),
        h=1,
        c=512,
        r=64,
        page_size=2,
        dtype="bfloat16",
        scale=192**-0.5,
    )


def rank_cases() -> Iterator[Case]:
    """Of context parallelism: the keys of one rank, of which a case holds no others."""
    yield _rank_case(
        "rank-blocks",
        "the second of three ranks, tokens dealt in blocks of 2, three queries: blocks that a query sees in part, and no keys",
        "the mask of decode, whose last keys are the newest; whole blocks masked; tokens taken to be dealt singly",
        seqlens=(9, 2, 16, 4),
        s=3,
        ranks=3,
        rank=1,
        interleave=2,
    )
    yield _rank_case(
        "rank-singles",
        "the first of two ranks, tokens dealt singly, an odd length and an even one, two queries",
        "lengths rounded down; the other rank's tokens; an LSE of the whole",
        seqlens=(7, 8),
        s=2,
        ranks=2,
        rank=0,
        interleave=1,
    )


def _rank_case(name: str, purpose: str, catches: str, *, seqlens: tuple[int, ...], s: int, **dealt: int) -> Case:
    numbers, c, r = Numbers(name), 4, 2
    own = own_tokens(np.array(seqlens), **dealt)
    rows = [latent_rows(numbers, int(n), c, r) for n in own]
    return Case(
        name=name,
        operation="rank_decode",
        purpose=purpose,
        catches=catches,
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": True, **dealt},
        inputs={
            "q": numbers.array(len(seqlens), s, 2, c + r, size=2.0),
            **paged(numbers, rows, page_size=2),
            "cache_seqlens": np.array(seqlens, dtype=np.int32),
        },
    )


def _one_hot() -> Case:
    """The keys at the boundary of what a query sees lead, each by more than the one before it."""
    name, c, page_size = "ragged-one-hot", 3, 3
    lengths = ((3, 7), (1, 5), (2, 2))
    rows = []
    for _, keys in lengths:
        row = np.zeros((keys, c + 2))
        row[:, :c] = np.arange(keys)[:, None] + np.array([1.0, 0.5, -64.0])  # the value names its token
        row[:, c] = 64.0 * np.arange(keys)
        rows.append(row)
    offsets = np.cumsum([0, *(queries for queries, _ in lengths)]).astype(np.int32)
    q = np.zeros((int(offsets[-1]), 2, c + 2))
    q[..., c] = [16.0, 32.0]
    return Case(
        name=name,
        operation="ragged_decode",
        purpose="each key leads all before it by 1024 or more, so that every query gives the value of the last key that it sees",
        catches="a mask that is top-left or one key off; a query of a prompt that sees the newest key; offsets off by one",
        sources=on_github("deepseek-ai/DeepSeek-V3/pull/1536", "flashinfer-ai/flashinfer/pull/348"),
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **paged(Numbers(name), rows, page_size=page_size), "cu_seqlens_q": offsets},
        exact=("out", "lse"),
    )
