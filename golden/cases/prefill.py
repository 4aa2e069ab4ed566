"""Cases of ragged prefill and of merging parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, on_github


def prefill_cases() -> Iterator[Case]:
    """Packed sequences."""
    for name, causal, lengths, purpose, catches, sources in (
        (
            "prefill-ragged",
            True,
            ((3, 3), (2, 6), (0, 2), (4, 2), (1, 1)),
            "sequences of unequal lengths with fewer, as many and more keys than queries, aligned at the end",
            "causal mask aligned top-left; rows without keys that are NaN or an average; the queries' offsets used for "
            "keys; an LSE [tokens, h]",
            (
                "ModelTC/LightLLM/pull/743",
                "deepseek-ai/FlashMLA/commit/2d291b0",
                "vllm-project/vllm/pull/57012",
                "deepseek-ai/DeepSeek-V3/pull/1536",
            ),
        ),
        (
            "prefill-not-causal",
            False,
            ((3, 4), (2, 0)),
            "every query sees every key of its sequence; one sequence has none",
            "a mask applied all the same; keys of the neighbouring sequence read; a mask that adds 1 and not -inf",
            ("vllm-project/vllm-ascend/pull/2781",),
        ),
    ):
        numbers = Numbers(name)
        queries, keys = (np.cumsum([0, *count]) for count in zip(*lengths, strict=True))
        yield Case(
            name=name,
            operation="prefill",
            purpose=purpose,
            catches=catches,
            sources=on_github(*sources),
            parameters={"softmax_scale": 0.6, "causal": causal},
            inputs={
                "q": numbers.array(int(queries[-1]), 2, 7, size=2.0),
                "k": numbers.array(int(keys[-1]), 2, 7),
                "v": numbers.array(int(keys[-1]), 2, 4),
                "cu_seqlens_q": queries.astype(np.int32),
                "cu_seqlens_k": keys.astype(np.int32),
            },
        )


def kernel_prefill_cases() -> Iterator[Case]:
    """The widths that kernels are built for."""
    name, scale = "prefill-kernel-dims", 192**-0.5
    queries, keys = (np.array(offsets, dtype=np.int32) for offsets in ([0, 2, 3], [0, 2, 6]))
    numbers = Numbers(name)
    yield Case(
        name=name,
        operation="prefill",
        purpose="QK of 128 + 64 and V of 128 in bfloat16: a new prompt of two tokens, and one token after three",
        catches="V read with the stride of K, or padded to 192 and not cut; rope columns taken for those of the next head; "
        "the scale of 128 columns",
        sources=on_github("ROCm/aiter/pull/2954"),
        parameters={"softmax_scale": scale, "causal": True},
        inputs={
            "q": numbers.array(3, 2, 192, size=2.0, dtype="bfloat16"),
            "k": numbers.array(6, 2, 192, dtype="bfloat16"),
            "v": np.array([1.0, -1.0] * 64) * numbers.array(6, 2, 128, centre=1.0, dtype="bfloat16"),
            "cu_seqlens_q": queries,
            "cu_seqlens_k": keys,
        },
        dtype="bfloat16",
    )


def option_prefill_cases() -> Iterator[Case]:
    """A window of keys, and a sink of each head."""
    name = "prefill-sink-and-window"
    queries, keys = (np.array(offsets, dtype=np.int32) for offsets in ([0, 5, 6, 8], [0, 5, 12, 13]))
    numbers = Numbers(name)
    yield Case(
        name=name,
        operation="prefill",
        purpose="windows of three keys and a sink for each of two heads: a new prompt of five tokens, one token after six, and two "
        "queries over one key, the first of which sees none",
        catches="a window aligned at the start of the keys, or of one key more or less; the sink counted in the LSE, or the same "
        "for all heads; a row without keys that is not 0",
        sources=on_github("vllm-project/vllm/pull/52156", "modular/modular/pull/6591"),
        parameters={"softmax_scale": 0.6, "causal": True, "window": 3},
        inputs={
            "q": numbers.array(8, 2, 7, size=2.0),
            "k": numbers.array(13, 2, 7),
            "v": numbers.array(13, 2, 4),
            "cu_seqlens_q": queries,
            "cu_seqlens_k": keys,
            "attn_sink": np.array([0.75, -1.5]),
        },
    )


def merge_cases() -> Iterator[Case]:
    """Parts of one attention."""
    far = [(700.25, -700.5), (0.5, 0.25), (-40.0, -10.5), (10000.0, 10001.0), (-20000.0, -20003.0), (30.0, 0.0)]
    yield _merge_case(
        "merge-far-apart",
        far,
        "two parts whose LSEs are equal, near and 1400 apart, and too large for exp",
        "weights exp(lse) formed without subtracting the maximum; parts averaged; base 2 taken for base e",
        ("vllm-project/vllm/pull/47079", "vllm-project/vllm/pull/28840"),
    )
    yield _merge_case(
        "merge-three-parts",
        [
            (2.5, -1.25, 0.75),
            (-0.5, -0.5, -0.5),
            (0.0, 9.0, 18.0),
            (-75.0, -74.5, -76.25),
            (1.0, 1.0, -40.0),
            (5.0, 4.0, 3.0),
        ],
        "three parts that all count, with LSEs of both signs and some equal",
        "parts merged two by two without the LSE of the first two; heads and queries of the LSE exchanged",
        ("vllm-project/vllm-xpu-kernels/pull/479", "sgl-project/sglang/issues/9363"),
    )
    none = -math.inf
    empty = [
        (none, 0.5, none),
        (1.5, none, -0.25),
        (none, none, none),
        (none, none, 3.0),
        (0.0, 1.0, 2.0),
        (none, 0.0, 0.0),
    ]
    yield _merge_case(
        "merge-empty-parts",
        empty,
        "three parts, some or all without keys (LSE -inf)",
        "-inf minus -inf; a row without keys that is NaN; an LSE of 0 taken for an empty part",
        ("ROCm/aiter/pull/2106", "ROCm/aiter/pull/2128"),
    )


def _merge_case(
    name: str, lses: Sequence[tuple[float, ...]], purpose: str, catches: str, sources: tuple[str, ...]
) -> Case:
    h, s, v = 3, 2, 4
    lse = np.array(lses).T.reshape(-1, 1, h, s)  # [parts, 1, h, s]
    outs = Numbers(name).array(len(lse), 1, s, h, v)  # [parts, 1, s, h, v]
    outs[np.isneginf(np.swapaxes(lse, -1, -2))] = 0.0
    return Case(
        name=name,
        operation="merge",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        inputs={"outs": outs, "lses": lse},
    )
