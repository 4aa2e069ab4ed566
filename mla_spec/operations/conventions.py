"""Conventions in which implementations of attention differ, as data: what a subject computes that has another than the contract's.

A convention is recognized, not guessed: it is named where results that are wrong are right under it, within the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result, Results, computed

Seen = tuple[Any, Results]
"""Inputs and results."""


@dataclass(frozen=True)
class Convention:
    """One convention other than the contract's.

    Attributes:
        what: a sentence on the subject.
        topic: what it is about, of ``mla_spec.judging.finding.TOPICS``.
        seen: from inputs and results, inputs and results of a call that obeys the contract, if the subject obeys this convention;
            None where the two conventions say the same.
        declare: what a subject that has it by intent should declare; empty where nothing allows it.
    """

    what: str
    topic: str
    seen: Callable[[Any, Results], Seen | None]
    declare: str = ""


def _with_scale(scale: Callable[[Any], float]) -> Callable[[Any, Results], Seen]:
    return lambda inputs, got: (replace(inputs, softmax_scale=scale(inputs)), got)


def _with_lse(arrange: Callable[[Any, Array], Array]) -> Callable[[Any, Results], Seen | None]:
    """Results whose LSE is arranged or converted."""

    def seen(inputs: Any, got: Results) -> Seen | None:
        if got.lse is None:
            return None
        lse = computed(arrange(inputs, got.lse.value), got.lse.what)
        return inputs, Results({"out": got.out, "lse": lse})

    return seen


def _another_mask(inputs: Any, got: Results) -> Seen:
    return replace(inputs, causal=not inputs.causal), got


def _infinite_with_other_sign(inputs: Any, lse: Array) -> Array:
    return np.where(np.isinf(lse), -lse, lse)


def _rope_first(inputs: Any, got: Results) -> Seen | None:
    """Rows [k_pe | latent]: the values are the last elements."""
    r = inputs.q.shape[-1] - inputs.head_dim_v
    if not r:
        return None
    return replace(inputs, q=np.roll(inputs.q, -r, -1), kv_cache=np.roll(inputs.kv_cache, -r, -1)), got


def _top_left_decode(inputs: Any, got: Results) -> Seen | None:
    """Query i sees keys 0 .. i: each query is a sequence of its own."""
    b, s = inputs.q.shape[:2]
    if not inputs.causal or s == 1:
        return None
    lengths = np.minimum(inputs.cache_seqlens[:, None], np.arange(1, s + 1)).reshape(-1)
    alone = replace(
        inputs,
        q=inputs.q.reshape(b * s, 1, *inputs.q.shape[2:]),
        block_table=inputs.block_table.repeat(s, axis=0),
        cache_seqlens=lengths.astype(np.int32),
    )
    out = got.out.arranged(lambda x: x.reshape(b * s, 1, *x.shape[2:]))
    lse: Result | None = got.lse
    if lse is not None:
        lse = lse.arranged(lambda x: x.swapaxes(1, 2).reshape(b * s, -1, 1))
    return alone, Results({"out": out, "lse": lse})


def _top_left_prefill(inputs: Any, got: Results) -> Seen | None:
    """Query i sees keys 0 .. i: keys beyond the last query do not count, and queries beyond the last key see all."""
    s, t = np.diff(inputs.cu_seqlens_q), np.diff(inputs.cu_seqlens_k)
    if not inputs.causal or (s == t).all() or (s > t).any():
        return None
    kept = np.concatenate([start + np.arange(n) for start, n in zip(inputs.cu_seqlens_k, s, strict=False)])
    offsets = inputs.cu_seqlens_q.astype(np.int32)
    return replace(inputs, k=inputs.k[kept], v=inputs.v[kept], cu_seqlens_k=offsets), got


def _top_left_ragged(inputs: Any, got: Results) -> Seen | None:
    """Query i sees keys 0 .. i: each query is a sequence of its own."""
    queries, keys = np.diff(inputs.cu_seqlens_q), inputs.cache_seqlens
    if not inputs.causal or (queries == keys).all():
        return None
    place = np.arange(len(inputs.q)) - inputs.cu_seqlens_q[:-1].repeat(queries)
    alone = replace(
        inputs,
        block_table=inputs.block_table.repeat(queries, axis=0),
        cache_seqlens=np.minimum(keys.repeat(queries), place + 1).astype(np.int32),
        cu_seqlens_q=np.arange(len(inputs.q) + 1, dtype=np.int32),
    )
    return alone, got


SCALES = (
    Convention("softmax_scale is left out: it is 1", "scores", _with_scale(lambda _: 1.0)),
    Convention(
        "softmax_scale is not the one that is passed but the root of the head dim, q.shape[-1]^-1/2",
        "scores",
        _with_scale(lambda inputs: float(inputs.q.shape[-1]) ** -0.5),
    ),
    Convention(
        "the softmax takes powers of 2, not of e",
        "scores",
        _with_scale(lambda inputs: float(inputs.softmax_scale * np.log(2))),
    ),
)
"""Of scores: any attention."""

_SHARED = (
    Convention("the LSE is a logarithm of base 2", "lse", _with_lse(lambda _, lse: lse * np.log(2))),
    Convention(
        "the LSE is a natural logarithm, converted as one of base 2", "lse", _with_lse(lambda _, lse: lse / np.log(2))
    ),
    *SCALES,
    Convention(
        "causal is not honored: it is taken for its opposite", "mask", _another_mask, "causal=(...), what is honored"
    ),
    Convention(
        "rows without keys have an LSE of the other sign",
        "lse",
        _with_lse(_infinite_with_other_sign),
        'empty_row="zero/+inf"',
    ),
)

_ROPE_FIRST = Convention(
    "the values are the last elements of a row, as if the rope part came first", "values", _rope_first
)


def _top_left(seen: Callable[[Any, Results], Seen | None]) -> Convention:
    return Convention("the mask is top-left: query i sees keys 0 .. i", "mask", seen)


RANK_CONVENTIONS = (
    *_SHARED,
    Convention(
        "the LSE is laid out [b, s, h], not [b, h, s]",
        "lse",
        _with_lse(lambda _, lse: lse.reshape(lse.shape[0], lse.shape[2], lse.shape[1]).swapaxes(1, 2)),
    ),
    Convention(
        "the LSE is laid out [h, b·s] where [b·s, h] was expected",
        "lse",
        _with_lse(lambda _, lse: lse.swapaxes(1, 2).reshape(lse.shape[1], lse.shape[0], -1).swapaxes(0, 1)),
    ),
    _ROPE_FIRST,
)

DECODE_CONVENTIONS = (*RANK_CONVENTIONS, _top_left(_top_left_decode))

_BY_TOKEN = Convention(
    "the LSE is laid out [tokens, h], not [h, tokens]", "lse", _with_lse(lambda _, lse: lse.reshape(lse.shape[::-1]).T)
)

PREFILL_CONVENTIONS = (*_SHARED, _BY_TOKEN, _top_left(_top_left_prefill))

RAGGED_CONVENTIONS = (
    *_SHARED,
    _BY_TOKEN,
    Convention(
        "the LSE is laid out [h, tokens] where [tokens, h] was expected",
        "lse",
        _with_lse(lambda _, lse: lse.T.reshape(lse.shape)),
    ),
    _ROPE_FIRST,
    _top_left(_top_left_ragged),
)
