"""Regimes: the kinds of numbers and structure that cases have, by which coverage is counted.

A case may belong to several; every regime of a kind of case is one that some law should see in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mla_spec.operations.case import Case

Regime = tuple[str, Callable[[Any], bool]]
"""A name, and whether a case belongs to it."""


def _has(field: str, value: str, case: Any) -> bool:
    return bool(getattr(case, field) == value)


def _values(field: str, *values: str) -> list[Regime]:
    return [(value, partial(_has, field, value)) for value in values]


SCORES: list[Regime] = [
    ("flat scores", lambda case: case.logit_std <= 0.1),
    ("moderate scores", lambda case: 0.1 < case.logit_std <= 4),
    ("peaked scores", lambda case: 4 < case.logit_std <= 256),
    ("huge scores", lambda case: case.logit_std > 256),
]
QUERIES: list[Regime] = [
    ("one query", lambda case: case.s == 1),
    ("several queries", lambda case: case.s > 1),
]
PACKED: list[Regime] = [
    ("no keys", lambda case: 0 in case.seqlens_k),
    ("no queries", lambda case: 0 in case.seqlens_q),
    ("more keys than queries", lambda case: any(t > n for n, t in _lengths(case))),
    ("fewer keys than queries", lambda case: any(t < n for n, t in _lengths(case))),
]
ROTARY: list[Regime] = [
    *_values("layout", "interleaved", "half"),
    ("unscaled", lambda case: case.yarn == case.longrope == "none"),
    ("yarn", lambda case: case.yarn != "none"),
    ("longrope", lambda case: case.longrope != "none"),
    ("from position 0", lambda case: case.start == 0),
    ("far positions", lambda case: case.start >= 60),
]
SPARSE: list[Regime] = [
    *_values("regime", "typical", "outlier", "ties"),
    *SCORES,
    ("all entries valid", lambda case: case.invalid == 0),
    ("invalid entries", lambda case: case.invalid > 0),
    ("duplicates", lambda case: case.duplicates),
    ("rows that select nothing", lambda case: case.empty_rows),
    ("topk_length", lambda case: case.with_length),
    ("no sink", lambda case: case.sink == "none"),
    ("finite sink", lambda case: case.sink == "finite"),
    ("infinite sink", lambda case: case.sink == "infinite"),
]
PREFILL: list[Regime] = [*_values("regime", "typical", "outlier", "ties"), *SCORES, *PACKED]
INDEXER: list[Regime] = [*_values("regime", "typical", "ties", "integers"), *PACKED]
LAYER: list[Regime] = [
    ("one token in all", lambda case: case.prompt + case.steps == 1),
    ("a prompt of several", lambda case: case.prompt > 1),
    ("query compression", lambda case: case.q_lora_rank is not None),
    ("no query compression", lambda case: case.q_lora_rank is None),
    ("a published model", lambda case: case.model != "none"),
    ("no rotary embedding", lambda case: case.config.rope is None),
    ("rotary embedding", lambda case: case.config.rope is not None),
    ("factors on latents", lambda case: case.config.mla_scale_q_lora or case.config.mla_scale_kv_lora),
    ("temperature by position", lambda case: case.config.llama_4_scaling is not None),
    ("small hidden states", lambda case: case.hidden_scale < 1),
]
DECODING: list[Regime] = [
    ("decoded tokens", lambda case: case.steps > 0),
    ("no decoded token", lambda case: case.steps == 0),
]

REGIMES: dict[str, list[Regime]] = {
    "rope": ROTARY,
    "prefill": PREFILL,
    "prefill_backward": [*PREFILL, *_values("regime", "exact")],
    "decode": [
        *_values("regime", "typical", "outlier", "ties", "offset", "sink", "cancelling"),
        *SCORES,
        *QUERIES,
        ("no keys", lambda case: 0 in case.seqlens),
        ("ragged lengths", lambda case: len(set(case.seqlens)) > 1),
    ],
    "merge": [
        ("one part", lambda case: case.parts == 1),
        ("two parts and more", lambda case: case.parts > 1),
        ("near LSEs", lambda case: case.lse_std <= 1),
        ("LSEs far apart", lambda case: case.lse_std >= 30),
        ("LSEs near 0", lambda case: abs(case.lse_mean) <= 5),
        ("LSEs beyond exp", lambda case: abs(case.lse_mean) >= 200),
        ("empty parts", lambda case: 0 < case.empty < 1),
        ("only empty parts", lambda case: case.empty == 1),
        ("batched", lambda case: case.batch > 0),
        ("packed", lambda case: case.batch == 0),
    ],
    "write": [
        ("every token has a slot", lambda case: case.skipped == 0),
        ("tokens without a slot", lambda case: 0 < case.skipped < 1),
        ("no token has a slot", lambda case: case.skipped == 1),
        ("pages of one token", lambda case: case.page_size == 1),
        ("pages of several tokens", lambda case: case.page_size > 1),
    ],
    "weight": [
        ("whole blocks", lambda case: not _partial(case)),
        ("smaller last blocks", lambda case: _partial(case)),
        ("several blocks", lambda case: case.rows > case.block_rows and case.columns > case.block_columns),
        ("published block size", lambda case: case.block_size == (128, 128)),
        ("powers of two", lambda case: case.power_of_two),
        ("any scales", lambda case: not case.power_of_two),
    ],
    "quantise": _values("regime", "typical", "zeros", "outlier", "rope", "tiny", "huge", "edges"),
    "pages": [
        ("powers of two", lambda case: case.power_of_two),
        ("any scales", lambda case: not case.power_of_two),
    ],
    "quantised-decode": [
        *_values("regime", "typical", "outlier", "ties", "offset", "sink", "zeros", "rope"),
        *SCORES,
        *QUERIES,
        ("no keys", lambda case: 0 in case.seqlens),
    ],
    "sparse_prefill": SPARSE,
    "sparse_backward": SPARSE,
    "sparse_decode": [*SPARSE, *QUERIES],
    "project_indexer": [
        *ROTARY,
        ("no rotary embedding", lambda case: case.rope_dim == 0),
        ("small hidden states", lambda case: case.hidden_scale < 1),
    ],
    "indexer": INDEXER,
    "indexed_attention": [*INDEXER, *SCORES],
    "layer": [*LAYER, *DECODING],
    "layer_gradient": LAYER,
    "quantised-layer": LAYER,
    "sharded-layer": [
        *LAYER,
        *DECODING,
        ("one rank", lambda case: case.ranks == 1),
        ("ranks", lambda case: case.ranks > 1),
    ],
}
"""The regimes of each kind of case."""


def regimes_of(case: Case) -> tuple[str, ...]:
    """The regimes to which a case belongs."""
    return tuple(name for name, holds in REGIMES[case.kind] if holds(case))


def _partial(case: Any) -> bool:
    """Whether the last blocks of rows or columns are smaller than the others."""
    return bool(case.rows % case.block_rows or case.columns % case.block_columns)


def _lengths(case: Any) -> list[tuple[int, int]]:
    return list(zip(case.seqlens_q, case.seqlens_k, strict=True))
