"""Gradients through ``prefill`` and ``sparse_prefill``, as autograd gives them.

They are judged where ``supports.backward`` names the operation, or names none and the output requires a gradient. Each tensor
that requires a gradient (q, k and v; q and kv; hidden and the weights of a ``layer``) gets one of its shape and dtype, for
any gradient of out, whatever its strides, and of the LSE where ``supports.lse_backward``. max_logits has none, and attn_sink
is a constant. Queries that see no key, keys that no query sees, and rows of kv that no entry selects have gradient 0.

Cases have two regimes beside "typical" and "outlier". In "aligned", keys, and values, are two opposite rows with noise, queries
are one row with noise, and so are gradients: few terms of a sum cancel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from mla_spec.operations.case import Case
from mla_spec.operations.operation import View
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase, PrefillInputs
from mla_spec.operations.regimes import Regime, values
from mla_spec.operations.sparse import SPARSE_PREFILL, SparseInputs, SparsePrefillCase
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Driver, Result, tensor_bits
from mla_spec.subjects.near import travels
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Violation

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
    known_regimes: ClassVar[tuple[str, ...]] = ("typical", "outlier", "negative", "aligned", "exact")

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
    known_regimes: ClassVar[tuple[str, ...]] = ("typical", "outlier", "negative", "aligned")

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


Tensors = dict[str, torch.Tensor]
Gradients = dict[str, Result]


@travels
@dataclass(frozen=True)
class Branched:
    """What a backward pass left where another branch of the network was added to ``out``.

    Attributes:
        before: bits of out when the call had returned.
        out: the same tensor after the backward pass.
        branch: the gradient of the other branch.
        gradients: of the arguments.
    """

    before: IntArray
    out: torch.Tensor
    branch: torch.Tensor
    gradients: Gradients


class BackwardDriver(Driver):
    """A driver whose calls autograd records."""

    recording = True

    def guard(self, call: Callable[[], Any]) -> Any:
        """Run a call into the subject, which may refuse to be recorded where it never spoke of gradients."""
        try:
            return super().guard(call)
        except SubjectCrashed as error:
            told = str(error.__cause__)  # not where, which may be a file called gradients
            if self.supports.backward is None and re.search("grad|derivative", told):
                raise NotOffered(f"autograd cannot record it: {error}") from error
            raise

    @classmethod
    def of(cls, driver: Driver) -> BackwardDriver:
        """For the subject of another driver."""
        return cls(driver.subject, driver.dtype, driver.device)

    def lse_grad(self, x: Array) -> torch.Tensor:
        """A gradient of the LSE, float32 numbers, as a tensor."""
        return torch.from_numpy(np.array(x)).to(self.device)

    def prefill_gradients(
        self, inputs: PrefillInputs, tensors: Tensors, names: Sequence[str] = ("q", "k", "v")
    ) -> Gradients:
        """Gradients of q, k and v, or only those of ``names``; the others require none.

        ``tensors`` are the arguments, ``out_grad`` and, where wanted, ``lse_grad``.
        """
        recorded = leaves(tensors, names)
        out, lse = self.raw(PREFILL, inputs, recorded)
        return self.gradients("prefill", recorded, names, out, lse)

    def sparse_gradients(self, inputs: SparseInputs, tensors: Tensors, names: Sequence[str] = ("q", "kv")) -> Gradients:
        """Gradients of q and kv, as ``prefill_gradients``."""
        recorded = leaves(tensors, names)
        out, _, lse = self.raw(SPARSE_PREFILL, inputs, recorded)
        return self.gradients("sparse_prefill", recorded, names, out, lse)

    def gradients(self, operation: str, tensors: Tensors, names: Sequence[str], out: Any, lse: Any) -> Gradients:
        """What ``backward`` leaves in the ``grad`` of the tensors called ``names``.

        Raises:
            Violation: an output does not depend on them for autograd, or a gradient is missing or of another shape or dtype.
        """
        outputs = {name: x for name, x in (("out", out), ("lse", lse)) if f"{name}_grad" in tensors}
        for name, x in outputs.items():
            self.require_recorded(operation, name, x, names)
        wanted = [
            tensors[f"{name}_grad"].to(x.dtype) if name == "lse" else tensors["out_grad"] for name, x in outputs.items()
        ]
        self.guard(lambda: torch.autograd.backward(list(outputs.values()), wanted))
        if all(tensors[name].grad is None for name in names):
            raise self._missing(f"none of {', '.join(names)} got a gradient from the backward pass of {operation}")
        found = {}
        for name in names:
            x, gradient = tensors[name], tensors[name].grad
            if gradient is None:
                raise Violation(f"{name} got no gradient from the backward pass of {operation}")
            found[name] = self.result(gradient, f"gradient of {name}", tuple(x.shape), (x.dtype,))
        return found

    def beside_a_branch(self, operation: Signature, inputs: Any, tensors: Tensors, names: Sequence[str]) -> Branched:
        """Gradients where a branch of the network is added to the operation's first output.

        The branch is older than the call, so that autograd comes to it when it is done with the operation.
        """
        recorded, other = leaves(tensors, names), torch.zeros_like(tensors["out_grad"]).requires_grad_()
        branch = other * 1
        out = self.raw(operation, inputs, recorded)[0]
        before = tensor_bits(out)
        added = out + branch if out.requires_grad else out
        gradients = self.gradients(operation.name, recorded, names, added, None)
        assert other.grad is not None
        return Branched(before, out.detach(), other.grad, gradients)

    def require_recorded(self, operation: str, name: str, x: Any, names: Sequence[str]) -> None:
        """Raise Violation, or NotOffered, unless autograd has recorded how output ``name`` depends on ``names``."""
        if not isinstance(x, torch.Tensor) or not x.requires_grad:
            raise self._missing(
                f"{name} of {operation} does not require grad though {', '.join(names)} do: no gradient flows through it; "
                f"supports.{'lse_backward' if name == 'lse' else 'backward'} must say so"
            )

    def _missing(self, message: str) -> Violation | NotOffered:
        """A subject that never spoke of gradients may have none at all."""
        return NotOffered(message) if self.supports.backward is None else Violation(message)


def leaves(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """The same with those called ``names`` as leaves of their own that require a gradient; their strides stay."""
    return tensors | {name: tensors[name].detach().requires_grad_() for name in names}


REGIMES: dict[type[Case], tuple[Regime, ...]] = {
    PrefillBackwardCase: (*PREFILL.regimes, *values("regime", "exact")),
    SparseBackwardCase: SPARSE_PREFILL.regimes,
}

OUT_GRAD_VIEWS: dict[str, View] = {
    "out_grad as a slice of a wider row": viewed(slice_of_wider, "out_grad", -1, ROW_PADDING),
    "out_grad stored with heads before tokens": viewed(transposed, "out_grad", 0, 1),
}
"""Ways to pass the same gradient of out to a backward pass."""
