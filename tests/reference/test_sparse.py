"""Sparse attention: indexer, selection, attention over what is selected, and the attention sink."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.sparse import sparse_attention
from mla_spec.reference.attention import attention
from mla_spec.reference.formats import round_to
from mla_spec.reference.sparse import indexer_logits, select_top_k
from mla_spec.reference.typing import Array, IntArray

EXACT = Profile.default("float64")
SCALE = 0.5


def operands(seed: int, lead: tuple[int, ...] = (), s: int = 2, h: int = 3, t: int = 9, d: int = 6) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*lead, s, h, d)), rng.standard_normal((*lead, t, d))


def sparse(q: Array, kv: Array, indices: IntArray, **options: Any) -> BoundedAttention:
    return sparse_attention(q, kv, indices, head_dim_v=4, softmax_scale=SCALE, profile=EXACT, **options)


def assert_same(got: BoundedAttention, out: Array, lse: Array) -> None:
    """Within what float64 may be off on both sides."""
    assert (np.abs(got.out - out) <= 2 * got.out_error.total).all()
    infinite = np.isneginf(lse)
    assert (np.isneginf(got.lse) == infinite).all()
    assert (np.abs(np.where(infinite, 0, got.lse) - np.where(infinite, 0, lse)) <= 2 * got.lse_error.total).all()


def test_logits_are_those_written_out() -> None:
    q, k = operands(1, (2,))
    weights = np.random.default_rng(2).standard_normal((2, 2, 3))
    logits = indexer_logits(q, k, weights)
    for b, s, t in itertools.product(range(2), range(2), range(9)):
        want = sum(weights[b, s, h] * max(0.0, float(q[b, s, h] @ k[b, t])) for h in range(3))
        # Nine products and three more of order one in float64.
        assert abs(logits[b, s, t] - want) < 64 * 2.0**-53 * np.abs(weights[b, s]).sum() * 36


def test_the_largest_are_selected_and_of_equal_ones_the_first() -> None:
    logits = np.array([[2.0, 3.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 5.0, 9.0]])
    np.testing.assert_array_equal(select_top_k(logits, 2, np.array([5, 5])), [[1, 2], [4, 3]])
    np.testing.assert_array_equal(select_top_k(logits, 4, np.array([5, 3])), [[1, 2, 4, 0], [0, 1, 2, -1]])
    np.testing.assert_array_equal(select_top_k(logits, 7, np.array([5, 0])), [[1, 2, 4, 0, 3, -1, -1], [-1] * 7])


def test_of_many_equal_logits_the_first_are_selected() -> None:
    """Short rows are sorted by an algorithm that is stable anyway."""
    logits = np.tile([1.0, 0.0], 500)[None]
    np.testing.assert_array_equal(select_top_k(logits, 600, np.array([1000]))[0, :500], np.arange(0, 1000, 2))
    np.testing.assert_array_equal(select_top_k(logits, 600, np.array([1000]))[0, 500:], np.arange(1, 200, 2))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_all_indices_in_any_order_are_dense_attention(lead: tuple[int, ...]) -> None:
    q, kv = operands(3, lead)
    rng = np.random.default_rng(4)
    indices = rng.permuted(np.broadcast_to(np.arange(9), (*lead, 2, 9)), axis=-1)
    dense = attention(q, kv[..., None, :], kv[..., None, :4], softmax_scale=SCALE, causal=False)
    assert_same(sparse(q, kv, indices), *dense)


def test_each_query_attends_to_what_its_row_selects() -> None:
    q, kv = operands(5)
    indices = np.array([[4, -1, 0, 9, 4, 2**31 - 1], [-1, -1, -1, -1, 9, -1]])
    got = sparse(q, kv, indices)
    rows = kv[[4, 0, 4]]  # twice the key that is selected twice
    out, lse = attention(q[:1], rows[:, None], rows[:, None, :4], softmax_scale=SCALE, causal=False)
    assert_same(
        got, np.concatenate([out, np.zeros((1, 3, 4))]), np.concatenate([lse, np.full((3, 1), -np.inf)], axis=1)
    )


@pytest.mark.parametrize("length", [np.array(2), np.array([2, 0])])
def test_entries_beyond_topk_length_are_not_read(length: IntArray) -> None:
    q, kv = operands(6)
    indices = np.array([[3, 1, 5], [8, 7, 6]])
    cut = np.array([[3, 1, -1], [8, 7, -1] if length.ndim == 0 else [-1, -1, -1]])
    got, want = sparse(q, kv, indices, topk_length=length), sparse(q, kv, cut)
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


def with_sink_key(q: Array, kv: Array, sink: Array) -> Array:
    """Output of attention with one more key of value 0 and score ``sink``, written out."""
    s, h = q.shape[:2]
    more = np.zeros((s, h, h))
    more[:, np.arange(h), np.arange(h)] = 1.0
    last = np.concatenate([np.zeros(kv.shape[1]), sink / SCALE])
    keys = np.concatenate([np.pad(kv, [(0, 0), (0, h)]), last[None]])[:, None]
    out, _ = attention(np.concatenate([q, more], -1), keys, keys[..., :4], softmax_scale=SCALE, causal=False)
    return out


@pytest.mark.parametrize("size", [0.1, 3.0, 40.0, 800.0])
def test_a_sink_is_one_more_key_with_value_0(size: float) -> None:
    q, kv = operands(7)
    sink = size * np.array([-1.0, 0.3, 1.0])
    got = sparse(q, kv, np.tile(np.arange(9), (2, 1)), attn_sink=sink)
    without = sparse(q, kv, np.tile(np.arange(9), (2, 1)))
    assert_same(got, with_sink_key(q, kv, sink), without.lse)


def test_infinite_sinks_and_rows_without_keys() -> None:
    q, kv = operands(8)
    indices = np.array([[0, 1, 2], [-1, -1, -1]])
    sink = np.array([np.inf, -np.inf, 0.0])
    got, without = sparse(q, kv, indices, attn_sink=sink), sparse(q, kv, indices)
    assert (got.out[:, 0] == 0).all()
    np.testing.assert_array_equal(got.out[:, 1], without.out[:, 1])
    assert (got.out[1] == 0).all()
    np.testing.assert_array_equal(got.lse, without.lse)
    assert np.isfinite(got.out_error.total).all()


def float32_with_sink(q: Array, kv: Array, sink: Array, base: float, dtype: str) -> Array:
    """Attention and its sink in float32, P and the output rounded to ``dtype``, the LSE read as one to ``base``."""
    f32 = np.float32
    scores = (q[0].astype(f32) @ kv.T.astype(f32)) * f32(SCALE)
    m = scores.max(-1, keepdims=True)
    p = np.exp(scores - m)
    total = p.sum(-1, keepdims=True, dtype=f32)
    out = round_to(p.astype(float), dtype).astype(f32) @ kv[:, :4].astype(f32) / total
    lse = m + np.log(total)
    share = f32(1) / (f32(1) + f32(base) ** (sink.astype(f32)[:, None] - lse))
    return round_to((out * share).astype(float), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_honest_sink_stays_within_the_bound_and_one_to_the_wrong_base_does_not(dtype: str) -> None:
    profile = Profile.default(dtype)
    for seed, size in itertools.product(range(8), (0.0, 3.0, 30.0)):
        q, kv = (round_to(x, dtype) for x in operands(seed, s=1, t=40))
        sink = round_to(2.0 + size * np.random.default_rng(seed).standard_normal(3), "float32")
        want = attention_with_bound(
            q, kv[:, None], kv[:, None, :4], softmax_scale=SCALE, profile=profile, causal=False, attn_sink=sink
        )
        error = np.abs(float32_with_sink(q, kv, sink, np.e, dtype) - want.out[0])
        assert (error <= want.out_error.total[0]).all(), (seed, size)
        wrong = np.abs(float32_with_sink(q, kv, sink, 2.0, dtype) - want.out[0])
        assert size > 3 or (wrong > want.out_error.total[0]).any(), (seed, size)
