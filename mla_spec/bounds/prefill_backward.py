"""The worst-case error of the gradients of ragged and of sparse prefill."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mla_spec.bounds.attention_backward import BackwardAttention, Gradients, attention_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import Bounded, perhaps_stored, stored
from mla_spec.reference.backward import scattered
from mla_spec.reference.formats import Rounding, format_of
from mla_spec.reference.prefill import packed_sequences
from mla_spec.reference.sparse import selected_indices, selected_rows
from mla_spec.reference.typing import Array, IntArray


def prefill_backward_with_bound(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    out_grad: Array,
    *,
    softmax_scale: float,
    profile: Profile,
    causal: bool = True,
    out_grad_error: Array | None = None,
    lse_grad: Array | None = None,
    lse_grad_error: Array | None = None,
) -> Gradients:
    """``prefill_backward`` and its worst-case error; arguments and errors are those of both.

    ``out_grad_error`` [tokens, h, dv] and ``lse_grad_error`` [h, tokens] are those of ``attention_backward_with_bound``.
    """

    def queries_of(x: Array | None, queries: slice) -> Array | None:
        return None if x is None else x[..., queries]

    parts = [
        attention_backward_with_bound(
            q[queries],
            k[keys],
            v[keys],
            out_grad[queries],
            softmax_scale=softmax_scale,
            profile=profile,
            causal=causal,
            out_grad_error=None if out_grad_error is None else out_grad_error[queries],
            lse_grad=queries_of(lse_grad, queries),
            lse_grad_error=queries_of(lse_grad_error, queries),
        )
        for queries, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    ]
    dq, dk, dv = (
        Bounded(np.concatenate([x.value for x in grads]), np.concatenate([x.error for x in grads]))
        for grads in zip(*parts, strict=True)
    )
    return dq, dk, dv


def sparse_prefill_backward_with_bound(
    q: Array,
    kv: Array,
    indices: IntArray,
    out_grad: Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    profile: Profile,
    attn_sink: Array | None = None,
    topk_length: IntArray | None = None,
    lse_grad: Array | None = None,
) -> tuple[Bounded, Bounded]:
    """``sparse_prefill_backward`` and its worst-case error; arguments are those of both.

    The gradients that a row gets as a key and as a value, and from each entry that selects it, may be stored before they are
    added, one after the other, as automatic differentiation does.
    """
    rows, count = selected_rows(kv, indices, topk_length)
    key = rows[..., None, :]  # [..., s, k, 1, d]
    attention = BackwardAttention.of(
        q[..., None, :, :],  # one query per set of keys
        key,
        key[..., :head_dim_v],
        softmax_scale=softmax_scale,
        profile=profile,
        cache_seqlens=count,
        causal=False,
        attn_sink=attn_sink,
    )
    dlse = None if lse_grad is None else np.swapaxes(lse_grad, -1, -2)[..., None]  # [..., s, h, 1]
    gradients = attention.gradients(out_grad[..., None, :, :], lse_grad=dlse)
    dq, as_key, as_value = gradients[0], *(_either_way(perhaps_stored, x, profile) for x in gradients[1:])
    rest = [*[(0, 0)] * (as_key.value.ndim - 1), (0, kv.shape[-1] - head_dim_v)]
    as_value = as_value.map(lambda x: np.pad(x, rest))
    each = _either_way(perhaps_stored, Bounded(as_key.value + as_value.value, as_key.error + as_value.error), profile)
    dkv = _added_up(each[..., 0, :], *selected_indices(kv, indices, topk_length), kv.shape[-2], profile)
    return stored(dq[..., 0, :, :], profile.dtype, profile.output_rounding), _either_way(stored, dkv, profile)


def _either_way(store: Callable[[Bounded, str, Rounding], Bounded], x: Bounded, profile: Profile) -> Bounded:
    """x stored by the subject, or by automatic differentiation around it, which rounds to nearest."""
    roundings: tuple[Rounding, Rounding] = ("nearest", profile.output_rounding)
    return Bounded(x.value, np.maximum(*(store(x, profile.dtype, rounding).error for rounding in roundings)))


def _added_up(rows: Bounded, chosen: IntArray, count: IntArray, t: int, profile: Profile) -> Bounded:
    """Rows [..., s, k, d] ``scattered`` to [..., t, d], one after the other and stored in between."""
    size = np.abs(rows.value) + rows.error
    value, error, size, entries = (
        scattered(x, chosen, count, t) for x in (rows.value, rows.error, size, np.ones_like(size))
    )
    doubled = 2 if profile.output_rounding == "truncate" else 1
    roundings = (entries - 1) * doubled * format_of(profile.dtype).unit_roundoff
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = roundings / np.maximum(1 - roundings, 0.0)  # γ
        return Bounded(value, error + np.where(size > 0, rate * size, 0.0))
