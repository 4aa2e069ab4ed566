"""Calls the sparse operations of a subject: ``sparse_prefill``, ``sparse_decode`` and ``indexer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mla_spec.operations.sparse import IndexerInputs, SparseInputs
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Driver, Result
from mla_spec.subjects.violation import Violation

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SparseResult:
    """What a sparse operation returned; None for what the subject does not declare, or the operation does not have."""

    out: Result  # [(b,) s, h, c]
    max_logits: Result | None  # [s, h]
    lse: Result | None  # [s, h] or [b, h, s]

    def __getitem__(self, index: slice) -> SparseResult:
        """Some of the leading axis."""
        max_logits, lse = (None if x is None else x[index] for x in (self.max_logits, self.lse))
        return SparseResult(self.out[index], max_logits, lse)

    def parts(self) -> list[Result]:
        """All that there is."""
        return [part for part in (self.out, self.max_logits, self.lse) if part is not None]


class SparseDriver:
    """A driver's subject with one of the two operations."""

    def __init__(self, driver: Driver, operation: str) -> None:
        self.driver = driver
        self.operation = operation
        self.wide = (torch.float32, torch.float64)

    def tensors(self, inputs: SparseInputs) -> Tensors:
        """The tensor arguments by name, without the optional ones that are absent."""
        driver = self.driver
        tensors = {
            "q": driver.tensor(inputs.q),
            "kv": driver.tensor(inputs.kv),
            "indices": driver.integers(inputs.indices, torch.int32),
        }
        if inputs.attn_sink is not None:
            tensors["attn_sink"] = _wide(inputs.attn_sink, driver)
        if inputs.topk_length is not None:
            tensors["topk_length"] = driver.integers(inputs.topk_length, torch.int32)
        return tensors

    def raw(self, inputs: SparseInputs, tensors: Tensors) -> tuple[Any, ...]:
        """What the operation returned, unread."""
        options = {name: tensors[name] for name in ("attn_sink", "topk_length") if name in tensors}
        returned = self.driver.guard(
            lambda: getattr(self.driver.subject, self.operation)(
                tensors["q"],
                tensors["kv"],
                tensors["indices"],
                head_dim_v=inputs.head_dim_v,
                softmax_scale=inputs.softmax_scale,
                **options,
            )
        )
        names = "(out, max_logits, lse)" if self.operation == "sparse_prefill" else "(out, lse)"
        if not (isinstance(returned, tuple) and len(returned) == names.count(",") + 1):
            raise Violation(f"{self.operation} must return {names}, got {type(returned).__name__}")
        return returned

    def call(self, inputs: SparseInputs, tensors: Tensors | None = None) -> SparseResult:
        """The results. ``tensors`` replace those built from ``inputs``."""
        returned = self.raw(inputs, tensors or self.tensors(inputs))
        *lead, h, _ = inputs.q.shape
        out = self.driver.result(returned[0], "out", (*lead, h, inputs.head_dim_v))
        if not self.driver.supports.lse:
            return SparseResult(out, None, None)
        if self.operation == "sparse_decode":
            b, s = lead
            return SparseResult(out, None, self.driver.result(returned[1], "lse", (b, h, s), self.wide))
        max_logits = self.driver.result(returned[1], "max_logits", (*lead, h), self.wide)
        return SparseResult(out, max_logits, self.driver.result(returned[2], "lse", (*lead, h), self.wide))


class IndexerDriver:
    """A driver's subject with ``indexer``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def tensors(self, inputs: IndexerInputs) -> Tensors:
        """The tensor arguments by name."""
        return {
            "q": self.driver.tensor(inputs.q),
            "k": self.driver.tensor(inputs.k),
            "weights": _wide(inputs.weights, self.driver),
            "cu_seqlens_q": self.driver.integers(inputs.cu_seqlens_q, torch.int32),
            "cu_seqlens_k": self.driver.integers(inputs.cu_seqlens_k, torch.int32),
        }

    def raw(self, inputs: IndexerInputs, tensors: Tensors) -> tuple[Any, Any]:
        """What ``indexer`` returned, unread."""
        returned = self.driver.guard(lambda: self.driver.subject.indexer(*tensors.values(), top_k=inputs.top_k))
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise Violation(f"indexer must return (logits, indices), got {type(returned).__name__}")
        return returned

    def call(self, inputs: IndexerInputs, tensors: Tensors | None = None) -> tuple[Result | None, IntArray]:
        """(logits [tokens, key tokens], None where the subject declares none; indices [tokens, top_k])."""
        logits, indices = self.raw(inputs, tensors or self.tensors(inputs))
        tokens = len(inputs.q)
        chosen = self.driver.result(indices, "indices", (tokens, inputs.top_k), (torch.int32, torch.int64))
        if not self.driver.supports.indexer_logits:
            return None, chosen.bits
        wide = (torch.float32, torch.float64)
        return self.driver.result(logits, "logits", (tokens, len(inputs.k)), wide), chosen.bits


def _wide(x: Array, driver: Driver) -> torch.Tensor:
    """Float64 where the case is, else float32."""
    dtype = torch.float64 if driver.dtype == "float64" else torch.float32
    return torch.from_numpy(x).to(driver.device, dtype)
