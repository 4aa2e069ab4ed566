"""What a call may do to memory: leave its arguments alone, and return memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_spec.judging.law import Run
from mla_spec.subjects.driver import tensor_bits


def require_unmodified(run: Run, operation: str, tensors: dict[str, Tensor], call: Callable[[], Any]) -> None:
    """Raise Violation if ``call`` changes one of ``tensors``."""
    before = {name: tensor_bits(x) for name, x in tensors.items()}
    call()
    for name, x in tensors.items():
        changed = int((tensor_bits(x) != before[name]).sum())
        run.require(changed == 0, f"{operation} changed {changed} of {x.numel()} elements of its argument {name}")


def require_own_outputs(run: Run, tensors: dict[str, Tensor], call: Callable[[], Sequence[Any]]) -> None:
    """Raise Violation if out or lse share memory with ``tensors``, or with what the next call returns."""
    first, second = call(), call()
    others: dict[str, Any] = {f"argument {name}": x for name, x in tensors.items()}
    others |= {f"{name} of the next call": x for name, x in zip(("out", "lse"), second, strict=True)}
    for name, x in zip(("out", "lse"), first, strict=True):
        for other, y in others.items():
            run.require(not _share_memory(x, y), f"{name} shares memory with {other}")


def _share_memory(x: Any, y: Any) -> bool:
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or not x.numel() or not y.numel():
        return False
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
