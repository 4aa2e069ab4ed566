"""Gradients of attention: against complex-step derivatives, autograd in float64, and what follows from the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.reference.attention import attention
from mla_spec.reference.backward import attention_backward, prefill_backward, sparse_prefill_backward
from mla_spec.reference.typing import Array, IntArray

STEP = 1e-30
"""Of complex-step derivatives, which have no cancellation: f'(x) = Im f(x + ih) / h but for terms of h²."""

SHAPES = [
    # s, h, g, t, seqlen, causal
    (3, 4, 2, 5, 5, True),
    (3, 4, 1, 5, 4, False),
    (5, 2, 2, 3, 3, True),
    (2, 2, 1, 4, 1, True),
    (1, 1, 1, 1, 1, True),
    (2, 3, 3, 4, 0, False),
]


def operands(seed: int, s: int, h: int, g: int, t: int) -> list[Array]:
    """q, k, v, out_grad and lse_grad."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in ((s, h, 3), (t, g, 3), (t, g, 2), (s, h, 2), (h, s))]


def complex_attention(q: Any, k: Any, v: Any, seen: IntArray, scale: float) -> tuple[Any, Any]:
    """Out [s, h, dv] and LSE [h, s] of numbers that may be complex, with query i seeing ``seen[i]`` keys."""
    s, h = q.shape[:2]
    out, lse = np.zeros((s, h, v.shape[-1]), complex), np.zeros((h, s), complex)
    for i in range(s):
        for head in range(h):
            group = head * k.shape[1] // h
            weights = np.exp(scale * (k[: seen[i], group] @ q[i, head]))
            if seen[i]:
                out[i, head] = weights @ v[: seen[i], group] / weights.sum()
                lse[head, i] = np.log(weights.sum())
    return out, lse


def complex_step(loss: Callable[..., Any], arguments: list[Array]) -> list[Array]:
    """The derivatives of ``loss`` with respect to each element of each argument."""
    gradients = []
    for n, x in enumerate(arguments):
        gradient = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            moved = x.astype(complex)
            moved[index] += 1j * STEP
            gradient[index] = loss(*arguments[:n], moved, *arguments[n + 1 :]).imag / STEP
        gradients.append(gradient)
    return gradients


def assert_equal(got: Array, want: Array) -> None:
    """Equal to a few roundoffs of the largest element."""
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= 64 * np.finfo(float).eps * max(1.0, np.abs(want).max(initial=0))


@pytest.mark.parametrize(("s", "h", "g", "t", "seqlen", "causal"), SHAPES)
def test_gradients_are_complex_step_derivatives(s: int, h: int, g: int, t: int, seqlen: int, causal: bool) -> None:
    q, k, v, out_grad, lse_grad = operands(1, s, h, g, t)
    seen = np.maximum(seqlen - s + 1 + np.arange(s), 0) if causal else np.full(s, seqlen)

    def loss(*arguments: Any) -> Any:
        out, lse = complex_attention(*arguments, seen, 0.7)
        return (out * out_grad).sum() + (lse * lse_grad).sum()

    got = attention_backward(
        q, k, v, out_grad, softmax_scale=0.7, cache_seqlens=seqlen, causal=causal, lse_grad=lse_grad
    )
    for a, b in zip(got, complex_step(loss, [q, k, v]), strict=True):
        assert_equal(a, b)


def test_gradients_are_those_of_autograd() -> None:
    """Torch's own attention in float64, with logits of standard deviation 4 over 40 keys."""
    q, k, v, out_grad, _ = operands(2, 40, 2, 2, 40)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    heads_first = [x.transpose(0, 1) for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=2.0)
    out.transpose(0, 1).backward(torch.tensor(out_grad))
    for a, b in zip(attention_backward(q, k, v, out_grad, softmax_scale=2.0), leaves, strict=True):
        assert b.grad is not None
        assert_equal(a, b.grad.numpy())


def test_gradient_of_keys_adds_up_to_zero() -> None:
    """A vector added to every key changes no output."""
    q, k, v, out_grad, _ = operands(3, 3, 4, 2, 9)
    _, dk, _ = attention_backward(q, k, v, out_grad, softmax_scale=1.0, causal=False)
    assert np.abs(dk).max() > 0.1
    assert_equal(dk.sum(axis=0), np.zeros(dk.shape[1:]))


def test_gradient_through_the_lse_alone_is_the_weights() -> None:
    q, k, v, out_grad, _ = operands(4, 2, 1, 1, 5)
    _, lse = attention(q, k, v, softmax_scale=1.0, causal=False)
    one = np.zeros(lse.shape)
    one[0, 1] = 1.0
    dq, _, dv = attention_backward(q, k, v, 0 * out_grad, softmax_scale=1.0, causal=False, lse_grad=one)
    assert not dv.any()
    assert not dq[0].any()
    p = np.exp(k[:, 0] @ q[1, 0] - lse[0, 1])
    assert_equal(dq[1, 0], p @ k[:, 0])


def test_what_is_not_seen_is_not_read_and_has_gradient_zero() -> None:
    q, k, v, out_grad, lse_grad = operands(5, 3, 2, 1, 6)
    k[2:], v[2:] = np.nan, np.nan
    gradients = attention_backward(q, k, v, out_grad, softmax_scale=1.0, cache_seqlens=2, lse_grad=lse_grad)
    dq, dk, dv = gradients
    assert all(np.isfinite(x).all() for x in gradients)
    assert not dq[0].any()  # sees no key
    assert not dk[2:].any()
    assert not dv[2:].any()
    assert dv[:2].any()


def test_logits_of_any_size_have_finite_gradients() -> None:
    q, k, v, out_grad, _ = operands(6, 2, 1, 1, 5)
    for scale in (1e3, 1e200):
        assert all(np.isfinite(x).all() for x in attention_backward(q, k, v, out_grad, softmax_scale=scale))


def test_leading_axes_are_independent_sequences() -> None:
    parts = [operands(seed, 2, 2, 1, 4) for seed in (7, 8)]
    lengths = np.array([4, 3])
    stacked = [np.stack(x) for x in zip(*parts, strict=True)]
    got = attention_backward(*stacked[:4], softmax_scale=1.0, cache_seqlens=lengths, lse_grad=stacked[4])
    for i, part in enumerate(parts):
        alone = attention_backward(*part[:4], softmax_scale=1.0, cache_seqlens=int(lengths[i]), lse_grad=part[4])
        for a, b in zip(got, alone, strict=True):
            assert_equal(a[i], b)


def test_ragged_gradients_are_those_of_each_sequence() -> None:
    """Sequences without queries, without keys, with fewer keys than queries, and with more."""
    queries, keys = (0, 2, 3, 2), (3, 0, 2, 5)
    q, k, v, out_grad, lse_grad = operands(9, sum(queries), 2, 2, sum(keys))
    cu_q, cu_k = (np.cumsum([0, *n]) for n in (queries, keys))
    got = prefill_backward(q, k, v, cu_q, cu_k, out_grad, softmax_scale=0.5, lse_grad=lse_grad)
    assert not got[0][:2].any()  # no keys
    assert not got[1][:3].any()  # no queries
    assert not got[2][:3].any()
    for i in (2, 3):
        of_q, of_k = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
        alone = attention_backward(
            q[of_q], k[of_k], v[of_k], out_grad[of_q], softmax_scale=0.5, lse_grad=lse_grad[:, of_q]
        )
        for a, b, tokens in zip(got, alone, (of_q, of_k, of_k), strict=True):
            assert_equal(a[tokens], b)


def test_offsets_must_fit() -> None:
    q, k, v, out_grad, _ = operands(10, 2, 1, 1, 3)
    with pytest.raises(ValueError, match="cu_seqlens_k must rise from 0 to the number of tokens 3"):
        prefill_backward(q, k, v, np.array([0, 2]), np.array([0, 2]), out_grad, softmax_scale=1.0)


INDICES = np.array([[0, 1, 1, -1], [3, -1, 2, 9], [-1, -1, -1, 7], [1, 2, 3, 0]])
SINKS = [None, np.array([0.3, -1.0]), np.array([np.inf, -np.inf])]


@pytest.mark.parametrize("sink", SINKS, ids=["no sink", "finite sinks", "infinite sinks"])
@pytest.mark.parametrize("length", [None, np.array([2, 4, 4, 0])], ids=["all read", "topk_length"])
def test_sparse_gradients_are_complex_step_derivatives(sink: Array | None, length: IntArray | None) -> None:
    """Repeated entries, entries that select nothing anywhere, rows without any, rows of kv that nothing selects."""
    rng = np.random.default_rng(11)
    q, kv = rng.standard_normal((4, 2, 3)), rng.standard_normal((6, 3))
    out_grad, lse_grad = rng.standard_normal((4, 2, 2)), rng.standard_normal((2, 4))

    def loss(q: Any, kv: Any) -> Any:
        total = 0.0
        for i in range(4):
            read = INDICES[i] if length is None else INDICES[i, : length[i]]
            rows = kv[[j for j in read if 0 <= j < 6]]
            out, lse = complex_attention(q[i : i + 1], rows[:, None], rows[:, None, :2], np.array([len(rows)]), 0.7)
            if sink is not None and len(rows):
                with np.errstate(over="ignore", invalid="ignore"):
                    share = np.where(np.isinf(sink), sink < 0, 1 / (1 + np.exp(np.nan_to_num(sink) - lse[:, 0])))
                out = out * share[:, None]
            total += (out * out_grad[i]).sum() + (lse[:, 0] * lse_grad[:, i] * bool(len(rows))).sum()
        return total

    got = sparse_prefill_backward(
        *(q, kv, INDICES, out_grad),
        head_dim_v=2,
        softmax_scale=0.7,
        attn_sink=sink,
        topk_length=length,
        lse_grad=lse_grad,
    )
    for a, b in zip(got, complex_step(loss, [q, kv]), strict=True):
        assert_equal(a, b)
    assert not got[0][2].any()
    assert not got[1][4:].any()


def test_sparse_gradients_over_all_keys_are_dense_ones() -> None:
    rng = np.random.default_rng(12)
    q, kv, out_grad = rng.standard_normal((3, 2, 4)), rng.standard_normal((5, 4)), rng.standard_normal((3, 2, 3))
    every = np.tile(rng.permutation(5), (3, 1))
    dq, dkv = sparse_prefill_backward(q, kv, every, out_grad, head_dim_v=3, softmax_scale=1.0)
    k = kv[:, None]
    want_q, dk, dv = attention_backward(q, k, k[..., :3], out_grad, softmax_scale=1.0, causal=False)
    dk[..., :3] += dv
    assert_equal(dq, want_q)
    assert_equal(dkv, dk[:, 0])
