"""Cases of the indexer, of its operands, and of vectors of which a part is rotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, on_github
from mla_spec.golden.cases.rope import SHORT_YARN
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.indexer import IndexerConfig, indexer_weight_shapes
from mla_spec.reference.typing import Array


def partial_rope_cases() -> Iterator[Case]:
    """Rotated dims first, as in the indexer, and last, as in the attention."""
    for name, rope, start, purpose, catches, sources in (
        (
            "rope-first-dims",
            RopeConfig(dim=4, interleaved=False),
            0,
            "the first 4 of 10 dims rotated in the half layout, as in DeepSeek-V3.2's indexer",
            "rotated and plain dims exchanged; pairs that reach over all 10 dims; frequencies of 10 dims",
            ("NVIDIA/Megatron-LM/pull/3026", "sgl-project/sglang/pull/13495"),
        ),
        (
            "rope-last-dims",
            RopeConfig(dim=4),
            6,
            "the last 4 of 10 dims rotated, as in the queries of the attention",
            "the first dims rotated; half of the rotated dims left as they are; frequencies of 10 dims",
            ("vllm-project/vllm/pull/41185", "pie-project/pie/pull/603"),
        ),
    ):
        positions = np.array([0, 1, 4096, 163839])
        yield Case(
            name=name,
            operation="partial_rope",
            purpose=purpose,
            catches=catches,
            sources=on_github(*sources),
            parameters={"rope": asdict(rope), "start": start},
            inputs={"x": Numbers(name).array(len(positions), 2, 10), "positions": positions},
        )


def indexer_cases() -> Iterator[Case]:
    """Operands of the indexer, then what it makes of them."""
    half = RopeConfig(dim=4, theta=100.0, interleaved=False, yarn=SHORT_YARN)
    yield _operands(
        "project-indexer-half",
        half,
        1.0,
        "the operands of DeepSeek-V3.2's indexer: the first dims rotated in the half layout, with YaRN, and a LayerNorm",
        "the last dims rotated; interleaved pairs, as in the attention; RMSNorm; the norm's bias left out; the scale of "
        "another head dim; YaRN left out",
        ("NVIDIA/Megatron-LM/pull/3026", "sgl-project/sglang/pull/13495", "tenstorrent/tt-metal/pull/47832"),
    )
    yield _operands(
        "project-indexer-interleaved",
        RopeConfig(dim=4, theta=1000.0),
        2.0**-10,
        "the operands of GLM-5's indexer: interleaved pairs; hidden states of about 1e-3, so that the norm's eps is visible",
        "pairs of the half layout; an eps of 1e-5, or added outside the root; weights of the heads rounded to 16 bits",
        ("sgl-project/sglang/pull/13459",),
    )
    yield _packed()
    yield _ties()


def _operands(
    name: str, rope: RopeConfig, hidden_size: float, purpose: str, catches: str, sources: tuple[str, ...]
) -> Case:
    config = IndexerConfig(
        hidden_size=7, q_lora_rank=5, index_n_heads=3, index_head_dim=10, index_topk=4, rope=rope, k_norm_eps=1e-6
    )
    numbers = Numbers(name)

    def weight(key: str, shape: tuple[int, ...]) -> Array:
        options = {"size": 0.5, "centre": 1.0} if key == "k_norm.weight" else {}
        values: Array = numbers.array(*shape, **options)
        return values

    weights = {f"weights.{key}": weight(key, shape) for key, shape in indexer_weight_shapes(config).items()}
    return Case(
        name=name,
        operation="project_indexer",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"config": asdict(config)},
        inputs={
            **weights,
            "hidden": numbers.array(4, 7, size=hidden_size),
            "q_latent": numbers.array(4, 5),
            "positions": np.array([0, 1, 2, 4095]),
        },
    )


def _packed() -> Case:
    numbers = Numbers("indexer-packed")
    queries, keys = np.cumsum([0, 3, 0, 2, 1]), np.cumsum([0, 7, 2, 2, 3])
    return Case(
        name="indexer-packed",
        operation="indexer",
        purpose="packed sequences with more keys than queries, no queries, and as many; weights of both signs; top_k below and "
        "above the number of keys that a query sees",
        catches="future keys selected; one sequence of all; indices that count within their sequence; relu after the sum of "
        "the heads; no -1 where fewer keys are visible",
        sources=on_github("huggingface/transformers/pull/48363"),
        parameters={"top_k": 4},
        inputs={
            "q": numbers.array(6, 2, 5),
            "k": numbers.array(14, 5),
            "weights": numbers.array(6, 2),
            "cu_seqlens_q": queries.astype(np.int32),
            "cu_seqlens_k": keys.astype(np.int32),
        },
    )


def _ties() -> Case:
    numbers = Numbers("indexer-ties")
    signs = np.sign(numbers.integers(8, 4))
    return Case(
        name="indexer-ties",
        operation="indexer",
        purpose="numbers of -1, 0 and 1, so that many logits are equal and exact in every format: the smaller index is "
        "selected; one query sees exactly top_k keys",
        catches="of equal logits the larger index; a threshold that is not found where exactly top_k keys are visible",
        sources=on_github("tile-ai/tilelang/pull/2513"),
        parameters={"top_k": 3},
        inputs={
            "q": np.sign(numbers.integers(6, 2, 4)),
            "k": signs[[0, 1, 0, 2, 1, 3, 0, 2]],
            "weights": np.ones((6, 2)),
            "cu_seqlens_q": np.array([0, 6], dtype=np.int32),
            "cu_seqlens_k": np.array([0, 8], dtype=np.int32),
        },
        exact=("logits", "indices"),
    )
