"""The bound of ragged prefill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.operand_rounding import query_error
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.reference.prefill import packed_sequences
from mla_spec.reference.typing import Array, IntArray


def prefill_with_bound(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    *,
    softmax_scale: float,
    profile: Profile,
    causal: bool = True,
    window: int | None = None,
    attn_sink: Array | None = None,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
) -> BoundedAttention:
    """``prefill`` and the error of computing it as ``profile`` says; arguments and errors are those of both.

    ``failure`` is of each sequence.
    """
    rounding = query_error(q, softmax_scale, profile)  # one scale may be that of all sequences
    parts = [
        attention_with_bound(
            q[queries],
            k[keys],
            v[keys],
            softmax_scale=softmax_scale,
            profile=profile,
            causal=causal,
            window=window,
            attn_sink=attn_sink,
            sink_joins=True,
            query_error=rounding[queries],
            probable=probable,
            failure=failure,
        )
        for queries, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    ]
    return packed(parts)


def packed(parts: Sequence[BoundedAttention]) -> BoundedAttention:
    """Sequences, each [s, h, dv] and [h, s], on one axis of tokens."""
    return BoundedAttention(
        out=np.concatenate([part.out for part in parts]),
        out_error=_joined([part.out_error for part in parts], axis=0),
        lse=np.concatenate([part.lse for part in parts], axis=-1),
        lse_error=_joined([part.lse_error for part in parts], axis=-1),
        out_error_probable=_joined([part.out_error_probable for part in parts], axis=0),
        lse_error_probable=_joined([part.lse_error_probable for part in parts], axis=-1),
    )


def _joined(bounds: Sequence[ErrorBound], axis: int) -> ErrorBound:
    """The bounds of sequences as one."""
    return ErrorBound(
        {name: np.concatenate([bound.terms[name] for bound in bounds], axis=axis) for name in bounds[0].terms}
    )
