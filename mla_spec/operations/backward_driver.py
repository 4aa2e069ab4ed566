"""Differentiates a subject: autograd through ``prefill`` and ``sparse_prefill``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mla_spec.operations.prefill import PrefillInputs
from mla_spec.operations.sparse import SparseInputs
from mla_spec.operations.sparse_driver import SparseDriver
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Violation

Tensors = dict[str, torch.Tensor]
Gradients = dict[str, Result]


class BackwardDriver(Driver):
    """A driver whose calls autograd records."""

    recording = True

    def guard(self, call: Callable[[], Any]) -> Any:
        """Run a call into the subject, which may refuse to be recorded where it never spoke of gradients."""
        try:
            return super().guard(call)
        except SubjectCrashed as error:
            if self.supports.backward is None and re.search("grad|derivative", str(error)):
                raise NotOffered(f"autograd cannot record it: {error}") from error
            raise

    @classmethod
    def of(cls, driver: Driver) -> BackwardDriver:
        """For the subject of another driver."""
        return cls(driver.subject, driver.dtype, driver.device)

    def prefill_gradients(
        self, inputs: PrefillInputs, tensors: Tensors, names: Sequence[str] = ("q", "k", "v")
    ) -> Gradients:
        """Gradients of q, k and v, or only those of ``names``; the others require none.

        ``tensors`` are the arguments, ``out_grad`` and, where wanted, ``lse_grad``.
        """
        leaves = _leaves(tensors, names)
        out, lse = self.prefill_raw(inputs, leaves)
        return self.gradients("prefill", leaves, names, out, lse)

    def sparse_gradients(self, inputs: SparseInputs, tensors: Tensors, names: Sequence[str] = ("q", "kv")) -> Gradients:
        """Gradients of q and kv, as ``prefill_gradients``."""
        leaves = _leaves(tensors, names)
        out, _, lse = SparseDriver(self, "sparse_prefill").raw(inputs, leaves)
        return self.gradients("sparse_prefill", leaves, names, out, lse)

    def gradients(self, operation: str, tensors: Tensors, names: Sequence[str], out: Any, lse: Any) -> Gradients:
        """What ``backward`` leaves in the ``grad`` of the tensors called ``names``.

        Raises:
            Violation: an output does not depend on them for autograd, or a gradient is missing or of another shape or dtype.
        """
        outputs = {name: x for name, x in (("out", out), ("lse", lse)) if f"{name}_grad" in tensors}
        for name, x in outputs.items():
            if not isinstance(x, torch.Tensor) or not x.requires_grad:
                raise self._missing(
                    f"{name} of {operation} does not require grad though {', '.join(names)} do: no gradient flows through it; "
                    f"supports.{'lse_backward' if name == 'lse' else 'backward'} must say so"
                )
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
            found[name] = self.result(gradient, f"gradient of {name}", tuple(x.shape), (TORCH_DTYPES[self.dtype],))
        return found

    def _missing(self, message: str) -> Violation | NotOffered:
        """A subject that never spoke of gradients may have none at all."""
        return NotOffered(message) if self.supports.backward is None else Violation(message)


def _leaves(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """The same with those called ``names`` as leaves of their own that require a gradient; their strides stay."""
    return tensors | {name: tensors[name].detach().requires_grad_() for name in names}
