"""Gradients of attention in ball arithmetic, by forward differentiation of the attention of ``certified``.

No formula of a backward pass is used: every operand in turn moves at speed 1, and the speed at which the loss moves is its
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.golden.exact.balls import (
    Ball,
    Balls,
    arb,
    attend,
    ball,
)
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class Moving:
    """A number and its speed."""

    value: Ball
    speed: Ball

    def __add__(self, other: Any) -> Moving:
        other = _moving(other)
        return Moving(self.value + other.value, self.speed + other.speed)

    def __mul__(self, other: Any) -> Moving:
        other = _moving(other)
        return Moving(self.value * other.value, self.speed * other.value + self.value * other.speed)

    def __truediv__(self, other: Any) -> Moving:
        other = _moving(other)
        quotient = self.value / other.value
        return Moving(quotient, (self.speed - quotient * other.speed) / other.value)

    __radd__, __rmul__ = __add__, __mul__

    def exp(self) -> Moving:
        value = self.value.exp()
        return Moving(value, value * self.speed)

    def log(self) -> Moving:
        return Moving(self.value.log(), self.speed / self.value)


def _moving(x: Any) -> Moving:
    return x if isinstance(x, Moving) else Moving(arb(x), arb(0))


def _still(x: Balls) -> Balls:
    """An object array of numbers that do not move."""
    moving = np.empty(x.shape, dtype=object)
    moving.ravel()[:] = [Moving(value, arb(0)) for value in ball(x).ravel()]
    return moving


def gradients(loss: Callable[..., Any], *operands: Balls) -> list[Balls]:
    """Of a loss of the operands, with respect to each element of each."""
    numbers = [_still(x) for x in operands]
    found = [np.empty(x.shape, dtype=object) for x in operands]
    for operand, gradient in zip(numbers, found, strict=True):
        for index in np.ndindex(operand.shape):
            still = operand[index]
            operand[index] = Moving(still.value, arb(1))
            gradient[index] = _moving(loss(*numbers)).speed
            operand[index] = still
    return found


def _loss(out: Balls, lse: Any, out_grad: Balls, lse_grad: Ball) -> Any:
    """What depends on out and on the LSE with these gradients."""
    return (out * out_grad).sum() + lse * lse_grad


def prefill_gradients(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    out_grad: Array,
    lse_grad: Array,
    *,
    scale: Ball,
    causal: bool,
) -> tuple[Balls, Balls, Balls]:
    """With respect to q [tokens, h, d], k [key tokens, h, d] and v [key tokens, h, v]; lse_grad [h, tokens]."""
    q_grad, k_grad, v_grad = (ball(np.zeros(x.shape)) for x in (q, k, v))
    for sequence in range(len(cu_seqlens_q) - 1):
        first, last = cu_seqlens_q[sequence : sequence + 2]
        start, end = cu_seqlens_k[sequence : sequence + 2]
        for i in range(first, last):
            seen = slice(start, max(start, end - (last - 1 - i)) if causal else end)
            if seen.start == seen.stop:
                continue
            for head in range(q.shape[1]):
                do, dlse = ball(out_grad[i, head]), arb(lse_grad[head, i])

                def loss(query: Balls, keys: Balls, values: Balls, do: Balls = do, dlse: Ball = dlse) -> Any:
                    out, lse = attend(query, keys, values, scale)
                    return _loss(out, lse, do, dlse)

                dq, dk, dv = gradients(loss, q[i, head], k[seen, head], v[seen, head])
                q_grad[i, head] += dq
                k_grad[seen, head] += dk
                v_grad[seen, head] += dv
    return q_grad, k_grad, v_grad


def sparse_prefill_gradients(
    q: Array,
    rows: Array,
    indices: IntArray,
    out_grad: Array,
    lse_grad: Array,
    *,
    scale: Ball,
    head_dim_v: int,
    attn_sink: Array,
) -> tuple[Balls, Balls]:
    """With respect to q [s, h, d] and rows [t, d], whose first ``head_dim_v`` columns are values; lse_grad [s, h].

    A finite sink adds e^sink to the sum of the weights by which out is divided, and does not move.
    """
    q_grad, rows_grad = ball(np.zeros(q.shape)), ball(np.zeros(rows.shape))
    for i, entries in enumerate(indices):
        chosen = [j for j in entries if 0 <= j < len(rows)]
        for head in range(q.shape[1]) if chosen else ():
            do, dlse, sink = ball(out_grad[i, head]), arb(lse_grad[i, head]), arb(attn_sink[head]).exp()

            def loss(query: Balls, keys: Balls, do: Balls = do, dlse: Ball = dlse, sink: Ball = sink) -> Any:
                weights = np.exp(scale * (keys @ query))
                total = weights.sum()
                return _loss(weights @ keys[:, :head_dim_v] / (total + sink), total.log(), do, dlse)

            dq, dk = gradients(loss, q[i, head], rows[chosen])
            q_grad[i, head] += dq
            for j, gradient in zip(chosen, dk, strict=True):
                rows_grad[j] += gradient
    return q_grad, rows_grad
