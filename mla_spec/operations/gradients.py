"""Cases of the backward pass of ``prefill`` and ``sparse_prefill``: their inputs, and the gradients that arrive.

Their regimes, beside "typical" and "outlier": "aligned": keys, and values, are two opposite rows with noise, queries are one
row with noise, and so are gradients, so that few terms of a sum cancel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.operations.prefill import PrefillCase, PrefillInputs
from mla_spec.operations.sparse import SparseInputs, SparsePrefillCase
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, IntArray

NOISE = 0.25
"""Standard deviation of the noise of aligned rows whose elements are -1 and 1."""


@dataclass(frozen=True)
class PrefillBackwardInputs:
    """Arguments of ``prefill``, and the gradients of its outputs."""

    forward: PrefillInputs
    out_grad: Array  # [tokens, h, v], numbers of the dtype
    lse_grad: Array  # [h, tokens], numbers of float32


@dataclass(frozen=True)
class SparseBackwardInputs:
    """Arguments of ``sparse_prefill``, and the gradients of its outputs."""

    forward: SparseInputs
    out_grad: Array  # [s, h, c], numbers of the dtype
    lse_grad: Array  # [s, h], numbers of float32


@dataclass(frozen=True, kw_only=True)
class PrefillBackwardCase(PrefillCase):
    """As ``PrefillCase``; gradients are normal numbers.

    One more regime, "exact", has all scores 0, and as values rows of the unit matrix. Where a sequence has 2^n keys that all
    queries see, O, P, dP, D and dS then have few bits, but the products O dO whose sum is D have too many for 16.
    """

    kind = "prefill_backward"

    def with_gradients(self) -> PrefillBackwardInputs:
        """The inputs, and the gradients that arrive."""
        forward = self.build()
        rng = np.random.default_rng([self.seed, 12])
        tokens, h, _ = forward.q.shape
        out_grad, lse_grad = rng.standard_normal((tokens, h, self.v_head_dim)), rng.standard_normal((h, tokens))
        if self.regime == "aligned":
            forward, out_grad = self._aligned(rng, forward, out_grad)
        elif self.regime == "exact":
            forward, out_grad = self._exact(rng, forward, out_grad)
        return PrefillBackwardInputs(forward, round_to(out_grad, self.dtype), round_to(lse_grad, "float32"))

    def _aligned(self, rng: np.random.Generator, x: PrefillInputs, out_grad: Array) -> tuple[PrefillInputs, Array]:
        row_q, row_k = (rng.choice([-1.0, 1.0], self.qk_head_dim) for _ in range(2))
        row_v = rng.choice([-1.0, 1.0], self.v_head_dim)
        side = _sides(len(x.k))[:, None, None]
        q, k, v = row_q + NOISE * x.q, row_k * side + NOISE * x.k, row_v * side + NOISE * rng.standard_normal(x.v.shape)
        q, k, v = (round_to(operand, self.dtype) for operand in (q, k, v))
        return replace(x, q=q, k=k, v=v), row_v + NOISE * out_grad

    def _exact(self, rng: np.random.Generator, x: PrefillInputs, out_grad: Array) -> tuple[PrefillInputs, Array]:
        """Queries and keys share no dim, and dO is 1 + e with Σ_d O_d e_d = 0, so that D is 1 and dP − D is e."""
        of_q = np.arange(self.qk_head_dim) % 2 == 0
        q, k = rng.integers(1, 3, x.q.shape) * of_q * 1.0, np.zeros(x.k.shape)
        v, out_grad, width = np.zeros(x.v.shape), np.ones(out_grad.shape), min(3, self.v_head_dim)
        for i in range(len(self.seqlens_q)):
            queries, keys = slice(*x.cu_seqlens_q[i : i + 2]), slice(*x.cu_seqlens_k[i : i + 2])
            column = rng.integers(0, width, self.seqlens_k[i])
            column[:width] = np.arange(width)[: len(column)]
            v[keys] = np.eye(width, self.v_head_dim)[column][:, None]
            e = _orthogonal(rng, np.bincount(column, minlength=width)) / 128
            out_grad[queries, :, :width] += e
            k[keys] = (~of_q * np.sign(e)[column, None])[:, None]
        return replace(x, q=q, k=k, v=v, softmax_scale=0.25), out_grad


@dataclass(frozen=True, kw_only=True)
class SparseBackwardCase(SparsePrefillCase):
    """As ``SparsePrefillCase``; gradients are normal numbers. Every other query selects all different rows, as many as it can."""

    kind = "sparse_backward"

    def with_gradients(self) -> SparseBackwardInputs:
        """The inputs, and the gradients that arrive."""
        rng = np.random.default_rng([self.seed, 12])
        forward = self._with_full_rows(rng, self.build())
        out_grad = rng.standard_normal((self.s_q, self.num_heads, self.kv_lora_rank))
        if self.regime == "aligned":
            out_grad = self._row()[: self.kv_lora_rank] + NOISE * out_grad
        lse_grad = rng.standard_normal((self.s_q, self.num_heads))
        return SparseBackwardInputs(forward, round_to(out_grad, self.dtype), round_to(lse_grad, "float32"))

    def _with_full_rows(self, rng: np.random.Generator, x: SparseInputs) -> SparseInputs:
        full = np.arange(self.s_q) % 2 == 0
        # neighbouring rows, among them aligned ones of both kinds
        rows = (rng.integers(self.s_kv, size=(self.s_q, 1, 1)) + np.arange(self.topk)) % max(self.s_kv, self.topk)
        chosen = rng.permuted(np.where(rows < self.s_kv, rows, -1), axis=-1).astype(np.int32)
        length = x.topk_length
        return replace(
            x,
            indices=np.where(full[:, None, None], chosen, x.indices),
            topk_length=None if length is None else np.where(full, np.int32(self.topk), length),
        )

    def operands(self, rng: np.random.Generator, lead: tuple[int, ...], pool: tuple[int, ...]) -> tuple[Array, Array]:
        """Queries [s, h, c+r] and rows [s_kv, 1, c+r] before they are rounded."""
        q, rows = super().operands(rng, lead, pool)
        if self.regime != "aligned":
            return q, rows
        row = self._row()
        side = _sides(len(rows))[:, None, None]
        return rng.choice([-1.0, 1.0], len(row)) + NOISE * q, row * side + NOISE * rng.standard_normal(rows.shape)

    def _row(self) -> Array:
        rng = np.random.default_rng([self.seed, 13])
        return rng.choice([-1.0, 1.0], self.kv_lora_rank + self.qk_rope_head_dim)


def _orthogonal(rng: np.random.Generator, counts: IntArray) -> IntArray:
    """Integers below 128, none of them 0, that are orthogonal to one, two or three counts."""
    width = len(counts)
    n = np.pad(counts, (0, 3 - width))
    found = np.cross(n, np.indices((5, 5, 5)).reshape(3, -1).T - 2)[:, :width]
    usable = (found != 0).all(axis=1) & (np.abs(found) < 128).all(axis=1)
    return rng.choice(found[usable]) if usable.any() else np.zeros_like(counts)


def _sides(keys: int) -> Array:
    """-1 and 1 in turn, so that a query that sees several keys sees both."""
    return np.where(np.arange(keys) % 2, 1.0, -1.0)
